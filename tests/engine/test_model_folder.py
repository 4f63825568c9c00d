"""Model folders: what is read, what is refused and how the refusal reads; the KV sizes; the tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from engine.api import SamplingParams
from engine.kv_cache import KVCache, block_bytes, blocks_in, storage_bytes
from engine.model_config import LayerGroup, ModelConfig, RopeConfig, UnsupportedModel, fingerprint
from engine.plan import BlockTable, Row, StepPlan
from engine.runner import load_runner
from engine.shards import Shard, shards
from engine.weights import load_weights
from scripts import make_tiny_model

torch.set_num_threads(1)

TINY = Path(__file__).parents[2] / "models" / "baton-tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **numbers}


QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}


def first_logits(folder: Path, dtype: str = "auto") -> torch.Tensor:
    table = BlockTable()
    table.extend([3, 1])
    rows = [Row(0, list(range(65, 90)), table, SamplingParams())]
    return load_runner(folder, dtype, num_blocks=4).logits(StepPlan(0, rows))


def test_reads_the_tiny_model() -> None:
    config = ModelConfig.from_folder(TINY)
    assert (config.hidden_size, config.layers, config.vocab_size) == (96, 4, 262)
    assert (config.q_heads, config.kv_heads, config.group, config.head_dim) == (8, 4, 2, 16)
    assert config.eos_token_ids == (257, 261)  # of generation_config.json, where it says so
    assert config.bos_token_id == 256
    assert config.rope == RopeConfig(10000.0)
    assert config.dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures=\['GPT2LMHeadModel'\]"),
        ({"architectures": "absent"}, r"architectures=\[\]"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config={'quant_method': 'fp8'}"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"attention_sinks": True}, "attention_sinks=True"),
        ({"rope_parameters": rope("longrope", factor=2.0)}, "rope_parameters.rope_type='longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, "rope_scaling.rope_type='su'"),
        ({"rope_parameters": rope("linear")}, "factor=None"),
        ({"rope_parameters": rope("linear", factor=0)}, "factor=0"),
        ({"rope_parameters": rope("default", mrope_section=[16, 24])}, r"mrope_section=\[16, 24\]"),
        ({"rope_parameters": rope("dynamic", factor=2.0, alpha=1000)}, "rope_parameters.alpha=1000"),
        ({"rope_parameters": {"full_attention": rope("default")}}, "rope_parameters.full_attention="),
        (
            {"rope_parameters": rope("llama3", factor=8, low_freq_factor=4, high_freq_factor=1)},
            "low_freq_factor=4.0",
        ),
        (
            {
                "rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=64),
                "original_max_position_embeddings": 32,
            },
            "original_max_position_embeddings is 64 .* 32",
        ),
        ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor=0.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": "absent"}, "hidden_size=None"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"attention_bias": "yes"}, "attention_bias='yes'"),
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"layer_types": ["sliding_attention"] * 4}, r"layer_types=\['sliding_attention', "),
        ({"layer_types": ["full_attention"] * 3}, r"layer_types=.*expected 4 of \['full_attention'\]"),
        ({**QWEN2, "layer_types": ["sliding_attention"] * 4}, "layer_types=.*sliding_window=None"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": None}, "without sliding_window"),
        (
            {**QWEN2, "use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
            r"layer_types=\['chunked_attention'",
        ),
    ],
)
def test_refuses_by_key_and_value(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UnsupportedModel, match=message):
        ModelConfig.from_folder(folder)


FULL = LayerGroup("full", (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, (FULL,)),
        ({"layer_types": ["full_attention"] * 4}, (FULL,)),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
            (LayerGroup("window", (0, 1, 2, 3), 64),),
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (FULL,)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, (FULL,)),  # nobody can outgrow it
        (
            {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192},  # absent: the default
            (LayerGroup("window", (0, 1, 2, 3), 4096),),
        ),
        ({**QWEN2, "sliding_window": 64, "max_window_layers": 0}, (FULL,)),  # not used
        (
            {**QWEN2, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
            (LayerGroup("full", (0, 1, 2)), LayerGroup("window", (3,), 64)),
        ),
        (
            {
                **QWEN2,
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (LayerGroup("full", (1, 3)), LayerGroup("window", (0, 2), 64)),
        ),
    ],
)
def test_layers_are_grouped_by_what_they_see(
    folder: Path, changes: dict[str, Any], groups: tuple[LayerGroup, ...]
) -> None:
    edit(folder, **changes)
    config = ModelConfig.from_folder(folder)
    assert config.groups == groups
    assert len(config.windows) == 4
    assert all(config.windows[layer] == group.window for group in groups for layer in group.layers)


def test_how_many_positions_a_rope_is_good_for(folder: Path) -> None:
    """Dynamic only up to the original length; yarn as far as it stretches, whatever max_position_embeddings says."""
    original = {"original_max_position_embeddings": 512}
    for parameters, expected in (
        (rope("default"), 4096),
        (rope("dynamic", factor=4.0), 4096),
        (rope("dynamic", factor=4.0, **original), 512),
        (rope("yarn", factor=2.0, **original), 4096),
        (rope("yarn", factor=16.0, **original), 8192),
        (rope("yarn", factor=16.0), 4096),
    ):
        edit(folder, rope_parameters=parameters)
        assert ModelConfig.from_folder(folder).max_positions == expected, parameters


def test_rope_scaling_wins_as_in_transformers(folder: Path) -> None:
    edit(
        folder,
        rope_theta=7.0,
        rope_parameters=rope("linear", factor=2.0),
        rope_scaling={"rope_type": "linear", "factor": 3.0},
    )
    assert ModelConfig.from_folder(folder).rope == RopeConfig(7.0, "linear", 3.0)


def test_reads_rope_in_both_spellings(folder: Path) -> None:
    llama3 = {
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 64,
    }
    edit(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3}, rope_theta="absent")
    new = ModelConfig.from_folder(folder).rope
    edit(folder, rope_parameters="absent", rope_theta=5e5, rope_scaling={"type": "llama3", **llama3})
    assert ModelConfig.from_folder(folder).rope == new == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)


def test_defaults_of_a_family(folder: Path) -> None:
    edit(folder, architectures=["Qwen3ForCausalLM"], head_dim="absent")
    config = ModelConfig.from_folder(folder)
    assert (config.head_dim, config.qk_norm, config.qkv_bias) == (128, True, False)
    edit(folder, architectures=["Qwen2ForCausalLM"])
    config = ModelConfig.from_folder(folder)
    assert (config.head_dim, config.qk_norm, config.qkv_bias, config.output_bias) == (12, False, True, False)


def test_eos_of_the_config_without_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert ModelConfig.from_folder(folder).eos_token_ids == (257,)


@pytest.mark.parametrize("shard", [Shard(0, 1), Shard(1, 2)])
def test_names_missing_unexpected_and_misshapen_tensors(folder: Path, shard: Shard) -> None:
    """A rank of several compares whole tensors, too."""
    config, file = ModelConfig.from_folder(folder), folder / "model.safetensors"
    good = load_file(file)
    name = "model.layers.2.mlp.up_proj.weight"
    for tensors, message in (
        ({key: value for key, value in good.items() if key != name}, f"missing.*{name}"),
        (good | {"model.layers.9.extra": torch.ones(2)}, r"unexpected tensor 'model.layers.9.extra' \[2\]"),
        (good | {name: torch.ones(3, 4)}, rf"'{name}' is \[3, 4\], the config says \[192, 96\]"),
        (good | {name: good[name][:96].clone()}, rf"'{name}' is \[96, 96\], the config says \[192, 96\]"),
        (good | {name: torch.tensor(1.0)}, rf"'{name}' is \[\], the config says"),
        (good | {name: good[name].to(torch.int8)}, f"'{name}' is torch.int8"),
        (good | {name: good[name].to(torch.float8_e4m3fn)}, f"'{name}' is torch.float8_e4m3fn"),
    ):
        save_file(tensors, file)
        with pytest.raises(UnsupportedModel, match=message):
            load_weights(folder, config, torch.float32, shard=shard)
    file.unlink()
    with pytest.raises(UnsupportedModel, match="only safetensors"):
        load_weights(folder, config, torch.float32)


def test_a_bias_that_is_rank_0s_must_be_right_for_all(folder: Path) -> None:
    """Those behind a sum over the ranks are added once; the others only look at them."""
    config = replace(ModelConfig.from_folder(folder), output_bias=True, mlp_bias=True)
    file = folder / "model.safetensors"
    name = "model.layers.1.self_attn.o_proj.bias"
    biases = {
        f"model.layers.{layer}.{where}.bias": torch.full((size,), 2.0)
        for layer in range(4)
        for where, size in (
            ("self_attn.o_proj", 96),
            ("mlp.down_proj", 96),
            ("mlp.gate_proj", 192),
            ("mlp.up_proj", 192),
        )
    }
    good = load_file(file) | biases
    save_file(good, file)
    for rank in range(2):
        for layer in load_weights(folder, config, torch.float32, shard=Shard(rank, 2)).layers:
            own, shared = layer.gate_up.bias, [layer.output.bias, layer.down.bias]
            assert own is not None and own.eq(2.0).all() and len(own) == 192
            assert all(bias is None if rank else bias is not None and bias.eq(2.0).all() for bias in shared)
    for tensors, message in (
        ({key: value for key, value in good.items() if key != name}, f"missing.*{name}"),
        (good | {name: torch.ones(48)}, rf"'{name}' is \[48\], the config says \[96\]"),
    ):
        save_file(tensors, file)
        with pytest.raises(UnsupportedModel, match=message):
            load_weights(folder, config, torch.float32, shard=Shard(1, 2))


def test_shards_are_the_same_model(folder: Path) -> None:
    expected = first_logits(folder)
    tensors = sorted(load_file(folder / "model.safetensors").items())
    shards = {
        "model-00001-of-00002.safetensors": tensors[::2],
        "model-00002-of-00002.safetensors": tensors[1::2],
    }
    for name, part in shards.items():
        save_file(dict(part), folder / name)
    (folder / "model.safetensors").unlink()
    weight_map = {key: name for name, part in shards.items() for key, _ in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert torch.equal(first_logits(folder), expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"not there: \['model-00002-of-00002.safetensors'\]"):
        first_logits(folder)


def test_casts_while_loading_and_reports_progress(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    runner = load_runner(
        folder, "bfloat16", kv_bytes=1 << 20, progress=lambda done, total: seen.append((done, total))
    )
    size = (folder / "model.safetensors").stat().st_size
    assert seen == sorted(seen) and seen[-1] == (size, size) and len(seen) > 30
    assert seen[len(seen) // 2][0] > size / 3  # bytes of the file, whatever the dtype in memory
    assert runner.kv_cache.dtype == torch.bfloat16
    assert runner.kv_cache.num_blocks == (1 << 20) // block_bytes(runner.config, 16, torch.bfloat16)
    exact, cast = first_logits(folder), first_logits(folder, "bfloat16").float()
    assert torch.nn.functional.cosine_similarity(exact, cast).item() > 0.99


def test_a_tied_model_may_carry_its_head(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    logits = first_logits(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(first_logits(folder), logits)


def test_sizes_of_the_cache() -> None:
    config = ModelConfig.from_folder(TINY)
    assert block_bytes(config, 16, torch.float32) == 2 * 4 * 16 * 4 * 16 * 4
    cache = KVCache(config, 10, 16, torch.bfloat16)
    assert cache.size_bytes == 10 * block_bytes(config, 16, torch.bfloat16)
    assert [list(layer.shape) for layer in cache.layers] == [[2, 10, 16, 4, 16]] * 4
    assert blocks_in(1 << 30, config, 16, torch.float32) == (1 << 30) // 32768
    with pytest.raises(ValueError, match="32767 bytes hold no KV block: one of 16 tokens takes 32768"):
        blocks_in(32767, config, 16, torch.float32)
    with pytest.raises(ValueError, match="exactly one"):
        load_runner(TINY)
    with pytest.raises(ValueError, match="exactly one"):
        load_runner(TINY, num_blocks=3, kv_bytes=1 << 20)


def test_a_cache_in_memory_that_was_given() -> None:
    config = ModelConfig.from_folder(TINY)
    size = storage_bytes(config, 10, 3, torch.bfloat16, 1)
    assert size == 4 * 1920  # 2 * 10 * 3 * 16 * 2 bytes a layer, a multiple of 64
    assert storage_bytes(config, 1, 1, torch.bfloat16, 1) == 4 * 64
    odd = KVCache(replace(config, head_dim=6), 7, 3, torch.bfloat16, kv_heads=1)
    assert odd.size_bytes == 4 * 504 and odd.storage.nbytes == 4 * 512
    assert not any(layer.data_ptr() % 64 for layer in odd.layers)
    memory = torch.full((size + 100,), 255, dtype=torch.uint8)
    asked = []

    def give(wanted: int) -> torch.Tensor:
        asked.append(wanted)
        return memory

    cache = KVCache(config, 10, 3, torch.bfloat16, kv_heads=1, storage=give)
    assert asked == [size] and cache.storage.data_ptr() == memory.data_ptr() and len(cache.storage) == size
    assert all(layer.eq(0).all() for layer in cache.layers) and memory[size:].eq(255).all()
    for layer in cache.layers:
        assert not layer.data_ptr() % 64
        layer.fill_(1.0)
    ones = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).tolist()
    assert memory[:size].view(-1, 2).eq(torch.tensor(ones)).all()  # they are all of it
    for storage, message in (
        (
            torch.empty(size - 1, dtype=torch.uint8),
            f"storage has {size - 1} bytes, the KV blocks take {size}",
        ),
        (torch.empty(size), r"storage is torch.float32 \[7680\]: expected contiguous uint8"),
        (torch.empty(2, size, dtype=torch.uint8), r"\[2, 7680\]: expected contiguous"),
        (torch.empty(2 * size, dtype=torch.uint8)[::2], "expected contiguous"),
        (torch.empty(size + 64, dtype=torch.uint8)[1:], "expected a multiple of 64"),
        (torch.empty(size, dtype=torch.uint8, device="meta"), "storage is on meta, the cache on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            KVCache(config, 10, 3, torch.bfloat16, kv_heads=1, storage=storage)
    runner = load_runner(TINY, num_blocks=4, storage=lambda wanted: torch.empty(wanted, dtype=torch.uint8))
    assert runner.kv_cache.num_blocks == 4 and runner.kv_cache.storage.eq(0).all()


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_the_number_of_blocks_is_that_of_the_rank_with_most_heads(tp: int) -> None:
    config = replace(ModelConfig.from_folder(TINY), q_heads=9, kv_heads=3)
    widest = max(len(shard.kv_heads(9, 3)) for shard in shards(tp))
    assert widest == {1: 3, 2: 2, 3: 1, 4: 2}[tp]
    needed = block_bytes(config, 16, torch.float32, widest)
    assert blocks_in(5 * needed, config, 16, torch.float32, tp) == 5
    assert blocks_in(6 * needed - 1, config, 16, torch.float32, tp) == 5
    with pytest.raises(
        ValueError, match=f"{needed - 1} bytes hold no KV block: one of 16 tokens takes {needed}"
    ):
        blocks_in(needed - 1, config, 16, torch.float32, tp)


def test_fingerprint_names_the_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fingerprint(TINY)
    assert len(name) == 32 and fingerprint(folder) == name
    edit(folder, transformers_version="5.99", _name_or_path="elsewhere")
    (folder / "tokenizer_config.json").unlink()
    assert fingerprint(folder) == name
    edit(folder, rope_theta=10001.0)
    assert fingerprint(folder) != name
    edit(folder, rope_theta=10000.0)

    monkeypatch.setattr("engine.model_config._WHOLE_FILE_BYTES", 1000)  # as if the file were large
    sampled = fingerprint(folder)
    assert sampled == fingerprint(TINY)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert fingerprint(folder) != sampled
    monkeypatch.undo()
    assert fingerprint(folder) != name


def test_every_id_of_the_tiny_model_is_text() -> None:
    fast, auto = Tokenizer.from_file(str(TINY / "tokenizer.json")), AutoTokenizer.from_pretrained(TINY)
    config = ModelConfig.from_folder(TINY)
    assert fast.get_vocab_size() == len(auto) == config.vocab_size
    assert all(fast.decode([token], skip_special_tokens=False) for token in range(config.vocab_size))
    text = "<|user|>Grüße, 世界 😀\n\t two  spaces<|end|>"
    ids = fast.encode(text).ids
    assert ids == auto.encode(text) and fast.decode(ids, skip_special_tokens=False) == text
    assert ids[0] == 259 and ids[-1] == 261 and ids[1:-1] == list(text[8:-7].encode())
    chat = auto.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|bos|><|user|>hi<|end|><|assistant|>"


def test_the_tiny_model_does_not_repeat_itself() -> None:
    runner = load_runner(TINY, num_blocks=10)
    table, tokens, greedy = BlockTable(), list(b"The quick brown fox"), SamplingParams(temperature=0)
    table.extend(list(range(10)))
    tokens += runner.run(StepPlan(0, [Row(0, tokens, table, greedy)])).sampled
    while len(tokens) < 150:
        tokens += runner.run(StepPlan(0, [Row(len(tokens) - 1, tokens[-1:], table, greedy)])).sampled
    assert len(set(tokens[-60:])) > 20


def test_the_script_makes_the_committed_folder(tmp_path: Path) -> None:
    make_tiny_model.main(tmp_path)
    files = sorted(file.name for file in TINY.iterdir())
    assert files == sorted(file.name for file in tmp_path.iterdir())
    assert [name for name in files if (TINY / name).read_bytes() != (tmp_path / name).read_bytes()] == []


_LOAD = """
import json, sys, threading
from pathlib import Path
import torch
from engine.model_config import ModelConfig
from engine.shards import Shard
from engine.weights import load_weights

torch.set_num_threads(1)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

small, large, rank, tp = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
load_weights(small, ModelConfig.from_folder(small), torch.float32)  # what torch itself needs
before, peak, over = anonymous(), 0, threading.Event()
def watch(*_):
    global peak
    peak = max(peak, anonymous())
def watch_packing():
    while not over.wait(0.0005):
        watch()
watcher = threading.Thread(target=watch_packing)
watcher.start()
weights = load_weights(large, ModelConfig.from_folder(large), torch.float32, progress=watch, shard=Shard(rank, tp))
over.set()
watcher.join()
after = anonymous() - before
print(json.dumps([peak - before, after]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 220 MB, nearly all of it in the matrices of its layers and 34 MB in the largest."""
    folder = tmp_path_factory.mktemp("large")
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    edit(folder, hidden_size=512, intermediate_size=8192, num_hidden_layers=3, head_dim=64, vocab_size=16384)
    shapes = {
        "self_attn.q_proj": (512, 512),
        "self_attn.k_proj": (256, 512),
        "self_attn.v_proj": (256, 512),
        "self_attn.o_proj": (512, 512),
        "mlp.gate_proj": (8192, 512),
        "mlp.up_proj": (8192, 512),
        "mlp.down_proj": (512, 8192),
        "input_layernorm": (512,),
        "post_attention_layernorm": (512,),
    }
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.ones(shape)
        for layer in range(3)
        for name, shape in shapes.items()
    }
    tensors |= {f"{name}.weight": torch.ones(16384, 512) for name in ("lm_head", "model.embed_tokens")}
    save_file(tensors | {"model.norm.weight": torch.ones(512)}, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_rank_holds_its_share_and_never_much_more(tp: int, large: Path) -> None:
    """Anonymous memory while loading and after: one share, and the one matrix that is just being packed."""
    size = (large / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(TINY), str(large), str(tp - 1), str(tp)],
        cwd=TINY.parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    peak, after = json.loads(done.stdout)
    share, matrix = size / tp, 2 * 8192 * 512 * 4 / tp
    assert 0.95 * share < after < 1.1 * share
    assert peak < 1.1 * share + matrix  # allocated: 1.3 shares and a whole tensor
