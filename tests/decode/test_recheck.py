"""What the decode worker does with the router's estimates: it checks again with exact numbers, and learns from ends."""

from __future__ import annotations

import pytest

from engine.api import Costs, StepCosts
from engine.costs import StepModel
from kvtransfer.messages import Abort, Begin, Done
from tests.decode.desk import Desk, prompt_of

QUICK = Costs(step=StepCosts(1e-3, 0.0, 0.0, 1e-6, 0.0), seen=1)  # 20 tokens in about a millisecond


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    desk.peer_up()
    desk.role.costs = StepModel(QUICK)
    return desk


def test_a_local_decision_stays_local_while_no_more_than_thought_is_missing(desk: Desk) -> None:
    request = desk.submit(prompt_of(20), to="prefill", local=True, local_below=20)
    desk.run()
    assert not desk.read(Begin)
    assert desk.right(request)
    counters = desk.role.counters
    assert (counters["turned_local"], counters["turned_remote"], counters["local"]) == (0, 0, 1)


def test_a_local_decision_turns_remote_when_more_is_missing_than_the_router_allowed(desk: Desk) -> None:
    request = desk.submit(prompt_of(21), to="prefill", local=True, local_below=20)
    desk.deliver(*desk.begun())
    desk.run()
    assert desk.right(request)
    assert desk.role.counters["turned_remote"] == 1


def test_a_finished_handoff_teaches_what_it_took_beyond_the_peers_queue_and_compute(desk: Desk) -> None:
    for _ in range(3):  # Done after the last copy, then before it
        desk.submit(prompt_of(21, first=desk.role.counters["remote"]), to="prefill")
        begin, leases = desk.begun()
        desk.now += 5.0
        desk.deliver(begin, leases)
        desk.say(Done(begin.handoff_id, 0, 1.0, 2.0))
        desk.run()
    desk.copies = False
    desk.submit(prompt_of(21, first=9), to="prefill")
    begin, leases = desk.begun()
    for lease in leases:
        desk.say(desk.write(begin, lease))
    desk.turn()
    desk.say(Done(begin.handoff_id, 0, 1.0, 2.0))
    desk.now += 5.0
    desk.copies = True
    for job in [job for job in desk.jobs if type(job).__name__ == "CopyOut"][-len(leases) :]:
        desk.copy_out(job)  # type: ignore[arg-type]
    desk.run()
    (cost,) = desk.role.costs.costs.handoffs
    assert (cost.peer, cost.seen) == ("prefill", 4)
    predicted = cost.latency_s + cost.byte_s * 20 * 8
    assert predicted == pytest.approx(2.0, rel=0.1)


def test_a_done_from_a_stranger_teaches_nothing(desk: Desk) -> None:
    desk.submit(prompt_of(21), to="prefill")
    begin, leases = desk.begun()
    desk.deliver(begin, leases)
    desk.say(Done(begin.handoff_id, 0, 0.0, 0.0), peer="p2")
    desk.run()
    assert not desk.role.costs.costs.handoffs


def test_a_handoff_that_slips_is_computed_here_when_that_is_quicker(desk: Desk) -> None:
    request = desk.submit(prompt_of(21), to="prefill", handoff_s=0.1)
    desk.begun()
    desk.wait(0.19)
    assert not desk.read(Abort), "within twice its estimate"
    desk.wait(0.02)
    assert "here it is quicker" in desk.read(Abort)[0].reason
    assert desk.right(request)
    assert desk.role.counters["handoffs_slipped"] == 1


def test_a_handoff_that_slips_is_waited_for_when_it_is_slower_here(desk: Desk) -> None:
    desk.role.costs = StepModel(Costs(step=StepCosts(0.5, 0.0, 0.0, 1e-6, 0.0), seen=1))
    desk.submit(prompt_of(21), to="prefill", handoff_s=0.1)
    desk.begun()
    for _ in range(3):
        desk.wait(0.15)
        assert not desk.read(Abort)
    desk.wait(0.4)  # by now it has waited longer than it would have taken here
    assert desk.read(Abort)


def test_a_handoff_of_which_something_came_is_not_looked_at_again(desk: Desk) -> None:
    desk.submit(prompt_of(21), to="prefill", handoff_s=0.1)
    begin, leases = desk.begun()
    desk.say(desk.write(begin, leases[0]))
    desk.run()
    desk.wait(5.0)
    assert not desk.read(Abort)
