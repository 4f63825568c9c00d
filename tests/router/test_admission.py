"""Who waits and who is next: fair shares against a naive model; the dispatcher's queue before a worker made by hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from engine.api import SamplingParams
from router.account import Account
from router.admission import Admission, Ticket
from router.call import GenerateCall
from router.dispatch import WorkerDispatcher
from router.dispatch_api import Ended, Prompt, RefusalKind, Refused
from router.grpc_door import _call
from router.http_answers import error_body
from router.http_bodies import CompletionBody, parse
from tests.router.echo import until
from tests.router.test_dispatch import HandWorker, _end, _tokens, dispatching


def queue_up(admission: Admission, tenant: str, tokens: int = 10, priority: int = 0) -> Ticket:
    ticket = admission.enter(tenant, priority, tokens)
    admission.wait(ticket)
    return ticket


def order(admission: Admission) -> list[str]:
    tickets = []
    while (ticket := admission.next()) is not None:
        tickets.append(ticket.tenant)
    return tickets


# ---- pure --------------------------------------------------------------------------------------------------------


def test_tenants_take_turns_however_many_one_has_sent() -> None:
    admission = Admission({}, 100)
    for _ in range(10):
        queue_up(admission, "many")
    for _ in range(3):
        queue_up(admission, "few")
    assert Counter(order(admission)[:6]) == {"many": 3, "few": 3}


def test_weights_and_sizes_count() -> None:
    admission = Admission({"heavy": 3.0}, 1000)
    for _ in range(100):
        queue_up(admission, "heavy", 10)
        queue_up(admission, "light", 10)
        queue_up(admission, "wordy", 20)
    first = Counter(order(admission)[:90])
    assert (first["heavy"], first["light"], first["wordy"]) == pytest.approx((60, 20, 10), abs=2)


def test_the_urgent_go_first_whoever_sends_them() -> None:
    admission = Admission({}, 10)
    queue_up(admission, "one")
    queue_up(admission, "one", priority=-1)
    queue_up(admission, "two", priority=-1)
    queue_up(admission, "two", priority=5)
    assert order(admission) == ["two", "one", "one", "two"]


def test_who_was_idle_has_saved_nothing_up() -> None:
    admission = Admission({}, 1000)
    for _ in range(100):
        admission.admitted(admission.enter("busy", 0, 10))
    for _ in range(20):
        queue_up(admission, "busy")
        queue_up(admission, "new")
    assert Counter(order(admission)[:20]) == pytest.approx({"busy": 10, "new": 10}, abs=1)


def test_what_was_not_used_is_given_back() -> None:
    admission = Admission({}, 1000)
    for _ in range(20):
        ticket = queue_up(admission, "frugal", 1000)
        queue_up(admission, "plain", 10)
        admission.give_back(ticket.tenant, 990)
    assert Counter(order(admission)[:20])["frugal"] == pytest.approx(10, abs=1)


def test_tenants_are_forgotten_when_they_are_owed_nothing() -> None:
    admission = Admission({}, 10)
    for number in range(20_000):
        admission.admitted(admission.enter(f"tenant-{number}", 0, 1))
        admission.admitted(admission.enter("steady", 0, 10))
    assert len(admission._ends) < 10_000


@given(st.lists(st.tuples(st.sampled_from("wnlr"), st.sampled_from("abc"), st.integers(-1, 1)), max_size=80))
def test_it_is_a_queue_whatever_happens(events: list[tuple[str, str, int]]) -> None:
    """Against a list: nobody is lost, doubled or overtaken by the less urgent; a tenant's own stay in order."""
    admission, waiting = Admission({"a": 2.0}, 1000), list[Ticket]()
    for kind, tenant, priority in events:
        if kind in "wr":
            waiting.append(queue_up(admission, tenant, 7, priority))
        elif kind == "l" and waiting:
            ticket = waiting.pop(len(waiting) // 2)
            assert admission.leave(ticket) and not admission.leave(ticket)
        elif kind == "n":
            found = admission.next()
            assert (found is None) == (not waiting)
            if found is not None:
                assert found.priority == min(one.priority for one in waiting)
                like = [
                    one for one in waiting if (one.tenant, one.priority) == (found.tenant, found.priority)
                ]
                assert found is like[0]
                waiting.remove(found)
        assert len(admission) == len(waiting)
        assert len(admission._heap) <= 3 * len(waiting) + 20


# ---- in the dispatcher -------------------------------------------------------------------------------------------


class SlowWorker(HandWorker):
    """Answers when the test says so; says every few milliseconds that it has room for one more than it runs."""

    def __init__(self, room: int = 1) -> None:
        super().__init__(lambda submit: [])
        self.room = room
        self.running = 0

    def finish(self) -> None:
        key = self.submits[len(self.done)].key
        self.done.append(key)
        self._outbox.put_nowait(_tokens(key, 0, 7))
        self._outbox.put_nowait(_end(key, "stop"))

    done: list[int]

    async def speak(self) -> None:
        while True:
            queue = api.WorkerQueue(room=100, max_running=self.room, step_tokens=64)
            running = len(self.submits) - len(self.done)
            status = api.WorkerStatus(
                worker_id="decode-0", role="decode", alive=True, running=running, queue=queue
            )
            self._outbox.put_nowait(pb.FromWorker(status=status))
            await asyncio.sleep(0.005)


@asynccontextmanager
async def slow(room: int = 1, **spec: Any) -> AsyncIterator[tuple[WorkerDispatcher, SlowWorker]]:
    worker = SlowWorker(room)
    worker.done = []
    settings = {"worker_queue": 0, "policy": "cost", **spec}
    async with dispatching(worker, **settings) as (dispatcher, _):
        speaking = asyncio.create_task(worker.speak())
        try:
            await until(lambda: dispatcher.cluster.view.decode.max_running[0] == room)
            yield dispatcher, worker
        finally:
            speaking.cancel()


def prompt(name: str, **changes: Any) -> Prompt:
    account = Account(name)
    account.prompt_tokens = 3
    return Prompt(name, [1, 2, 3], SamplingParams(max_tokens=4), account=account, **changes)


async def ask(dispatcher: WorkerDispatcher, asked: Prompt) -> str:
    async for event in dispatcher.generate(asked):
        if isinstance(event, Ended):
            return event.reason
    raise AssertionError("no end")


async def test_requests_wait_for_their_turn_and_tenants_share() -> None:
    async with slow() as (dispatcher, worker):
        tasks = [asyncio.create_task(ask(dispatcher, prompt("first", tenant="a")))]
        await until(lambda: len(worker.submits) == 1)
        tasks += [asyncio.create_task(ask(dispatcher, prompt(f"a{n}", tenant="a"))) for n in range(4)]
        await until(lambda: dispatcher.queued == 4)
        tasks += [asyncio.create_task(ask(dispatcher, prompt(f"b{n}", tenant="b"))) for n in range(2)]
        await until(lambda: dispatcher.queued == 6)
        for turn in range(7):
            await until(lambda turn=turn: len(worker.submits) == turn + 1)  # type: ignore[misc]
            assert dispatcher.active == 1
            worker.finish()
        assert await asyncio.gather(*tasks) == ["stop"] * 7
        order = [submit.request_id for submit in worker.submits]
        assert order[0] == "first" and set(order[1:5]) == {"a0", "a1", "b0", "b1"}
        assert dispatcher.queued == dispatcher.active == 0


async def test_a_full_queue_refuses() -> None:
    async with slow(max_queued=1) as (dispatcher, _):
        tasks = [asyncio.create_task(ask(dispatcher, prompt(f"r{number}"))) for number in range(2)]
        await until(lambda: dispatcher.queued == 1)
        with pytest.raises(Refused, match="1 requests wait at this router already") as refused:
            await ask(dispatcher, prompt("r3"))
        assert refused.value.kind is RefusalKind.NO_ROOM
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert dispatcher.queued == 0


async def test_nobody_waits_for_ever() -> None:
    async with slow(max_queued_s=0.05) as (dispatcher, _):
        running = asyncio.create_task(ask(dispatcher, prompt("r1")))
        await until(lambda: dispatcher.active == 1)
        with pytest.raises(Refused, match=r"no room within 0.05 s"):
            await ask(dispatcher, prompt("r2"))
        running.cancel()


async def test_a_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    async with slow() as (dispatcher, worker):
        first = asyncio.create_task(ask(dispatcher, prompt("r1")))
        await until(lambda: len(worker.submits) == 1)
        waiting = asyncio.create_task(ask(dispatcher, prompt("r2")))
        await until(lambda: dispatcher.queued == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert dispatcher.queued == 0 and not dispatcher._turns
        worker.finish()
        assert await first == "stop"
        assert len(worker.submits) == 1
        assert dispatcher.admission._ends[""] == pytest.approx(3 + 1), (
            "the prompt, and the one token that came"
        )


async def test_a_client_that_leaves_as_its_turn_comes_is_cancelled_at_the_worker() -> None:
    async with slow() as (dispatcher, worker):
        first = asyncio.create_task(ask(dispatcher, prompt("r1")))
        await until(lambda: len(worker.submits) == 1)
        waiting = asyncio.create_task(ask(dispatcher, prompt("r2")))
        await until(lambda: dispatcher.queued == 1)
        dispatcher.cluster.decode.tell("decode-0", {"max_running": 9.0})
        dispatcher._next_turns()  # and before the one that waits has heard of it:
        assert not dispatcher.queued
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: len(worker.cancels) == 1)
        assert dispatcher.active == 1
        first.cancel()


async def test_a_deadline_that_cannot_be_kept_is_refused_at_once() -> None:
    async with slow(room=9) as (dispatcher, worker):
        dispatcher.cluster.decode.tell("decode-0", {"base_s": 2.0})
        with pytest.raises(
            Refused, match=r"cannot come within 500 ms: it would come [3-9]\.\d+ s after"
        ) as refused:
            await ask(dispatcher, prompt("r1", deadline_s=0.5))
        assert (refused.value.kind, refused.value.param) == (RefusalKind.TOO_LATE, "deadline_ms")
        assert not worker.submits and not dispatcher.active
        kept = asyncio.create_task(ask(dispatcher, prompt("r2", deadline_s=60.0)))
        await until(lambda: len(worker.submits) == 1)
        worker.finish()
        assert await kept == "stop"
        assert b"deadline_unreachable" in error_body(refused.value)


async def test_a_deadline_that_passes_in_the_queue_is_refused() -> None:
    async with slow() as (dispatcher, _):
        running = asyncio.create_task(ask(dispatcher, prompt("r1")))
        await until(lambda: dispatcher.active == 1)
        with pytest.raises(Refused, match="it waited for its turn") as refused:
            await ask(dispatcher, prompt("r2", deadline_s=0.05))
        assert refused.value.kind is RefusalKind.TOO_LATE
        assert dispatcher.queued == 0
        running.cancel()


def test_tenants_and_deadlines_over_both_doors() -> None:
    over_grpc = _call(api.GenerateRequest(text="x", deadline_ms=300, user="me"))
    (over_http,) = parse(CompletionBody, b'{"prompt": "x", "deadline_ms": 300, "user": "me"}').calls("r")
    for call in (over_grpc, over_http):
        assert (call.deadline_ms, call.user) == (300, "me")
    assert (GenerateCall().deadline_ms, GenerateCall().user) == (None, "")
