"""The schedule is kept whatever the server does; every request ends in exactly one way. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from bench.load import LEAD_S, Job, Load
from bench.record import Record, Run
from bench.traces import TraceRequest
from tests.bench.virtual import VirtualLoop, in_virtual_time


class Server:
    """A target that answers as told: `behave(number, record)` is what becomes of a request."""

    def __init__(self, loop: VirtualLoop, behave: Callable[[int, Server, Record], Any]) -> None:
        self.loop = loop
        self.behave = behave
        self.prepared: list[int] = []
        self.arrived: dict[int, float] = {}
        self.cancelled: list[int] = []
        self.open = 0
        self.most_open = 0

    def prepare(self, request: TraceRequest) -> int:
        self.prepared.append(request.number)
        return request.number

    async def ask(self, prepared: int, record: Record) -> None:
        self.arrived[prepared] = self.loop.time()
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await self.behave(prepared, self, record)
        except asyncio.CancelledError:
            self.cancelled.append(prepared)
            raise
        finally:
            self.open -= 1

    async def answer(self, record: Record, first_s: float, gap_s: float) -> None:
        await asyncio.sleep(first_s)
        record.piece(self.loop.time(), 1)
        for _ in range(record.output_tokens - 1):
            await asyncio.sleep(gap_s)
            record.piece(self.loop.time(), 1)
        record.completion_tokens = record.output_tokens


async def promptly(_number: int, server: Server, record: Record) -> None:
    await server.answer(record, 0.1, 0.01)


async def never(_number: int, _server: Server, _record: Record) -> None:
    await asyncio.Event().wait()


def jobs(count: int, gap_s: float = 0.5, tokens: int = 3) -> list[Job]:
    return [Job(TraceRequest(n, n * gap_s, 10, tokens), n * gap_s, warmup=n < 2) for n in range(count)]


def run(
    behave: Callable[[int, Server, Record], Any],
    schedule: list[Job],
    interrupt_at_s: float | None = None,
    **options: Any,
) -> tuple[Run, Server, Load]:
    async def work(loop: VirtualLoop) -> tuple[Run, Server, Load]:
        server = Server(loop, behave)
        load = Load(server, schedule, clock=loop.time, **options)
        if interrupt_at_s is not None:
            loop.call_at(interrupt_at_s, load.interrupt)
        return await load.run(), server, load

    return in_virtual_time(work)


def test_requests_are_sent_when_they_are_due() -> None:
    made, server, load = run(promptly, jobs(20))
    assert made.begin == LEAD_S
    for number, record in enumerate(made.records):
        assert record.scheduled == pytest.approx(made.begin + number * 0.5)
        assert record.sent == pytest.approx(record.scheduled)
        assert record.piece_times[0] - record.scheduled == pytest.approx(0.1)
        assert record.end == pytest.approx(record.scheduled + 0.12)
        assert record.ok and record.warmup == (number < 2)
    assert server.prepared == list(range(20))
    assert (load.live.due, load.live.ended, load.live.open, load.live.failed, load.live.tokens) == (
        20,
        20,
        0,
        0,
        60,
    )
    assert not made.interrupted and max(made.lags_s) == pytest.approx(0, abs=1e-6)


def test_a_server_that_stalls_does_not_slow_the_arrivals() -> None:
    """Open loop: with 10 s for each answer all of them are open at once, and each came when it was due."""

    async def stalls(_number: int, server: Server, record: Record) -> None:
        await server.answer(record, 10.0, 1.0)

    made, server, _ = run(stalls, jobs(15))
    assert server.most_open == 15
    for number, at in server.arrived.items():
        assert at == pytest.approx(made.begin + number * 0.5)
    assert all(record.ok for record in made.records)


def test_a_bound_holds_requests_back_and_their_latency_runs_on() -> None:
    async def slow(_number: int, server: Server, record: Record) -> None:
        await server.answer(record, 2.0, 0.0)

    made, server, _ = run(slow, jobs(6), max_open=1)
    assert server.most_open == 1
    last = made.records[-1]
    assert last.scheduled == pytest.approx(made.begin + 2.5)
    assert last.sent == pytest.approx(made.begin + 10.0)  # after five answers of 2 s each
    assert last.piece_times[0] - last.scheduled == pytest.approx(9.5)


def test_requests_at_the_same_instant_all_leave_then() -> None:
    made, server, _ = run(promptly, [Job(TraceRequest(n, 1.0, 1, 1), 1.0) for n in range(200)])
    assert list(server.arrived.values()) == [pytest.approx(made.begin + 1.0)] * 200
    assert server.most_open == 200


def test_time_outs_count_from_sending() -> None:
    async def some(number: int, server: Server, record: Record) -> None:
        await server.answer(record, 3.0 if number % 2 else 0.1, 0.0)

    made, server, load = run(some, jobs(6), timeout_s=1.0)
    assert [record.error for record in made.records] == ["", "timeout"] * 3
    assert server.cancelled == [1, 3, 5]
    assert load.live.failed == 3
    late = made.records[1]
    assert late.end is not None and late.end - late.scheduled == pytest.approx(1.0)
    assert "1 s" in late.message


def test_what_is_open_after_the_drain_is_unfinished() -> None:
    async def last_hangs(number: int, server: Server, record: Record) -> None:
        await (never if number == 4 else promptly)(number, server, record)

    made, server, _ = run(last_hangs, jobs(5), timeout_s=1e6, drain_s=7.0)
    assert [record.error for record in made.records] == ["", "", "", "", "unfinished"]
    assert server.cancelled == [4] and not made.interrupted
    assert made.end - made.records[4].scheduled == pytest.approx(7.0)


@pytest.mark.parametrize("at_s", [1.3, 2.2])  # while requests arrive; while the last ones are waited for
def test_an_interrupt_ends_it_with_what_there_is(at_s: float) -> None:
    async def second_hangs(number: int, server: Server, record: Record) -> None:
        await (never if number == 1 else promptly)(number, server, record)

    made, server, _ = run(second_hangs, jobs(4), interrupt_at_s=at_s, timeout_s=1e6, drain_s=1e6)
    assert made.interrupted
    assert made.end == pytest.approx(at_s)
    assert server.cancelled == [1] and server.open == 0
    assert [r.error for r in made.records] == ["", "cancelled", *[""] * (len(made.records) - 2)]
    assert len(made.records) == (3 if at_s == 1.3 else 4)


def test_cancelling_the_run_cancels_every_request() -> None:
    async def work(loop: VirtualLoop) -> Server:
        server = Server(loop, never)
        running = asyncio.create_task(Load(server, jobs(9), clock=loop.time).run())
        await asyncio.sleep(2.0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return server

    server = in_virtual_time(work)
    assert server.open == 0 and server.cancelled == [0, 1, 2, 3]


def test_a_defect_of_the_generator_is_one_failed_request() -> None:
    async def broken(number: int, server: Server, record: Record) -> None:
        if number == 1:
            raise KeyError("oops")
        await promptly(number, server, record)

    made, _, _ = run(broken, jobs(3))
    assert [record.error for record in made.records] == ["", "client", ""]
    assert made.records[1].message == "KeyError: 'oops'"


def test_an_answer_without_tokens_is_none() -> None:
    async def silent(_number: int, _server: Server, _record: Record) -> None:
        pass

    made, _, _ = run(silent, jobs(1))
    assert made.records[0].error == "empty"


def test_requests_are_encoded_ahead_while_there_is_time_but_not_all_at_once() -> None:
    seen: list[int] = []

    async def look(number: int, server: Server, record: Record) -> None:
        seen.append(len(server.prepared))
        await promptly(number, server, record)

    run(look, jobs(200))
    assert seen[0] <= 65 and max(seen) == 200 and seen[50] < 120
