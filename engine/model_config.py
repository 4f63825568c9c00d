"""What a model is: the facts of a Hugging Face folder that the engine needs, checked once, without torch.

Read by the runner, the scheduler's sizing, the transfer layout and the hand-shake. Whatever the decoder cannot compute
exactly is refused here with the key and the value named: a model that loads is a model that is right. How to add a
family: docs/model-families.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config_fields import UnsupportedModel, boolean, integer, number, read_json, refuse, token_ids
from engine.rope_config import RopeConfig, read_rope

__all__ = ["LayerGroup", "ModelConfig", "RopeConfig", "UnsupportedModel", "fingerprint", "weight_files"]

_DTYPES = ("float32", "bfloat16", "float16")
_WHOLE_FILE_BYTES = 64 << 20  # below this every byte of a weight file enters the fingerprint
_SAMPLES, _SAMPLE_BYTES = 256, 64 << 10

# Keys that change the mathematics of a decoder, and the values with which they change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "quantization_config": ({},),
    "compression_config": ({},),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_chunk_size": (),
    "attention_sinks": (False,),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "no_rope_layers": ([],),
    "vision_config": (),
    "text_config": (),
}


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose KV is of one kind: "full" attends to everything before, "window" to the last `window` tokens.

    A query counts among its own window. All groups of a model have its kv_heads, head_dim and dtype for now.
    """

    kind: Literal["full", "window"]
    layers: tuple[int, ...]
    window: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One configurable decoder: pre-norm, RoPE, grouped-query attention, gated MLP (SiLU).

    Families differ only in these fields, so a new one is a function that fills them in (`_FAMILIES`), not a new model.
    `groups` cover each layer once.
    """

    architecture: str
    hidden_size: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    groups: tuple[LayerGroup, ...]
    max_positions: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.q_heads // self.kv_heads

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer how many tokens a query sees, itself included; 0: all."""
        by_layer = {layer: group.window for group in self.groups for layer in group.layers}
        return tuple(by_layer[layer] for layer in range(self.layers))

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Reads config.json and generation_config.json; raises UnsupportedModel, or FileNotFoundError."""
        folder = Path(path)
        raw = read_json(folder / "config.json")
        generation_file = folder / "generation_config.json"
        generation = read_json(generation_file) if generation_file.exists() else {}
        return cls.from_dict(raw, generation)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """The same from the parsed files."""
        architectures = raw.get("architectures") or []
        if len(architectures) != 1 or architectures[0] not in _FAMILIES:
            raise UnsupportedModel(f"architectures={architectures!r}: supported are {sorted(_FAMILIES)}")
        return _FAMILIES[architectures[0]](raw, generation or {})


# --- families -------------------------------------------------------------------------------------------------------


def _llama(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    refuse(raw, "sliding_window", allowed=())
    bias = boolean(raw, "attention_bias", False)
    mlp_bias = boolean(raw, "mlp_bias", False)
    return _decoder(raw, generation, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def _mistral(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    window = None
    if raw.get("sliding_window", 4096) is not None:  # absent is the family's default, null is none
        window = integer(raw, "sliding_window", 4096)
    return _decoder(raw, generation, window=window)


def _qwen2(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    return _decoder(raw, generation, qkv_bias=True, **_qwen_windows(raw))


def _qwen3(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    bias = boolean(raw, "attention_bias", False)
    raw = {"head_dim": 128, **raw}
    return _decoder(raw, generation, qkv_bias=bias, output_bias=bias, qk_norm=True, **_qwen_windows(raw))


def _qwen_windows(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The window, and how many of the first layers are without it unless `layer_types` says it for each."""
    if not boolean(raw, "use_sliding_window", False):
        return {}
    if raw.get("sliding_window", 4096) is None:
        raise UnsupportedModel("use_sliding_window=True without sliding_window")
    first = raw.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise UnsupportedModel(f"max_window_layers={first!r}: expected a number of layers")
    return {"window": integer(raw, "sliding_window", 4096), "first_windowed": first, "mixed": True}


_FAMILIES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}


def _decoder(
    raw: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    window: int | None = None,
    first_windowed: int = 0,
    mixed: bool = False,
) -> ModelConfig:
    """The fields that all families share, checked. `mixed`: `layer_types` may choose which layers have the window."""
    for key, harmless in _UNSUPPORTED.items():
        refuse(raw, key, harmless)
    hidden, q_heads, layers = (
        integer(raw, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    kv_heads = integer(raw, "num_key_value_heads", q_heads)
    if q_heads % kv_heads:
        raise UnsupportedModel(
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={q_heads}"
        )
    if raw.get("head_dim") is None and hidden % q_heads:
        raise UnsupportedModel(f"hidden_size={hidden} is no multiple of num_attention_heads={q_heads}")
    head_dim = integer(raw, "head_dim", hidden // q_heads)
    if head_dim % 2:
        raise UnsupportedModel(f"head_dim={head_dim} is odd; rotary embedding needs pairs")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        raise UnsupportedModel(f"dtype={dtype!r}: supported are {_DTYPES}")
    rope, max_positions = read_rope(raw, integer(raw, "max_position_embeddings"))
    eos_in = generation if generation.get("eos_token_id") is not None else raw
    return ModelConfig(
        architecture=raw["architectures"][0],
        hidden_size=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=integer(raw, "intermediate_size"),
        vocab_size=integer(raw, "vocab_size"),
        rms_eps=number(raw, "rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=boolean(raw, "tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        groups=_groups(_layer_types(raw, layers, window, first_windowed, mixed), window or 0, max_positions),
        max_positions=max_positions,
        eos_token_ids=token_ids(eos_in, "eos_token_id"),
        bos_token_id=next(iter(token_ids(raw, "bos_token_id")), None),
        dtype=dtype,
    )


def _layer_types(
    raw: Mapping[str, Any], layers: int, window: int | None, first_windowed: int, mixed: bool
) -> list[str]:
    """The kind of each layer in the words of config.json: as `layer_types` says, else by the family's rule."""
    expected = [
        "sliding_attention" if window is not None and layer >= first_windowed else "full_attention"
        for layer in range(layers)
    ]
    given = raw.get("layer_types")
    if given is None or given == expected:
        return expected
    allowed = {"full_attention", "sliding_attention"} if mixed else set(expected)
    if not isinstance(given, list) or len(given) != layers or not set(given) <= allowed:
        raise UnsupportedModel(
            f"layer_types={given!r}: expected {layers} of {sorted(allowed)}, given sliding_window={window}"
        )
    return given


def _groups(types: list[str], window: int, max_positions: int) -> tuple[LayerGroup, ...]:
    """One group of each kind that occurs; a window that no sequence can outgrow is none."""
    windowed = tuple(
        layer for layer, kind in enumerate(types) if kind == "sliding_attention" and window < max_positions
    )
    full = tuple(layer for layer in range(len(types)) if layer not in windowed)
    groups = [LayerGroup("full", full)] if full else []
    if windowed:
        groups.append(LayerGroup("window", windowed, window))
    return tuple(groups)


# --- identity -------------------------------------------------------------------------------------------------------


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a folder, by name: the single file, or the shards that the index names."""
    folder = Path(path)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise UnsupportedModel(
            f"{folder}: neither {single.name} nor {index.name}; only safetensors weights are read"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedModel(f"{index}: weight_map is missing or empty")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UnsupportedModel(f"{index} names shards that are not there: {missing}")
    return files


def fingerprint(path: str | Path) -> str:
    """Names the model's numbers: 32 hex digits, equal on every host that has the same config and the same weights.

    Config keys that say only who wrote the file are left out. A weight file enters with its size, its header and its
    content: whole when small, otherwise evenly spaced samples (a fine-tune changes nearly all of it).
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    for provenance in ("transformers_version", "_name_or_path"):
        config.pop(provenance, None)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE_FILE_BYTES:
                while block := stream.read(1 << 20):
                    digest.update(block)
                continue
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header_bytes, _WHOLE_FILE_BYTES)))
            for sample in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
