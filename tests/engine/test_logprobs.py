"""Log-probabilities of answers and prompts are those of transformers' model, however the engine went about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.api import Logprobs, SamplingParams
from engine.logprobs import logprobs_of
from tests.conftest import Reference
from tests.support.local_engine import LocalEngine

TOLERANCE = 1e-4
Distribution = Callable[[list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def distribution(reference: Reference) -> Distribution:
    """Log-probabilities [tokens, vocab] after each token of a text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reference.folder, dtype=torch.float32).eval()

    def of(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)

    return of


def check(found: Logprobs, tokens: list[int], expected: torch.Tensor, top: int) -> None:
    """`found` are those of `tokens` under expected [tokens, vocab], with the `top` likeliest of each."""
    assert len(found.chosen) == len(tokens) and found.width == (top if tokens else 0)
    own = expected.gather(1, torch.tensor(tokens).unsqueeze(1))[:, 0]
    assert torch.allclose(torch.tensor(found.chosen), own, atol=TOLERANCE)
    ids = torch.tensor(found.top_ids).view(len(tokens), top)
    assert torch.allclose(
        torch.tensor(found.top).view(len(tokens), top), expected.gather(1, ids), atol=TOLERANCE
    )
    best = expected.topk(top, -1).values
    assert torch.allclose(expected.gather(1, ids), best, atol=TOLERANCE)


@pytest.mark.parametrize("top", [0, 5])
def test_of_the_answer(reference: Reference, distribution: Distribution, top: int) -> None:
    """Of the model's own distribution, whatever temperature and penalties did; beside rows that ask for nothing."""
    shaped = SamplingParams(
        temperature=0.7, seed=3, max_tokens=12, logprobs=top, repetition_penalty=1.5, top_k=9
    )
    plain = SamplingParams(temperature=0, max_tokens=12, logprobs=top)
    silent = SamplingParams(temperature=0.7, seed=3, max_tokens=12)
    asked = [
        (prompt, (shaped, plain, silent)[at % 3], 1) for at, prompt in enumerate(reference.prompts[4:13])
    ]
    engine = LocalEngine(reference.folder, budget=96)
    for (prompt, params, _), outcome in zip(asked, engine.answer(asked), strict=True):
        (ids,) = outcome.choices
        if params is silent:
            assert not outcome.logprobs[0].chosen
        else:
            expected = distribution(prompt + ids)[len(prompt) - 1 : -1]
            check(outcome.logprobs[0], ids, expected, top)


@pytest.mark.parametrize("budget", [7, 64, 2048])
@pytest.mark.parametrize("n", [1, 3])
def test_of_the_prompt(reference: Reference, distribution: Distribution, budget: int, n: int) -> None:
    """In chunks of any size, never from the prefix cache though the prompts are in it."""
    engine = LocalEngine(reference.folder, budget=budget, max_running=4)
    prompts = [reference.prompts[at] for at in (0, 1, 3, 7, 11)]
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=3, logprobs=1)
    for _ in range(2):
        outcomes = engine.answer([(prompt, params, n) for prompt in prompts])
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            expected = distribution(prompt + outcome.choices[0])
            check(outcome.prompt, prompt[1:], expected[: len(prompt) - 1], 3)
            check(outcome.logprobs[n - 1], outcome.choices[n - 1], expected[len(prompt) - 1 : -1], 1)
            assert outcome.trace is not None and not outcome.trace.cached_tokens
    # Yet what it computed is there for others.
    (cached,) = engine.answer([(prompts[-1], SamplingParams(temperature=0, max_tokens=1), 1)])
    assert cached.trace is not None and cached.trace.cached_tokens


def test_of_the_prompt_when_preempted(reference: Reference, distribution: Distribution) -> None:
    """What was told before a preemption is not told again."""
    engine = LocalEngine(reference.folder, blocks=36, budget=100, max_running=8)
    params = SamplingParams(temperature=0, max_tokens=60, prompt_logprobs=1)
    prompts = [reference.prompts[at] for at in (9, 10, 11, 9, 10)]
    outcomes = engine.answer([(prompt, params, 1) for prompt in prompts])
    assert engine.role.scheduler.preemptions > 0
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        check(outcome.prompt, prompt[1:], distribution(prompt)[:-1], 1)


def test_few_logits_at_once(
    reference: Reference, distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's logits are never all held at once."""
    held: list[int] = []

    def counted(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> Logprobs:
        held.append(len(logits))
        return logprobs_of(logits, tokens, top)

    monkeypatch.setattr("engine.logprobs.SCORE_BYTES", 4 * 320 * 10)
    monkeypatch.setattr("engine.logprobs.logprobs_of", counted)
    engine = LocalEngine(reference.folder, budget=2048)
    prompt = reference.prompts[9]
    (outcome,) = engine.answer([(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2), 1)])
    check(outcome.prompt, prompt[1:], distribution(prompt)[:-1], 2)
    assert max(held) == 10 and sum(held) == len(prompt) - 1
