"""Priorities: who is admitted first, who gives way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.api import RequestKey, SamplingParams
from engine.ledger import BlockLedger
from engine.plan import StepResult
from engine.scheduler import Limits, Scheduler
from engine.sequence import Phase, Sequence
from engine.waiting import WaitingQueue


def _sequence(number: int, priority: int, tokens: int = 4, answer: int = 50) -> Sequence:
    prompt = [number * 100 + at for at in range(tokens)]
    sequence = Sequence(RequestKey(1, number), prompt, SamplingParams(max_tokens=answer))
    sequence.priority = priority
    return sequence


def _step(scheduler: Scheduler) -> list[Sequence]:
    plan = scheduler.schedule()
    assert plan is not None
    ran = list(scheduler.planned)
    scheduler.commit(plan, StepResult([7] * len(plan.rows)))
    return ran


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["add", "add", "take", "discard"])), max_size=60)
)
def test_the_queue_is_a_sorted_list(events: list[tuple[int, str]]) -> None:
    queue = WaitingQueue()
    naive: list[Sequence] = []
    for number, (priority, what) in enumerate(events):
        if what == "add":
            sequence = _sequence(number, priority)
            sequence.arrival = number
            queue.add(sequence)
            naive.append(sequence)
        elif naive:
            naive.sort(key=lambda one: (one.priority, one.arrival))
            victim = naive[0] if what == "take" else naive[number % len(naive)]
            if what == "take":
                assert queue.first() is victim
            assert queue.discard(victim)
            assert not queue.discard(victim)
            naive.remove(victim)
        assert len(queue) == len(naive)
        assert queue.first() is min(naive, key=lambda one: (one.priority, one.arrival), default=None)


def test_urgent_ones_are_admitted_first_and_equals_in_order() -> None:
    scheduler = Scheduler(BlockLedger(100, 4), Limits(4, 8))
    late, urgent, first = _sequence(1, 1), _sequence(2, 0), _sequence(3, 1)
    for sequence in (late, first, urgent):
        scheduler.add(sequence)
    order = [_step(scheduler)[-1] for _ in range(3)]
    assert order == [urgent, late, first]


def test_an_urgent_newcomer_preempts_a_less_urgent_one_and_only_that() -> None:
    scheduler = Scheduler(BlockLedger(100, 4), Limits(64, 2))
    calm, middle = _sequence(1, 5), _sequence(2, 1)
    scheduler.add(calm)
    scheduler.add(middle)
    assert len(_step(scheduler)) == 2
    urgent, equal = _sequence(3, 0), _sequence(4, 1)
    scheduler.add(equal)
    scheduler.add(urgent)
    assert set(_step(scheduler)) == {middle, urgent}
    assert calm.phase is Phase.WAITING and calm.preemptions == 1
    assert set(_step(scheduler)) == {middle, urgent}  # `equal` waits: it is no more urgent than `middle`
    scheduler.remove(urgent)
    assert set(_step(scheduler)) == {middle, equal}


def test_short_of_blocks_the_least_urgent_gives_way_whoever_came_first() -> None:
    ledger = BlockLedger(4, 4)
    scheduler = Scheduler(ledger, Limits(64, 8))
    calm, urgent = _sequence(1, 9, tokens=7), _sequence(2, 0, tokens=7)
    scheduler.add(calm)
    scheduler.add(urgent)
    while not calm.preemptions:
        _step(scheduler)
        assert not urgent.preemptions
    ledger.check()


def test_a_prefill_worker_never_takes_blocks_away() -> None:
    """Writes in flight may read them."""
    scheduler = Scheduler(BlockLedger(100, 4), Limits(4, 1), urgent_preempts=False)
    calm = _sequence(1, 9, tokens=12)
    scheduler.add(calm)
    _step(scheduler)
    scheduler.add(_sequence(2, 0))
    assert _step(scheduler) == [calm]
