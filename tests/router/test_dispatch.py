"""The dispatcher against a worker made by hand: a real gRPC server that says what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from baton import rpc
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from engine.api import Logprobs, SamplingParams
from router import links
from router.dispatch import WorkerDispatcher
from router.dispatch_api import ChoiceEnded, Ended, NewTokens, Prompt, PromptScores, RefusalKind, Refused
from router.policies import POLICIES
from router.policy import Ask, choose
from router.spec import RouterSpec
from router.view import ClusterView

TOKEN = "t"


class HandWorker(worker_pb2_grpc.WorkerServicer):
    """Says `script(submit)` for each request; records what it is told."""

    def __init__(self, script: Callable[[pb.Submit], list[pb.FromWorker]]) -> None:
        self.script = script
        self.submits: list[pb.Submit] = []
        self.cancels: list[int] = []
        self.subscribed = 0
        self.told = asyncio.Event()
        self._outbox: asyncio.Queue[pb.FromWorker] = asyncio.Queue()

    async def Describe(self, request: Any, context: Any) -> api.WorkerStatus:
        return api.WorkerStatus()

    async def Session(self, requests: AsyncIterator[pb.ToWorker], context: Any) -> None:
        await context.write(
            pb.FromWorker(status=api.WorkerStatus(worker_id="decode-0", role="decode", alive=True))
        )
        writer = asyncio.create_task(self._write(context))
        try:
            async for message in requests:
                if message.HasField("submit"):
                    self.submits.append(message.submit)
                    for reply in self.script(message.submit):
                        self._outbox.put_nowait(reply)
                elif message.HasField("cancel"):
                    self.cancels.append(message.cancel.key)
                else:
                    self.subscribed += 1
                self.told.set()
        finally:
            writer.cancel()

    async def _write(self, context: Any) -> None:
        while True:
            await context.write(await self._outbox.get())


def _tokens(key: int, first: int, *ids: int) -> pb.FromWorker:
    return pb.FromWorker(tokens=[pb.TokenEntry(key=key, first_index=first, ids=ids)])


def _end(key: int, reason: str, detail: str = "") -> pb.FromWorker:
    return pb.FromWorker(ends=[pb.RequestEnd(key=key, reason=reason, detail=detail)])


@asynccontextmanager
async def dispatching(
    worker: HandWorker, **spec: Any
) -> AsyncIterator[tuple[WorkerDispatcher, grpc.aio.Server]]:
    server = rpc.server(TOKEN)
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    dispatcher = WorkerDispatcher(
        RouterSpec(token=TOKEN, model_path="", served_name="m", max_model_len=100, **spec)
    )
    member = pb.Member(worker_id="decode-0", role="decode", incarnation="i", address=f"127.0.0.1:{port}")
    await dispatcher.SetMembers(pb.Members(version=1, members=[member]), None)
    try:
        async with asyncio.timeout(20):
            while not dispatcher.ready:
                await asyncio.sleep(0.01)
            yield dispatcher, server
    finally:
        await dispatcher.close()
        await server.stop(None)


def _prompt() -> Prompt:
    return Prompt("r", [1, 2, 3], SamplingParams(max_tokens=4))


async def _collect(dispatcher: WorkerDispatcher) -> tuple[list[int], Ended]:
    ids: list[int] = []
    async for event in dispatcher.generate(_prompt()):
        if isinstance(event, NewTokens):
            assert event.first_index == len(ids)
            ids += event.ids
        else:
            assert isinstance(event, Ended)
            return ids, event
    raise AssertionError("no terminal event")


async def test_tokens_and_one_end() -> None:
    worker = HandWorker(lambda s: [_tokens(s.key, 0, 7, 8), _tokens(s.key, 2, 9), _end(s.key, "stop")])
    async with dispatching(worker) as (dispatcher, _):
        ids, ended = await _collect(dispatcher)
        assert ids == [7, 8, 9]
        assert ended.reason == "stop" and ended.decode_worker == "decode-0"
        assert dispatcher.active == 0
        assert dispatcher.cluster.view.decode.placed.tolist() == [0]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("no_room", RefusalKind.NO_ROOM),
        ("invalid", RefusalKind.INVALID),
        ("error", RefusalKind.INTERNAL),
        ("cancelled", RefusalKind.INTERNAL),
    ],
)
async def test_refusals_are_typed(reason: str, kind: RefusalKind) -> None:
    async with dispatching(HandWorker(lambda s: [_end(s.key, reason, "because")])) as (dispatcher, _):
        with pytest.raises(Refused, match="because") as refused:
            await _collect(dispatcher)
        assert refused.value.kind is kind


async def test_a_lost_worker_ends_its_requests_at_once() -> None:
    worker = HandWorker(lambda s: [_tokens(s.key, 0, 7)])
    async with dispatching(worker) as (dispatcher, server):
        flight = dispatcher.generate(_prompt())
        assert await anext(flight) == NewTokens(0, [7])
        await server.stop(None)
        with pytest.raises(Refused) as refused:
            await asyncio.wait_for(anext(flight), 10)
        assert refused.value.kind is RefusalKind.UNAVAILABLE
        assert not dispatcher.ready
        with pytest.raises(Refused) as refused:
            await _collect(dispatcher)
        assert refused.value.kind is RefusalKind.UNAVAILABLE


async def test_a_silent_engine_is_a_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream stands and pings are answered, but nothing is said any more."""
    monkeypatch.setattr(links, "SILENCE_S", 0.3)
    async with dispatching(HandWorker(lambda s: [])) as (dispatcher, _):
        with pytest.raises(Refused, match="silent") as refused:
            await asyncio.wait_for(_collect(dispatcher), 10)
        assert refused.value.kind is RefusalKind.UNAVAILABLE


async def test_a_client_that_leaves_cancels() -> None:
    worker = HandWorker(lambda s: [_tokens(s.key, 0, 7)])
    async with dispatching(worker) as (dispatcher, _):
        flight = dispatcher.generate(_prompt())
        await anext(flight)
        await flight.aclose()
        async with asyncio.timeout(10):
            while not worker.cancels:
                worker.told.clear()
                await worker.told.wait()
        assert worker.cancels == [worker.submits[0].key]
        assert dispatcher.active == 0


async def test_a_bounded_number_of_requests() -> None:
    async with dispatching(HandWorker(lambda s: []), max_active=2) as (dispatcher, _):
        waiting = [asyncio.create_task(_collect(dispatcher)) for _ in range(2)]
        async with asyncio.timeout(10):
            while dispatcher.active < 2:
                await asyncio.sleep(0.01)
        with pytest.raises(Refused) as refused:
            await _collect(dispatcher)
        assert refused.value.kind is RefusalKind.NO_ROOM and refused.value.retry_after_s > 0
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert dispatcher.active == 0


async def test_older_membership_is_ignored() -> None:
    async with dispatching(HandWorker(lambda s: [])) as (dispatcher, _):
        ack = await dispatcher.SetMembers(pb.Members(version=0), None)
        assert ack.version == 1 and dispatcher.ready
        await dispatcher.SetMembers(pb.Members(version=2), None)
        assert not dispatcher.ready


async def test_choices_and_logprobs_stay_together() -> None:
    """What piled up comes in one piece for each choice, its log-probabilities beside it; one end for each choice."""

    def entry(key: int, choice: int, first: int, *ids: int) -> pb.FromWorker:
        logprobs = api.Logprobs(chosen=[-i for i in ids], top_ids=ids, top=[-i for i in ids])
        token = pb.TokenEntry(key=key, choice=choice, first_index=first, ids=ids, logprobs=logprobs)
        return pb.FromWorker(tokens=[token])

    def script(submit: pb.Submit) -> list[pb.FromWorker]:
        assert submit.n == 3 and submit.sampling.logprobs == 1
        key = submit.key
        return [
            pb.FromWorker(
                prompts=[
                    pb.PromptEntry(key=key, first_index=1, logprobs=api.Logprobs(chosen=[-1.0])),
                    pb.PromptEntry(key=key, first_index=2, logprobs=api.Logprobs(chosen=[-2.0])),
                ]
            ),
            *(entry(key, choice, 0, 10 + choice) for choice in range(3)),
            entry(key, 0, 1, 20),
            entry(key, 2, 1, 22, 32),
            pb.FromWorker(ends=[pb.RequestEnd(key=key, reason="stop", choice=2, more=2)]),
            entry(key, 0, 2, 30),
            pb.FromWorker(
                ends=[
                    pb.RequestEnd(key=key, reason="length", choice=0, more=1),
                    pb.RequestEnd(key=key, reason="stop", choice=1),
                ]
            ),
        ]

    async with dispatching(HandWorker(script)) as (dispatcher, _):
        prompt = replace(_prompt(), n=3, sampling=SamplingParams(max_tokens=4, logprobs=1))
        flight = dispatcher.generate(prompt)
        events = [await anext(flight)]
        await asyncio.sleep(0.2)  # a slow client: the rest piles up
        events += [event async for event in flight]
    scores = [event for event in events if isinstance(event, PromptScores)]
    assert [(event.first_index, event.logprobs.chosen) for event in scores] == [(1, [-1.0]), (2, [-2.0])]
    assert events[:2] == scores
    found = {event.choice: event for event in events if isinstance(event, NewTokens)}
    assert len([event for event in events if isinstance(event, NewTokens)]) == 3
    assert {choice: event.ids for choice, event in found.items()} == {
        0: [10, 20, 30],
        1: [11],
        2: [12, 22, 32],
    }
    for event in found.values():
        assert event.logprobs == Logprobs([-i for i in event.ids], event.ids, [-i for i in event.ids])
    assert [event for event in events if isinstance(event, ChoiceEnded)] == [
        ChoiceEnded(2, "stop"),
        ChoiceEnded(0, "length"),
    ]
    assert isinstance(events[-1], Ended) and (events[-1].choice, events[-1].reason) == (1, "stop")
    assert not dispatcher.active


async def test_prompt_logprobs_are_computed_on_the_decode_worker() -> None:
    """A policy input: whatever the policy would say, and the reason is told in words."""
    asked = Ask(900, 899, 0, 8, prompt_logprobs=True)
    cluster = ClusterView()
    cluster.set_workers(["decode-0"], ["prefill-0"])
    cluster.decode.set_usable("decode-0", True)
    cluster.prefill.set_usable("prefill-0", True)
    for policy in POLICIES.values():
        decision = choose(policy, asked, cluster.view, 0.0)
        assert decision.prefill_worker is None and "log-probabilities" in decision.reason
    remote = choose(POLICIES["always-remote"], replace(asked, prompt_logprobs=False), cluster.view, 0.0)
    assert remote.prefill_worker == "prefill-0"


async def test_enough_has_come_ends_the_request_with_its_trace() -> None:
    """A stop string: the worker is told, and what it says of the request is not lost."""
    worker = HandWorker(lambda s: [_tokens(s.key, 0, 7)])
    async with dispatching(worker) as (dispatcher, _):
        flight = dispatcher.generate(_prompt())
        assert await anext(flight) == NewTokens(0, [7])
        ending = asyncio.create_task(flight.asend(True))
        async with asyncio.timeout(10):
            while not worker.cancels:
                worker.told.clear()
                await worker.told.wait()
        end = pb.RequestEnd(key=worker.cancels[0], reason="cancelled", trace=api.Trace(prefilled="remote"))
        worker._outbox.put_nowait(pb.FromWorker(ends=[end]))
        ended = await asyncio.wait_for(ending, 10)
        assert isinstance(ended, Ended)
        assert (ended.reason, ended.trace.prefilled, ended.decode_worker) == ("stop", "remote", "decode-0")
        assert [event async for event in flight] == []
        assert dispatcher.active == 0 and len(worker.cancels) == 1


async def test_enough_has_come_but_the_worker_does_not_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.dispatch.STOP_S", 0.05)
    worker = HandWorker(lambda s: [_tokens(s.key, 0, 7)])
    async with dispatching(worker) as (dispatcher, _):
        flight = dispatcher.generate(_prompt())
        await anext(flight)
        ended = await asyncio.wait_for(flight.asend(True), 10)
        assert isinstance(ended, Ended) and ended.reason == "stop"
        await flight.aclose()
        assert dispatcher.active == 0
