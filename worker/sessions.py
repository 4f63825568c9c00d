"""The streams between routers and this worker: requests in, one message per engine step out.

A session's outbox merges what a slow router has not taken yet, so it is bounded by the tokens of its requests and
never holds up a step.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import msgspec

from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from engine.api import (
    Cancel,
    Costs,
    KvEvents,
    Load,
    Logprobs,
    PromptEntry,
    RequestEnd,
    RequestKey,
    SamplingParams,
    StepOutput,
    Submit,
    TokenEntry,
    Trace,
)
from worker import ledger_view
from worker.kv_feed import KvFeed, KvSubscription
from worker.messages import LedgerRead, ReadLedger, SessionLost, ToEngine
from worker.spec import WorkerSpec

log = logging.getLogger("baton.shell")

LEDGER_WAIT_S = 10.0  # a step of a long prompt on a slow CPU takes seconds


class SessionOutbox:
    """One router's stream and what waits to be written to it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._wake = asyncio.Event()
        self._tokens: dict[tuple[int, int, int], pb.TokenEntry] = {}
        self._prompts: list[pb.PromptEntry] = []
        self._ends: list[pb.RequestEnd] = []
        self._status: api.WorkerStatus | None = None
        self._kv: KvSubscription | None = None
        self._step = 0

    def add_tokens(self, step: int, new: TokenEntry) -> None:
        request = new.request
        place = (request.key, request.attempt, new.choice)
        entry = self._tokens.get(place)
        if entry is None:
            entry = self._tokens[place] = pb.TokenEntry(
                key=request.key,
                attempt=request.attempt,
                first_index=new.first_index,
                ids=new.ids,
                choice=new.choice,
            )
        else:
            entry.ids.extend(new.ids)
        if new.logprobs is not None:
            _extend(entry.logprobs, new.logprobs)
        self._step = step
        self._wake.set()

    def add_prompt(self, new: PromptEntry) -> None:
        request = new.request
        entry = pb.PromptEntry(key=request.key, attempt=request.attempt, first_index=new.first_index)
        _extend(entry.logprobs, new.logprobs)
        self._prompts.append(entry)
        self._wake.set()

    def add_end(self, end: RequestEnd) -> None:
        trace = _trace(end.trace) if end.trace else None
        request = end.request
        self._ends.append(
            pb.RequestEnd(
                key=request.key,
                attempt=request.attempt,
                reason=end.reason,
                detail=end.detail,
                trace=trace,
                choice=end.choice,
                more=end.more,
            )
        )
        self._wake.set()

    def set_status(self, status: api.WorkerStatus) -> None:
        if self._status is not None and self._status.HasField("costs") and not status.HasField("costs"):
            status.costs.CopyFrom(self._status.costs)  # not written yet
        self._status = status
        self._step = status.step
        self._wake.set()

    def subscribe(self, feed: KvFeed) -> None:
        """The router wants to know what the prefix cache has; asked again: from the beginning."""
        if self._kv is None:
            self._kv = feed.subscribe(self._wake.set)
        self._kv.restart()

    def close(self) -> None:
        if self._kv is not None:
            self._kv.close()

    async def next(self) -> pb.FromWorker:
        """Waits until there is something to say and takes all of it."""
        await self._wake.wait()
        self._wake.clear()
        message = pb.FromWorker(
            step=self._step,
            tokens=self._tokens.values(),
            ends=self._ends,
            status=self._status,
            prompts=self._prompts,
        )
        self._tokens.clear()
        self._prompts.clear()
        self._ends.clear()
        self._status = None
        if self._kv is not None:
            self._kv.fill(message)
            if self._kv.pending:
                self._wake.set()
        return message


class WorkerService:
    """`baton.v1.Worker`: sessions of routers, and a description for operators."""

    def __init__(
        self, spec: WorkerSpec, send: Callable[[ToEngine], None], describe: Callable[[], api.WorkerStatus]
    ) -> None:
        self._spec = spec
        self._send = send
        self._describe = describe
        self._kv = KvFeed(spec.incarnation)
        self._sessions: dict[int, SessionOutbox] = {}
        self._request_ids: dict[RequestKey, str] = {}  # of open requests, for the log
        self._next = 1
        self._ledgers: dict[int, asyncio.Future[api.WorkerLedger]] = {}  # by call
        self._ledger_calls = 0

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> api.WorkerStatus:
        return self._describe()

    async def ReadLedger(self, request: api.LedgerRequest, context: Any) -> api.WorkerLedger:
        """Answered by the engine, between two steps."""
        self._ledger_calls += 1
        call = self._ledger_calls
        future = self._ledgers[call] = asyncio.get_running_loop().create_future()
        self._send(ReadLedger(call, min(request.oldest or ledger_view.OLDEST, ledger_view.MOST)))
        try:
            async with asyncio.timeout(LEDGER_WAIT_S):
                answer: api.WorkerLedger = await future
                return answer
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"the engine of {self._spec.worker_id} did not answer within {LEDGER_WAIT_S:g} s",
            )
            raise
        finally:
            del self._ledgers[call]

    def ledger_read(self, found: LedgerRead, slot_bytes: int) -> None:
        """The engine's answer; whoever asked may have gone."""
        future = self._ledgers.get(found.call)
        if future is not None and not future.done():
            future.set_result(ledger_view.told(self._spec, found, slot_bytes))

    async def Session(self, requests: AsyncIterator[pb.ToWorker], context: Any) -> None:
        session = SessionOutbox(self._next)
        self._next += 1
        self._sessions[session.number] = session
        session.set_status(self._describe())
        reader = asyncio.create_task(self._read(session, requests))
        try:
            while not reader.done():
                writer = asyncio.create_task(session.next())
                await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
                if not writer.done():
                    writer.cancel()
                    break
                await context.write(writer.result())
        finally:
            reader.cancel()
            del self._sessions[session.number]
            session.close()
            self._send(SessionLost(session.number))

    async def _read(self, session: SessionOutbox, requests: AsyncIterator[pb.ToWorker]) -> None:
        async for message in requests:
            if message.HasField("submit"):
                self._submit(session, message.submit)
            elif message.HasField("cancel"):
                cancel = message.cancel
                self._send(Cancel(RequestKey(session.number, cancel.key, cancel.attempt)))
            elif message.HasField("kv_subscribe"):
                session.subscribe(self._kv)

    def _submit(self, session: SessionOutbox, submit: pb.Submit) -> None:
        request = RequestKey(session.number, submit.key, submit.attempt)
        if self._spec.role != "decode":
            session.add_end(RequestEnd(request, "invalid", f"{self._spec.worker_id} does not decode"))
            return
        self._request_ids[request] = submit.request_id
        self._send(
            Submit(
                request=request,
                request_id=submit.request_id,
                prompt=list(submit.prompt),
                sampling=_sampling(submit.sampling),
                prefill_worker=submit.prefill_worker,
                local_below_tokens=submit.local_below_tokens,
                salt=submit.salt,
                priority=submit.priority,
                n=submit.n or 1,
                local=submit.local,
                handoff_s=submit.handoff_s,
            )
        )

    # ---- from the engine ---------------------------------------------------------------------------------------

    def step_output(self, output: StepOutput) -> None:
        for prompt in output.prompts:
            session = self._sessions.get(prompt.request.session)
            if session is not None:
                session.add_prompt(prompt)
        for entry in output.tokens:
            session = self._sessions.get(entry.request.session)
            if session is not None:
                session.add_tokens(output.step, entry)
        for end in output.ends:
            self.request_end(end)

    def request_end(self, end: RequestEnd) -> None:
        self._log_end(end)
        session = self._sessions.get(end.request.session)
        if session is not None:
            session.add_end(end)

    def _log_end(self, end: RequestEnd) -> None:
        """Names the requests that did not go as they were meant to."""
        request_id = self._request_ids.get(end.request, "")
        if not end.more:
            self._request_ids.pop(end.request, None)
        if end.trace is not None and end.trace.fallback:
            log.warning(
                "request %s: the hand-off from %s failed, %d of its prompt tokens came: %s",
                request_id,
                end.trace.prefill_worker or "the prefill worker",
                end.trace.remote_tokens,
                end.trace.fallback,
            )
        if end.reason == "error":
            log.error("request %s failed: %s", request_id, end.detail)

    def ready(self, block_size: int, wire_dtype: str = "") -> None:
        """The engine can take requests; see `KvFeed.open`."""
        self._kv.open(block_size, wire_dtype)

    def kv_events(self, events: KvEvents) -> None:
        """The prefix cache changed: every router that asked is told."""
        self._kv.apply(events)

    def load(self, *, new_costs: bool) -> None:
        """The worker's state changed: every router is told, of its costs only when they are new."""
        for session in self._sessions.values():
            status = self._describe()
            if not new_costs:
                status.ClearField("costs")
            session.set_status(status)


def worker_status(
    spec: WorkerSpec,
    address: str,
    transport: str,
    pid: int,
    engine_pids: list[int],
    engine_silent_s: float,
    load: Load | None,
    costs: Costs | None,
) -> api.WorkerStatus:
    """The state of a worker as routers and operators see it."""
    status = api.WorkerStatus(
        worker_id=spec.worker_id,
        role=spec.role,
        incarnation=spec.incarnation,
        address=address,
        alive=True,
        transport=transport,
        pid=pid,
        engine_pid=engine_pids[0],
        engine_pids=engine_pids,
        engine_silent_s=engine_silent_s,
    )
    if costs is not None:
        status.costs.CopyFrom(_costs(costs))
    if load is not None:
        ledger = load.ledger
        status.queue.CopyFrom(api.WorkerQueue(**msgspec.structs.asdict(load.queue)))
        status.step = load.step
        status.waiting = load.waiting
        status.running = load.running
        status.waiting_tokens = load.waiting_tokens
        status.handoffs = load.handoffs
        status.peers.extend(load.peers)
        status.links.extend(api.PeerLink(**msgspec.structs.asdict(link)) for link in load.links)
        status.counters.update(load.counters)
        status.ledger.CopyFrom(
            api.Ledger(
                blocks_free=ledger.blocks_free,
                blocks_cached=ledger.blocks_cached,
                blocks_held=ledger.blocks_held,
                blocks_landing=ledger.blocks_landing,
                blocks_total=ledger.blocks_total,
                slots_free=ledger.slots_free,
                slots_leased=ledger.slots_leased,
                slots_quarantined=ledger.slots_quarantined,
                slots_total=ledger.slots_total,
            )
        )
    return status


def _costs(costs: Costs) -> api.WorkerCosts:
    return api.WorkerCosts(
        **msgspec.structs.asdict(costs.step),
        decode_spread=msgspec.structs.astuple(costs.decode),
        prefill_spread=msgspec.structs.astuple(costs.prefill),
        handoffs=[
            api.HandoffCosts(
                peer=one.peer,
                latency_s=one.latency_s,
                byte_s=one.byte_s,
                spread=msgspec.structs.astuple(one.spread),
                seen=one.seen,
            )
            for one in costs.handoffs
        ],
        seen=costs.seen,
    )


def _sampling(sampling: pb.EngineSampling) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        choice=sampling.choice,
        max_tokens=sampling.max_tokens,
        stop_token_ids=tuple(sampling.stop_token_ids),
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(zip(sampling.bias_ids, sampling.bias, strict=True)),
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
    )


def _extend(message: api.Logprobs, more: Logprobs) -> None:
    message.chosen.extend(more.chosen)
    message.top_ids.extend(more.top_ids)
    message.top.extend(more.top)


def _trace(trace: Trace) -> api.Trace:
    return api.Trace(
        prefilled=trace.prefilled,
        prefill_worker=trace.prefill_worker,
        cached_tokens=trace.cached_tokens,
        remote_tokens=trace.remote_tokens,
        handoff_bytes=trace.handoff_bytes,
        queue_s=trace.queue_s,
        handoff_s=trace.handoff_s,
        prefill_s=trace.prefill_s,
        ttft_s=trace.ttft_s,
        decode_s=trace.decode_s,
        fallback=trace.fallback,
    )
