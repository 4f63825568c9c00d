"""A model over several ranks is the same model: real processes, sums over shared memory, transformers as the judge."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.api import SamplingParams
from engine.collective import RankStuck, SharedMemory
from engine.plan import BlockTable, Row, StepPlan
from engine.runner import Runner, load_runner
from tests.support import families
from tests.support.local_engine import LocalEngine, Outcome
from tests.support.models import transformers_greedy
from tests.support.ranks import RankProcesses

torch.set_num_threads(1)

LARGEST = 4
TOKENS = 24
LENGTHS = [1, 20, 65, 230]
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS)
UNEVEN: dict[str, Any] = {"intermediate_size": 131, "vocab_size": 323}


@dataclass
class Case:
    family: str
    tps: tuple[int, ...]
    changes: dict[str, Any]


def _heads(q_heads: int, kv_heads: int) -> dict[str, Any]:
    return {"num_attention_heads": q_heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * q_heads}


CASES = {
    "llama with all biases, kv heads split and replicated": Case("llama", (2, 4), {}),
    "llama, 9 heads over 3": Case("llama", (2, 3, 4), {**_heads(9, 3), **UNEVEN}),
    "qwen2, biases, tied, 14 heads over 2": Case("qwen2, tied", (3, 4), {**_heads(14, 2), **UNEVEN}),
    "qwen3, tied, windows by layer, 8 heads over 2": Case(
        "qwen3, tied, windows by layer", (2, 4), {**_heads(8, 2), **UNEVEN}
    ),
    "qwen3, 6 heads over 2, uneven groups with norms": Case("qwen3", (4,), _heads(6, 2)),
    "mistral's window, as many kv heads": Case(
        "mistral", (3,), {"num_key_value_heads": 4, "hidden_size": 96}
    ),
}


@pytest.fixture(scope="module")
def processes() -> Iterator[RankProcesses]:
    group = RankProcesses(LARGEST)
    yield group
    group.close()


def first_logits(runner: Runner, prompts: list[list[int]]) -> torch.Tensor:
    """After each prompt, all computed in one step."""
    rows, used = [], 0
    for prompt in prompts:
        table = BlockTable()
        count = -(-len(prompt) // runner.kv_cache.block_size)
        table.extend(list(range(used, used + count)))
        used += count
        rows.append(Row(0, prompt, table, GREEDY))
    return runner.logits(StepPlan(0, rows))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_one_rank_and_tokens_those_of_transformers(
    name: str, processes: RankProcesses, tmp_path: Path
) -> None:
    case = CASES[name]
    folder = families.make_model(tmp_path, case.family, **case.changes)
    prompts = families.prompts(LENGTHS)
    answers = transformers_greedy(folder, prompts, TOKENS)
    assert all(len(set(answer)) > 5 for answer in answers), "a model that repeats itself shows no faults"
    alone = first_logits(load_runner(folder, "float32", num_blocks=64), prompts)
    for tp in case.tps:
        runner = processes.open(folder, tp, num_blocks=64)
        torch.testing.assert_close(first_logits(runner, prompts), alone, atol=1e-4, rtol=1e-4)
        # Chunks of 48 tokens beside decodes, so that most steps mix them and some draw nothing at all.
        engine = LocalEngine(folder, blocks=64, budget=48, runner=runner)
        assert engine.generate([(prompt, GREEDY) for prompt in prompts]) == answers


def test_everything_asked_of_rank_0_alone(
    processes: RankProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties, biases, draws, log-probabilities of answers and prompts, the latter a few rows at a time, forks,
    preemption.
    """
    monkeypatch.setattr("engine.logprobs.SCORE_BYTES", 4 * 323 * 7)  # here; there: _seven_rows_at_a_time
    folder = families.make_model(tmp_path, "llama", **_heads(9, 3), **UNEVEN)
    prompts = families.prompts([70, 3, 33, 18, 90])
    shaped = SamplingParams(
        temperature=0.7, seed=3, max_tokens=TOKENS, repetition_penalty=1.3, presence_penalty=0.4, logit_bias=((7, 2.0),)
    )  # fmt: skip
    asked = [
        (prompts[0], shaped, 1),
        (prompts[1], SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=TOKENS), 3),
        (prompts[2], SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=4), 1),
        (
            prompts[3],
            SamplingParams(temperature=1.0, top_k=30, min_p=0.01, seed=8, max_tokens=40, logprobs=0),
            1,
        ),
        (prompts[4], SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=3), 1),
    ]
    expected = LocalEngine(folder, blocks=14, budget=64).answer(asked)
    for tp in (2, 4):
        runner = processes.open(folder, tp, num_blocks=14)
        runner.ask(_seven_rows_at_a_time)
        engine = LocalEngine(folder, blocks=14, budget=64, runner=runner)
        for got, wanted in zip(engine.answer(asked), expected, strict=True):
            assert got.choices == wanted.choices and got.reasons == wanted.reasons
            for ours, theirs in zip(_logprobs(got), _logprobs(wanted), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert engine.copies and engine.role.scheduler.preemptions


def _seven_rows_at_a_time(_: Runner) -> None:
    """How many rows the head is called for must be the same on all ranks."""
    import engine.logprobs

    engine.logprobs.SCORE_BYTES = 4 * 323 * 7


def _logprobs(outcome: Outcome) -> list[torch.Tensor]:
    each = [*outcome.logprobs, outcome.prompt]
    return [torch.tensor(numbers) for found in each for numbers in (found.chosen, found.top)]


def _sizes(runner: Runner) -> tuple[int, int, int]:
    return runner.kv_cache.kv_heads, runner.kv_cache.num_blocks, runner.kv_cache.size_bytes


def test_as_many_blocks_on_all_ranks_though_some_store_more(processes: RankProcesses, tmp_path: Path) -> None:
    """9 heads over 3 on 4 ranks: ranks with two query heads store one or two kv heads."""
    folder = families.make_model(tmp_path, "llama", **_heads(9, 3))
    runner = processes.open(folder, 4, kv_bytes=1_000_000, block_size=8)
    sizes = runner.ask(_sizes)
    assert [heads for heads, *_ in sizes] == [1, 2, 1, 1]
    block = 2 * 3 * 8 * 24 * 4
    assert {blocks for _, blocks, _ in sizes} == {1_000_000 // (2 * block)}
    assert [size for *_, size in sizes] == [heads * blocks * block for heads, blocks, _ in sizes]


def test_bfloat16_is_near(processes: RankProcesses, tmp_path: Path) -> None:
    folder = families.make_model(tmp_path, "qwen3")
    prompts = families.prompts([5, 60, 130])
    exact = first_logits(load_runner(folder, "float32", num_blocks=32), prompts)
    near = first_logits(processes.open(folder, 3, "bfloat16", num_blocks=32), prompts)
    assert near.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, near.float(), dim=1).min() > 0.995


def test_an_error_in_the_plan_is_everybodys_and_the_group_lives(
    processes: RankProcesses, tmp_path: Path
) -> None:
    folder = families.make_model(tmp_path, "llama")
    runner = processes.open(folder, 2, num_blocks=8)
    table = BlockTable()
    table.extend([0])
    for tokens in ([5, 320], [-1], [5] * 17):
        runner.tell("run", StepPlan(0, [Row(0, tokens, table, GREEDY)]))
        with pytest.raises(AssertionError, match="IndexError"):
            runner.answers()
        with pytest.raises(IndexError):
            Runner.run(runner, StepPlan(0, [Row(0, tokens, table, GREEDY)]))
    assert len(first_logits(runner, [[5, 6]])) == 1


def test_what_cannot_work_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    folder = families.make_model(tmp_path, "llama")
    descriptor = SharedMemory.create(5)
    rank = SharedMemory(descriptor, 0, 5, 1.0)
    os.close(descriptor)
    with pytest.raises(ValueError, match="tensor_parallel=5 is more than the model's 4 query heads"):
        load_runner(folder, num_blocks=4, collective=rank)
    with pytest.raises(ValueError, match="device='cuda': shared memory is for ranks on CPUs"):
        load_runner(folder, num_blocks=4, collective=rank, device="cuda")
    rank.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_in_a_step_ends_it_for_the_others(how: signal.Signals, tmp_path: Path) -> None:
    folder = families.make_model(tmp_path, "llama")
    group = RankProcesses(3)
    try:
        runner = group.open(folder, 3, num_blocks=32)
        first_logits(runner, [[5, 6, 7]])
        group.mine[3].timeout_s = 3.0  # rank 1 would wait for a minute, were it not told
        os.kill(group.processes[1].pid or 0, how)
        with pytest.raises(RankStuck, match="rank 0 of 3 waited 3 s for rank 2"):
            first_logits(runner, [[5, 6, 7]])
        assert group.connections[0].poll(30)  # rank 1 was told
        assert "GroupAborted: rank 0: rank 0 of 3 waited 3 s for rank 2" in group.connections[0].recv()[0]
    finally:
        group.close()
