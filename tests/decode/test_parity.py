"""The same tokens as transformers, however the engine goes about it: alone, batched, chunked, cached, preempted."""

from __future__ import annotations

import pytest

from engine.api import SamplingParams
from tests.conftest import Reference
from tests.support.local_engine import LocalEngine
from tests.support.models import REFERENCE_TOKENS

GREEDY = SamplingParams(temperature=0.0, max_tokens=REFERENCE_TOKENS)


@pytest.mark.parametrize("budget", [16, 128, 2048])
def test_together_and_chunked(reference: Reference, budget: int) -> None:
    """All prompts at once under a budget of tokens: prompts are cut into chunks and mixed with decodes."""
    engine = LocalEngine(reference.folder, budget=budget)
    assert engine.generate([(prompt, GREEDY) for prompt in reference.prompts]) == reference.answers


def test_alone_then_cached(reference: Reference) -> None:
    """Each prompt by itself, then again: the second time from the prefix cache, full blocks and a partial one."""
    engine = LocalEngine(reference.folder)
    for prompt, answer in zip(reference.prompts, reference.answers, strict=True):
        assert engine.generate([(prompt, GREEDY)]) == [answer]
        before = engine.role.counters["cached_tokens"]
        assert engine.generate([(prompt, GREEDY)]) == [answer]
        cached = engine.role.counters["cached_tokens"] - before
        assert cached == (len(prompt) - 1) // 16 * 16


def test_prefix_shared_in_part(reference: Reference) -> None:
    """A prompt whose beginning was another prompt's: its blocks are shared up to the last full common one."""
    engine = LocalEngine(reference.folder)
    prompt, answer = reference.prompts[-1], reference.answers[-1]
    engine.generate([(prompt[:1000], GREEDY)])
    before = engine.role.counters["cached_tokens"]
    assert engine.generate([(prompt, GREEDY)]) == [answer]
    assert engine.role.counters["cached_tokens"] - before == 1000 // 16 * 16


def test_preempted(reference: Reference) -> None:
    """Too few blocks for all: decodes preempt each other, recompute, and say the same."""
    engine = LocalEngine(reference.folder, blocks=110, budget=256)
    assert engine.generate([(prompt, GREEDY) for prompt in reference.prompts]) == reference.answers
    assert engine.role.scheduler.preemptions > 0


def test_seeded_sampling_is_the_same_in_every_way(reference: Reference) -> None:
    """Noise depends on seed and position only, so batching, chunking, caching and preemption change nothing."""
    asked = [
        (prompt, SamplingParams(temperature=0.9, top_p=0.95, top_k=50 * (i % 2), seed=i, max_tokens=24))
        for i, prompt in enumerate(reference.prompts)
    ]
    alone = LocalEngine(reference.folder)
    expected = [alone.generate([one])[0] for one in asked]
    assert len({tuple(answer) for answer in expected}) == len(expected)
    assert [alone.generate([one])[0] for one in asked] == expected  # cached
    for engine in (
        LocalEngine(reference.folder, budget=16),
        LocalEngine(reference.folder, budget=2048),
        LocalEngine(reference.folder, blocks=110, budget=256),
    ):
        assert engine.generate(asked) == expected


def test_stop_tokens_and_lengths(reference: Reference) -> None:
    engine = LocalEngine(reference.folder)
    prompt, answer = reference.prompts[5], reference.answers[5]
    stop = answer[10]
    expected = answer[: answer.index(stop) + 1]
    assert engine.generate(
        [(prompt, SamplingParams(temperature=0, max_tokens=64, stop_token_ids=(stop,)))]
    ) == [expected]
    assert engine.generate([(prompt, SamplingParams(temperature=0, max_tokens=1))]) == [answer[:1]]
