"""The runner with all kernels against the runner without, step by step: chunks, decodes, windows, norms, draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.api import SamplingParams
from engine.attention import Rows
from engine.gpu_plan import GpuPlanner, Upload
from engine.kv_cache import KVCache
from engine.model_config import ModelConfig
from engine.plan import BlockTable, Row, StepPlan
from engine.runner import Runner, load_runner
from tests.support import families

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

FAMILIES = {"llama": {}, "qwen3, tied, windows by layer": {"sliding_window": 12}}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make_model(tmp_path_factory.mktemp("family"), request.param, **FAMILIES[request.param])


def runners(folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> tuple[Runner, Runner]:
    """One with kernels, one without; of equal weights and caches."""
    made = []
    for kernels in (True, False):
        monkeypatch.setattr("engine.runner._has_kernels", lambda device, kernels=kernels: kernels)
        made.append(load_runner(folder, "float32", num_blocks=40, block_size=8, device=str(device)))
    return made[0], made[1]


def table(*blocks: int) -> BlockTable:
    made = BlockTable()
    made.extend(list(blocks))
    return made


def steps() -> list[StepPlan]:
    """Three sequences: a long one in two chunks, a short one, and one that begins when the others already decode."""
    long, short, late = families.prompts([40, 10, 5])
    tables = table(*range(30, 24, -1)), table(3, 9), table(12)
    how = [
        SamplingParams(temperature=t, top_k=k, top_p=p, seed=k)
        for t, k, p in ((0.9, 0, 0.8), (1.5, 9, 1.0), (0, 0, 1))
    ]

    def row(which: int, tokens: list[int], first: int, count: int, draws: bool = True) -> Row:
        return Row(first, tokens[first : first + count], tables[which], how[which] if draws else None)

    return [
        StepPlan(1, [row(0, long, 0, 30, draws=False)]),
        StepPlan(2, [row(1, short, 0, 9), row(0, long, 30, 8)]),
        StepPlan(3, [row(1, short, 9, 1), row(0, long, 38, 1), row(2, late, 0, 4)]),
        StepPlan(4, [row(2, late, 4, 1), row(0, long, 39, 1)]),
    ]


def test_every_step_computes_what_the_plain_runner_does(
    folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = runners(folder, device, monkeypatch)
    assert fused._gpu is not None and plain._gpu is None
    for plan in steps():
        got, expected = fused.logits(plan), plain.logits(plan)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
        assert expected.abs().max() > 0.3
    for ours, theirs in zip(fused.kv_cache.layers, plain.kv_cache.layers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for plan in steps()[2:]:
        sampled = fused.run(plan).sampled
        assert sampled == plain.run(plan).sampled and min(sampled) >= 0


def test_what_does_not_fit_is_refused(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, _ = runners(families.make_model(tmp_path, "llama"), device, monkeypatch)
    with pytest.raises(IndexError, match="ends at 17, its table has 2 blocks of 8"):
        fused.run(StepPlan(1, [Row(16, [5], table(1, 2), None)]))
    longest = min(ModelConfig.from_folder(tmp_path).max_positions, 40 * 8)
    with pytest.raises(IndexError, match=f"position {longest}: the model has {longest}"):
        fused.run(StepPlan(1, [Row(longest, [5], table(*range(40), 1), None)]))
    with pytest.raises(IndexError, match="token id 320 is outside the vocabulary"):
        fused.run(StepPlan(1, [Row(0, [320], table(1), None)]))


def test_a_plan_says_where_everything_is(device: torch.device) -> None:
    """Two decode rows, the second beyond a split and its window, then two spans."""
    config = ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        | {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9, "max_position_embeddings": 900}
    )
    cache = KVCache(config, 100, 8, torch.float32, device)
    tables = [np.arange(width, dtype=np.int32)[::-1].copy() for width in (2, 80, 1, 9)]
    rows = Rows([3, 600, 0, 60], [1, 1, 5, 7], tables, 2, 8)
    positions = np.concatenate(
        [start + np.arange(count) for start, count in zip(rows.starts, rows.counts, strict=True)]
    )
    planner = GpuPlanner(cache, 4, [0, 100, 0])
    plan = planner.plan(np.arange(14), positions, rows, np.array([1, 13]))
    slots = [
        8 * int(tables[row][p // 8]) + p % 8
        for row, p in zip([0, 1, *[2] * 5, *[3] * 7], positions, strict=True)
    ]
    assert plan.slots.tolist() == slots and plan.positions.tolist() == positions.tolist()
    assert plan.tokens.tolist() == list(range(14)) and plan.lengths.tolist() == [4, 601]
    assert plan.wanted is not None and plan.wanted.tolist() == [1, 13]
    for found, each in ((plan.decode_tables, tables[:2]), (plan.span_tables, tables[2:])):
        begins = found.starts.tolist()
        assert len(begins) == 2
        for begin, table_of_row in zip(begins, each, strict=True):
            assert found.blocks[begin : begin + len(table_of_row)].tolist() == table_of_row.tolist()
    assert plan.spans.starts.tolist() == [0, 60] and plan.spans.firsts.tolist() == [2, 7, 14]
    assert sorted(plan.spans.tiles.tolist()) == [[0, 0], [1, 0]]
    assert sorted(plan.parts) == [0, 100]
    assert plan.parts[0].firsts.tolist() == [0, 1, 4] and plan.parts[0].rows[:4].tolist() == [0, 1, 1, 1]
    assert plan.parts[100].firsts.tolist() == [0, 1, 3] and plan.parts[100].rows[:3].tolist() == [0, 1, 1]
    assert len(plan.partials.values) >= 4
    nothing = planner.plan(
        np.zeros(0, np.int64), np.zeros(0, np.int64), Rows([], [], [], 0, 8), np.zeros(0, np.int64)
    )
    assert nothing.wanted is None and len(nothing.spans.tiles) == 0


def test_sections_stay_where_they_are_while_the_last_one_grows(device: torch.device) -> None:
    upload = Upload(device)
    seen = []
    for step, length in enumerate((5, 50_000, 1)):
        arrays = [np.arange(3) + step, np.full((2, 3), step), np.arange(length)]
        sent = upload(arrays)
        assert all(torch.equal(a.cpu(), torch.from_numpy(b).int()) for a, b in zip(sent, arrays, strict=True))
        seen.append([tensor.data_ptr() for tensor in sent])
        assert all(place % 16 == 0 for place in seen[-1])
    assert seen[0] == seen[1] == seen[2]
