"""n > 1: every choice is what a single request with that choice would answer, and the prompt is computed once."""

from __future__ import annotations

import msgspec
import pytest

from engine.api import Cancel, RequestEnd, RequestKey, SamplingParams, StepOutput, Submit
from tests.conftest import Reference
from tests.support.local_engine import LocalEngine

N = 4
SAMPLED = SamplingParams(temperature=0.9, seed=21, max_tokens=20, stop_token_ids=(5, 9, 40), logprobs=2)


def singles(engine: LocalEngine, prompt: list[int], sampling: SamplingParams = SAMPLED) -> list[list[int]]:
    asked = [msgspec.structs.replace(sampling, choice=choice) for choice in range(N)]
    return [engine.generate([(prompt, one)])[0] for one in asked]


@pytest.mark.parametrize("budget", [5, 64, 2048])
def test_choices_are_single_requests(reference: Reference, budget: int) -> None:
    """Alone, then from the prefix cache, then all prompts together; each with n choices."""
    expected = LocalEngine(reference.folder)
    answers = [singles(expected, prompt) for prompt in reference.prompts[:10]]
    assert all(len({tuple(choice) for choice in choices}) == N for choices in answers)
    engine = LocalEngine(reference.folder, budget=budget)
    for prompt, choices in zip(reference.prompts, answers, strict=False):
        for _ in range(2):
            (outcome,) = engine.answer([(prompt, SAMPLED, N)])
            assert outcome.choices == choices
            assert [len(each.chosen) for each in outcome.logprobs] == [len(ids) for ids in choices]
    together = LocalEngine(reference.folder, budget=budget)
    outcomes = together.answer([(prompt, SAMPLED, N) for prompt in reference.prompts[:10]])
    assert [outcome.choices for outcome in outcomes] == answers


def test_the_prompt_is_computed_once_and_shared(reference: Reference) -> None:
    """A prompt of 129 tokens: 8 full blocks are shared, none is copied; of 128: 7, and the eighth is copied."""
    for prompt, copies in ((reference.prompts[11], 0), (reference.prompts[10], N)):
        engine = LocalEngine(reference.folder)
        submit = Submit(request=RequestKey(1, 1), request_id="", prompt=prompt, sampling=SAMPLED, n=N)
        engine.role.handle(submit, 0.0)
        plan = engine.role.schedule(0.0)
        assert plan is not None and plan.token_count == len(prompt) - 1 and not plan.copies
        engine.role.commit(plan, engine.runner.run(plan), 0.0)
        plan = engine.role.schedule(0.0)
        assert plan is not None and plan.token_count == N and len(plan.copies) == copies
        sources = {source for source, _ in plan.copies}
        assert len(sources) <= 1 and len({target for _, target in plan.copies}) == copies
        # Shared blocks, the copies or the first own blocks, and the source while the copy may be under way.
        assert engine.ledger.held == (len(prompt) - 1) // 16 + N + len(sources)
        engine.role.commit(plan, engine.runner.run(plan), 0.0)
        assert engine.ledger.held == (len(prompt) - 1) // 16 + N
        engine.role.handle(Cancel(submit.request), 0.0)
        engine.role.check()
        assert engine.role.at_rest and not engine.ledger.held


def test_preempted_choices(reference: Reference) -> None:
    """Too few blocks for all choices: they preempt each other, recompute, and say the same."""
    sampling = msgspec.structs.replace(SAMPLED, max_tokens=60, stop_token_ids=())
    prompts = [reference.prompts[at] for at in (8, 9, 7, 5)]
    expected = LocalEngine(reference.folder)
    answers = [singles(expected, prompt, sampling) for prompt in prompts]
    for blocks in (12, 13, 17, 22):
        engine = LocalEngine(reference.folder, blocks=blocks, budget=64)
        outcomes = engine.answer([(prompt, sampling, N) for prompt in prompts[-1:] + prompts])
        assert [outcome.choices for outcome in outcomes] == answers[-1:] + answers
        assert engine.role.scheduler.preemptions > 0
    assert engine.copies


def test_cancel_ends_all_choices_at_any_moment(reference: Reference) -> None:
    prompt = reference.prompts[12]
    for steps in range(9):
        engine = LocalEngine(reference.folder, budget=100, max_running=2)
        submit = Submit(request=RequestKey(1, 1), request_id="", prompt=prompt, sampling=SAMPLED, n=N)
        engine.role.handle(submit, 0.0)
        for _ in range(steps):
            plan = engine.role.schedule(0.0)
            assert plan is not None
            engine.role.commit(plan, engine.runner.run(plan), 0.0)
        engine.role.drain()
        engine.role.handle(Cancel(submit.request), 0.0)
        (end,) = engine.role.drain()
        assert isinstance(end, RequestEnd) and end.reason == "cancelled" and not end.more
        assert engine.role.at_rest
        engine.role.check()


def test_cancel_while_the_copy_is_under_way(reference: Reference) -> None:
    """The source of a copy stays held until the step was committed."""
    engine = LocalEngine(reference.folder)
    prompt = reference.prompts[10]
    submit = Submit(request=RequestKey(1, 1), request_id="", prompt=prompt, sampling=SAMPLED, n=N)
    engine.role.handle(submit, 0.0)
    plan = engine.role.schedule(0.0)
    assert plan is not None
    engine.role.commit(plan, engine.runner.run(plan), 0.0)
    plan = engine.role.schedule(0.0)
    assert plan is not None and plan.copies
    result = engine.runner.run(plan)
    engine.role.handle(Cancel(submit.request), 0.0)
    assert engine.ledger.held == 1
    engine.role.commit(plan, result, 0.0)
    assert not engine.ledger.held
    (*_, last) = engine.role.drain()
    assert isinstance(last, StepOutput) and not last.tokens and not last.ends
    engine.role.check()


def test_choices_that_end_at_different_times(reference: Reference) -> None:
    """One end for each choice, the last with the trace; usage of blocks shrinks with each."""
    engine = LocalEngine(reference.folder)
    prompt = reference.prompts[6]
    stops = tuple(range(3, 60))
    sampling = msgspec.structs.replace(SAMPLED, stop_token_ids=stops, max_tokens=50)
    (outcome,) = engine.answer([(prompt, sampling, 8)])
    assert len({len(ids) for ids in outcome.choices}) > 2
    for choice, ids in enumerate(outcome.choices):
        assert (outcome.reasons[choice] == "stop") == (ids[-1] in stops)
