"""The life of a request in the router: decide, book, submit, pass tokens on, end exactly once.

It implements `router.dispatch_api.Dispatcher` over the links to all workers, and `baton.v1.Membership`, by which the
supervisor says which workers there are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import numpy as np

from baton import RELEASE
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from engine.api import Logprobs, SamplingParams, Trace
from router.account import Account
from router.decisions import DecisionLog
from router.dispatch_api import (
    ChoiceEnded,
    Ended,
    Event,
    NewTokens,
    Prompt,
    PromptScores,
    RefusalKind,
    Refused,
)
from router.links import WorkerLink
from router.metrics import RequestMetrics
from router.placements import Placement, Placements
from router.policies import find
from router.policy import Ask, Decision, NoRoom, NoWorker, PolicyError, choose
from router.prefix_index import Expected, PrefixIndex
from router.prompt_hints import PromptHints
from router.spec import RouterSpec
from router.view import ClusterView, View

log = logging.getLogger("baton.router")

RETRY_AFTER_S = 1.0
STOP_S = 2.0  # for the end of a request that was stopped: about a step


class Flight:
    """One request under way: what has come for it and was not taken yet. One consumer."""

    __slots__ = (
        "_events", "_untaken", "_waiter", "account", "decision", "expected", "key", "link", "placement",
    )  # fmt: skip

    def __init__(self, key: int, link: WorkerLink, placement: Placement, account: Account) -> None:
        self.key = key
        self.link = link
        self.placement = placement
        self.decision = placement.decision
        self.account = account
        self.expected: list[Expected] = []  # what its workers will have cached, until they say so
        self._events: deque[Event | Refused] = deque()
        self._untaken: dict[int, NewTokens] = {}  # by choice, among the events
        self._waiter: asyncio.Future[None] | None = None

    def push(self, event: Event | Refused) -> None:
        if isinstance(event, NewTokens):
            # A slow client gets what piled up in one piece.
            earlier = self._untaken.setdefault(event.choice, event)
            if earlier is not event:
                earlier.ids.extend(event.ids)
                if earlier.logprobs is not None and event.logprobs is not None:
                    earlier.logprobs.extend(event.logprobs)
                return
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Event | Refused:
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event = self._events.popleft()
        if isinstance(event, NewTokens):
            del self._untaken[event.choice]
        return event


class WorkerDispatcher:
    """Requests to workers and back."""

    def __init__(self, spec: RouterSpec) -> None:
        self.spec = spec
        self.metrics = RequestMetrics()
        self.cluster = ClusterView()
        self.index = PrefixIndex(spec.prefix_index_entries)
        self.placements = Placements(self.cluster)
        self.decisions = DecisionLog(spec.decisions_bytes)
        self._policy = find(spec.policy)
        self._links: dict[str, WorkerLink] = {}  # by worker id
        self._flights: dict[int, Flight] = {}
        self._next_key = 1
        self._members_version = 0

    # ---- the doors' side ---------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return any(link.up and link.member.role == "decode" for link in self._links.values())

    @property
    def active(self) -> int:
        return len(self._flights)

    async def generate(self, prompt: Prompt) -> AsyncGenerator[Event, bool | None]:
        """See `Dispatcher.generate`."""
        if len(self._flights) >= self.spec.max_active:
            raise Refused(
                RefusalKind.NO_ROOM,
                f"this router has {self.spec.max_active} requests already",
                retry_after_s=RETRY_AFTER_S,
            )
        flight = self._submit(prompt)
        ended = False
        try:
            while not ended:
                event = await flight.next()
                ended = isinstance(event, Ended | Refused)
                if isinstance(event, Refused):
                    raise event
                enough = yield event
                if enough and not ended:
                    ended = await self._stopped(flight)
                    yield Ended(
                        "stop",
                        flight.account.trace or Trace(),
                        flight.decision.decode_worker,
                        flight.decision.reason,
                    )
        finally:
            if not ended:  # the client is gone: nobody is to work for it any longer
                flight.link.send(pb.ToWorker(cancel=pb.Cancel(key=flight.key)))
                self._land(flight)

    async def _stopped(self, flight: Flight) -> bool:
        """Cancels a request of which enough has come, and waits for its end, which brings its trace. False when the
        worker does not say so in time."""
        flight.link.send(pb.ToWorker(cancel=pb.Cancel(key=flight.key)))
        try:
            async with asyncio.timeout(STOP_S):
                while not isinstance(event := await flight.next(), Refused):
                    if isinstance(event, Ended) and flight.account.trace is not None:
                        break
        except TimeoutError:
            return False
        return True

    def _submit(self, prompt: Prompt) -> Flight:
        now = time.monotonic()
        hints = PromptHints(prompt.tokens, prompt.salt)
        ask = self._ask(prompt, hints, now)
        view = self.cluster.view
        decision = self._decide(ask, view, now)
        self.decisions.decided(ask, view, now, time.time(), self.spec.policy, decision)
        link = self._links[decision.decode_worker]
        message = pb.ToWorker(submit=_submit_message(self._next_key, prompt, decision))
        placement = self.placements.submitted(decision, ask, now)
        flight = Flight(self._next_key, link, placement, prompt.account)
        self._next_key += 1
        self._flights[flight.key] = flight
        self._expect(flight, hints, ask, now)
        prompt.account.decision, prompt.account.submitted = decision, now
        self.metrics.decided(decision, len(prompt.tokens))
        link.send(message)
        return flight

    def _ask(self, prompt: Prompt, hints: PromptHints, now: float) -> Ask:
        decode_cached, prefill_cached = self.index.match(hints, now)
        return Ask(
            len(prompt.tokens),
            len(prompt.tokens) - 1,
            self.spec.local_below_tokens,
            self.spec.max_prefill_waiting,
            prompt_logprobs=prompt.sampling.prompt_logprobs is not None,
            decode_cached=decode_cached,
            prefill_cached=prefill_cached,
            request_id=prompt.request_id,
            ttft_s=prompt.ttft_s or self.spec.ttft_s,
            itl_s=prompt.itl_s or self.spec.itl_s,
        )

    def _decide(self, ask: Ask, view: View, now: float) -> Decision:
        """Raises Refused."""
        try:
            return choose(self._policy, ask, view, now)
        except NoRoom as error:
            raise Refused(RefusalKind.NO_ROOM, str(error), retry_after_s=RETRY_AFTER_S) from None
        except NoWorker as error:
            raise Refused(RefusalKind.UNAVAILABLE, str(error), retry_after_s=RETRY_AFTER_S) from None
        except PolicyError as error:
            raise Refused(RefusalKind.INTERNAL, f"{self.spec.policy}: {error}") from None

    def _expect(self, flight: Flight, hints: PromptHints, ask: Ask, now: float) -> None:
        """Its workers will soon have the prompt cached."""
        decision, cluster = flight.decision, self.cluster
        placed = [(cluster.decode, decision.decode_worker, ask.decode_cached)]
        if decision.prefill_worker is not None:
            placed.append((cluster.prefill, decision.prefill_worker, ask.prefill_cached))
        for book, worker_id, cached in placed:
            expected = self.index.expect(hints, worker_id, int(cached[book.at(worker_id)]), now)
            if expected is not None:
                flight.expected.append(expected)

    def _land(self, flight: Flight) -> None:
        """The request is over for this router."""
        if self._flights.pop(flight.key, None) is None:
            return
        self.placements.ended(flight.placement)
        for expected in flight.expected:  # it ends without a first token
            self.index.forget(expected)
        flight.expected.clear()

    def _settle(self, flight: Flight, now: float) -> None:
        """Its first token came: what it was expected to leave in the caches will soon be told."""
        for expected in flight.expected:
            self.index.settle(expected, now)
        flight.expected.clear()

    # ---- the workers' side -------------------------------------------------------------------------------------

    def _on_message(self, link: WorkerLink, message: pb.FromWorker) -> None:
        now = time.monotonic()
        for scores in message.prompts:
            flight = self._flights.get(scores.key)
            if flight is not None:
                flight.push(PromptScores(scores.first_index, _logprobs(scores.logprobs)))
        for entry in message.tokens:
            flight = self._flights.get(entry.key)
            if flight is not None:
                if flight.expected:
                    self._settle(flight, now)
                gap_s = self.metrics.tokens(flight.account, entry.choice, len(entry.ids), now)
                self.placements.token(flight.placement, entry.choice, now, gap_s)
                logprobs = _logprobs(entry.logprobs) if entry.HasField("logprobs") else None
                flight.push(NewTokens(entry.first_index, list(entry.ids), entry.choice, logprobs))
        for end in message.ends:
            if end.HasField("trace"):
                self.metrics.traced(end.trace)
            flight = self._flights.get(end.key)
            if flight is not None and end.more:
                self.placements.choice_ended(flight.placement, end.choice)
                flight.push(ChoiceEnded(end.choice, end.reason))
            elif flight is not None:
                flight.push(self._end(flight, end))
                self._land(flight)
        if message.HasField("kv_snapshot") or message.kv_events:
            self._cached(link, message, now)
        if message.HasField("status"):
            self.placements.told(link.member.worker_id, link.member.role, link.status, now)
            if not self.index.synced(link.member.worker_id):
                link.resubscribe(now)

    def _cached(self, link: WorkerLink, message: pb.FromWorker, now: float) -> None:
        """What the worker says of its prefix cache."""
        worker_id = link.member.worker_id
        if message.HasField("kv_snapshot"):
            link.kv_heard = now
            s = message.kv_snapshot
            self.index.snapshot(
                worker_id,
                s.incarnation,
                s.seq,
                s.block_size,
                s.piece,
                s.pieces,
                _hints(s.hashes),
                s.wire_dtype,
            )
        for e in message.kv_events:
            self.index.events(worker_id, e.incarnation, e.seq, _hints(e.added), _hints(e.evicted), e.cleared)

    def _end(self, flight: Flight, end: pb.RequestEnd) -> Ended | Refused:
        if end.HasField("trace"):
            flight.account.trace = _trace(end.trace)
        if end.reason in ("stop", "length"):
            worker = flight.decision.decode_worker
            return Ended(
                end.reason, flight.account.trace or Trace(), worker, flight.decision.reason, end.choice
            )
        if end.reason == "no_room":
            return Refused(RefusalKind.NO_ROOM, f"no room: {end.detail}", retry_after_s=RETRY_AFTER_S)
        if end.reason == "invalid":
            return Refused(RefusalKind.INVALID, end.detail)
        return Refused(RefusalKind.INTERNAL, end.detail or f"the request ended: {end.reason}")

    def _on_down(self, link: WorkerLink, reason: str) -> None:
        self.placements.lost(link.member.worker_id, link.member.role)
        for flight in [f for f in self._flights.values() if f.link is link]:
            flight.push(
                Refused(
                    RefusalKind.UNAVAILABLE,
                    f"{link.member.worker_id} was lost ({reason}); try again",
                    retry_after_s=RETRY_AFTER_S,
                )
            )
            self._land(flight)

    # ---- membership and status ---------------------------------------------------------------------------------

    async def SetMembers(self, members: pb.Members, context: Any) -> pb.MembersAck:
        """`baton.v1.Membership`: the whole list; an older version than the last is ignored."""
        if members.version >= self._members_version:
            self._members_version = members.version
            await self._set_members(list(members.members))
        return pb.MembersAck(version=self._members_version)

    async def _set_members(self, members: list[pb.Member]) -> None:
        wanted = {member.worker_id: member for member in members}
        old = self._links
        self._links = {}
        retired = []
        for worker_id, link in old.items():
            if worker_id in wanted and wanted[worker_id].incarnation == link.member.incarnation:
                self._links[worker_id] = link
            else:
                retired.append(link.retire())
        for worker_id, member in wanted.items():
            if worker_id not in self._links:
                self._links[worker_id] = WorkerLink(member, self.spec.token, self._on_message, self._on_down)
        decode, prefill = (
            [(member.worker_id, member.incarnation) for member in wanted.values() if member.role == role]
            for role in ("decode", "prefill")
        )
        self.cluster.set_workers(
            [worker_id for worker_id, _ in decode], [worker_id for worker_id, _ in prefill]
        )
        self.index.set_workers(decode, prefill)
        for member in members:
            self.placements.book(member.role).set_draining(member.worker_id, member.draining)
        await asyncio.gather(*retired, return_exceptions=True)

    def workers(self) -> Iterator[tuple[api.WorkerStatus, int]]:
        """What each member last said of itself, and how often it was started again."""
        return ((link.status, link.member.restarts) for link in self._links.values())

    def status(self) -> api.StatusResponse:
        return api.StatusResponse(
            router=self.spec.router_id,
            release=RELEASE,
            ready=self.ready,
            active_requests=self.active,
            workers=[link.status for link in self._links.values()],
            policy=self.spec.policy,
            prefix_index=api.PrefixIndex(
                entries=self.index.entries,
                lookups=self.index.lookups,
                hits=self.index.hits,
                resyncs=self.index.resyncs,
                gaps=self.index.gaps,
            ),
        )

    async def close(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links.values()))


def _hints(packed: bytes) -> list[int]:
    """Of `KvEvents` and `KvSnapshot`."""
    hints: list[int] = np.frombuffer(packed, dtype="<u8").tolist()
    return hints


def _submit_message(key: int, prompt: Prompt, decision: Decision) -> pb.Submit:
    return pb.Submit(
        key=key,
        request_id=prompt.request_id,
        prompt=prompt.tokens,
        sampling=_sampling(prompt.sampling),
        prefill_worker=decision.prefill_worker or decision.alternative or "",
        local_below_tokens=decision.local_below_tokens,
        salt=prompt.salt,
        priority=prompt.priority,
        n=prompt.n,
        local=decision.prefill_worker is None and decision.alternative is not None,
        handoff_s=decision.handoff_s,
    )


def _sampling(sampling: SamplingParams) -> pb.EngineSampling:
    return pb.EngineSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        choice=sampling.choice,
        max_tokens=sampling.max_tokens,
        stop_token_ids=sampling.stop_token_ids,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        bias_ids=[token for token, _ in sampling.logit_bias],
        bias=[bias for _, bias in sampling.logit_bias],
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def _logprobs(message: api.Logprobs) -> Logprobs:
    return Logprobs(list(message.chosen), list(message.top_ids), list(message.top))


def _trace(trace: api.Trace) -> Trace:
    names = {
        "prefilled",
        "prefill_worker",
        "cached_tokens",
        "remote_tokens",
        "handoff_bytes",
        "queue_s",
        "handoff_s",
    }
    names |= {"prefill_s", "ttft_s", "decode_s", "fallback"}
    return Trace(**{name: getattr(trace, name) for name in names})
