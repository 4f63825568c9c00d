"""Whole runs through the real doors of Baton, HTTP and gRPC, before a dispatcher that echoes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import baton.rpc
from baton.v1 import inference_pb2
from bench.baton_door import GrpcDoor
from bench.door import Asking, Door, DoorError
from bench.figures import RateSearch, Slo
from bench.load import Load
from bench.openai_door import HttpDoor
from bench.record import Run
from bench.session import Limits, Session, Side
from bench.synthetic import Synthetic
from bench.traces import Trace, TraceRequest, load
from bench.workload import Workload
from router.dispatch_api import RefusalKind, Refused
from router.grpc_door import add_public_services
from tests.router.echo import MAX_MODEL_LEN, EchoDispatcher, make_generation
from tests.router.http_client import serving

ASKING = Asking(end_id=300)
WORKLOAD = Workload(
    Synthetic(1.0, "uniform", "uniform:20:60", "uniform:3:9", prefix_groups=2, prefix_tokens=16), requests=30
)


class Doors:
    """One Baton for each door, and what their dispatchers were asked."""

    def __init__(self, http: str, grpc: str, dispatchers: dict[str, EchoDispatcher]) -> None:
        self.http = http
        self.grpc = grpc
        self.dispatchers = dispatchers

    def door(self, name: str, **asking: Any) -> Door:
        wanted = replace(ASKING, **asking)
        if name == "grpc":
            return GrpcDoor(self.grpc, wanted, clock=time.perf_counter)
        api = "chat" if name == "chat" else "completions"
        return HttpDoor(self.http, api, wanted, clock=time.perf_counter, headers={})


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    dispatcher = EchoDispatcher()
    generation, _ = make_generation(tmp_path / "grpc", dispatcher)
    server = baton.rpc.server("secret")
    add_public_services(server, generation, lambda: inference_pb2.StatusResponse(ready=True), also_served=[])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with serving(tmp_path / "http") as http:
        both = {"http": http.dispatcher, "chat": http.dispatcher, "grpc": dispatcher}
        yield Doors(f"http://127.0.0.1:{http.port}", f"127.0.0.1:{port}", both)
    await server.stop(None)


def session(*sides: Side, workload: Workload = WORKLOAD, **more: Any) -> tuple[Session, list[Run]]:
    kept: list[Run] = []
    made = Session(
        sides,
        workload,
        Slo(e2e=20.0),
        Limits(timeout_s=20.0, drain_s=20.0),
        salt="s",
        show=lambda _load, _label, _count: nullcontext(),
        keep=lambda _label, run: kept.append(run),
        **more,
    )
    return made, kept


@pytest.mark.parametrize("name", ["http", "grpc", "chat"])
async def test_a_run_counts_exactly(doors: Doors, name: str) -> None:
    dispatcher = doors.dispatchers[name]
    made, kept = session(Side("A", doors.door(name)))
    await made.open()
    dispatcher.prompts.clear()
    await made.rounds(1, 100.0)
    await made.close()

    schedule = made.workload.schedule(100.0)
    summary = made.report.runs[0].summary
    assert (summary.requests, summary.answered, summary.errors) == (30, 30, {})
    assert summary.attainment == 1.0 and summary.prefilled == {"remote": 30}
    wanted = {job.request.number: job.request for job in schedule.jobs}
    asked = {int(prompt.request_id.rpartition("-")[2]): prompt for prompt in dispatcher.prompts}
    assert asked.keys() == wanted.keys()
    for number, prompt in asked.items():
        assert prompt.sampling.max_tokens == wanted[number].output_tokens
        if name != "chat":
            assert len(prompt.tokens) == wanted[number].input_tokens
    if name != "chat":  # the trace says who shares 16 tokens with whom, and no two prompts are equal
        for a in asked:
            for b in asked:
                equal = asked[a].tokens[:16] == asked[b].tokens[:16]
                assert equal == (wanted[a].blocks == wanted[b].blocks)
        assert len({tuple(prompt.tokens) for prompt in asked.values()}) == 30
    # The echo ends where the prompt does, so texts may be answered with less than was asked for.
    for record in kept[0].records:
        assert record.completion_tokens == sum(record.piece_tokens) == len(record.piece_times)
    assert summary.output_tokens == sum(record.completion_tokens for record in kept[0].records)


async def test_refusals_have_the_same_names_at_both_doors(doors: Doors) -> None:
    sides = [Side(name, doors.door(name)) for name in ("http", "grpc")]
    made, _ = session(*sides, workload=replace(WORKLOAD, requests=5))
    await made.open()
    for kind, error in ((RefusalKind.NO_ROOM, "no_room"), (RefusalKind.UNAVAILABLE, "unavailable")):
        for dispatcher in doors.dispatchers.values():
            dispatcher.refusal = Refused(kind, "not now", retry_after_s=1)
        await made.rounds(1, 100.0)
        for run in made.report.runs[-2:]:
            assert run.summary.errors == {error: 5}
            assert "not now" in run.summary.messages[error]
    for dispatcher in doors.dispatchers.values():
        dispatcher.refuse_at = 2
    await made.rounds(1, 100.0)
    assert [run.summary.errors for run in made.report.runs[-2:]] == [{"unavailable": 5}] * 2
    await made.close()


async def test_sides_take_turns_and_no_prompt_comes_twice(doors: Doors) -> None:
    made, _ = session(
        Side("A", doors.door("http")), Side("B", doors.door("http")), workload=replace(WORKLOAD, requests=8)
    )
    await made.open()
    dispatcher = doors.dispatchers["http"]
    dispatcher.prompts.clear()
    await made.rounds(3, 200.0)
    await made.close()
    assert [(run.side, run.round) for run in made.report.runs] == [
        (side, n) for n in range(3) for side in "AB"
    ]
    assert len({tuple(prompt.tokens) for prompt in dispatcher.prompts}) == 48
    assert {each.side for each in made.report.comparison} == {"B"}
    assert all(len(each.ratios) == 3 for each in made.report.comparison)


async def test_a_search_tells_what_it_tried(doors: Doors) -> None:
    workload = replace(WORKLOAD, requests=4)
    made, _ = session(Side("A", doors.door("http")), workload=workload)
    await made.open()
    await made.search(RateSearch(50.0, most=2))
    assert [one.rate for one in made.report.tries] == [50.0, 100.0]
    assert made.report.best_rate == 100.0 and "not the limit" in made.report.notes[-1]
    doors.dispatchers["http"].refusal = Refused(RefusalKind.NO_ROOM, "full")
    await made.sweep([30.0])
    assert made.report.tries[-1].attainment == 0.0
    await made.close()


async def test_a_search_that_outgrows_its_trace_keeps_what_it_found(doors: Doors) -> None:
    trace = Trace("t", tuple(TraceRequest(n, n / 10, 20, 2) for n in range(10)), 1.0)
    made, _ = session(Side("A", doors.door("http")), workload=Workload(trace, duration_s=0.1))
    await made.open()
    await made.search(RateSearch(60.0))
    await made.close()
    assert [one.rate for one in made.report.tries] == [60.0] and made.report.best_rate == 60.0
    assert "the search ended at 120 requests/s: t: it has 10 requests" in made.report.notes[0]


async def test_requests_that_the_model_cannot_hold_are_dropped_and_told(doors: Doors, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lengths = [40, MAX_MODEL_LEN, 60, 500]
    trace.write_text(
        "".join(f'{{"timestamp":{n},"input_length":{i},"output_length":5}}\n' for n, i in enumerate(lengths))
    )
    made, kept = session(Side("A", doors.door("grpc")), workload=Workload(load(trace), requests=2))
    await made.open()
    assert "2 of 4 requests of the trace were dropped: too long, at most 128 tokens" in made.report.notes[0]
    await made.rounds(1, 50.0)
    assert [record.prompt_tokens for record in kept[0].records] == [40, 60]
    long, _ = session(Side("A", doors.door("grpc")), workload=Workload(load(trace), input_scale=20.0))
    with pytest.raises(DoorError, match="all 4 requests of the trace are longer than allowed"):
        await long.open()
    await made.close()
    await long.close()


async def test_an_interrupt_leaves_a_report(doors: Doors) -> None:
    dispatcher = doors.dispatchers["http"]
    made, _ = session(Side("A", doors.door("http")), Side("B", doors.door("http")))
    await made.open()
    dispatcher.hold_at = 1

    async def interrupt_when_all_hold() -> None:
        while dispatcher.active < 30:
            await asyncio.sleep(0.005)
        made.interrupt()

    @asynccontextmanager
    async def show(_load: Load, _label: str, _count: int) -> AsyncIterator[None]:
        task = asyncio.create_task(interrupt_when_all_hold())
        yield
        await task

    made.show = show
    async with asyncio.timeout(30):
        await made.rounds(3, 200.0)
    await made.close()
    assert len(made.report.runs) == 1 and made.report.runs[0].interrupted
    assert made.report.runs[0].summary.errors == {"cancelled": 30}
    assert made.report.comparison == [] and "interrupted" in made.report.notes[0]


async def test_what_a_door_cannot_do_is_refused(doors: Doors) -> None:
    for asking, message in (
        ({"prompts": "text"}, "token ids, which are exact"),
        ({"extra": {"a": 1}}, "no effect"),
    ):
        with pytest.raises(DoorError, match=message):
            doors.door("grpc", **asking)
    with pytest.raises(DoorError, match="has no model 'other'; it has echo"):
        await doors.door("grpc", model="other").open()
    with pytest.raises(DoorError, match="--end-id 9999 is beyond the vocabulary of 512 tokens"):
        await doors.door("grpc", end_id=9999).open()
    with pytest.raises(DoorError, match="Unavailable"):
        await GrpcDoor("127.0.0.1:1", ASKING, clock=time.perf_counter).open()
