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

from baton import RELEASE
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from engine.api import Trace
from router.account import Account
from router.admission import Admission, Ticket
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
from router.worker_messages import hints_of, logprobs_of, submit_message, trace_of

log = logging.getLogger("baton.router")

RETRY_AFTER_S = 1.0
STOP_S = 2.0  # for the end of a request that was stopped: about a step


class Flight:
    """One request under way: what has come for it and was not taken yet. One consumer."""

    __slots__ = (
        "_events", "_untaken", "_waiter", "account", "decision", "expected", "key", "link", "placement", "ticket",
    )  # fmt: skip

    def __init__(
        self, key: int, link: WorkerLink, placement: Placement, ticket: Ticket, account: Account
    ) -> None:
        self.ticket = ticket
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
        self.admission = Admission(spec.tenants, spec.max_queued)
        self._turns: dict[int, tuple[Prompt, asyncio.Future[Flight]]] = {}  # by arrival, of those that wait
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

    @property
    def queued(self) -> int:
        """Requests that wait here for their turn."""
        return len(self.admission)

    async def generate(self, prompt: Prompt) -> AsyncGenerator[Event, bool | None]:
        """See `Dispatcher.generate`."""
        if len(self._flights) >= self.spec.max_active:
            raise Refused(
                RefusalKind.NO_ROOM,
                f"this router has {self.spec.max_active} requests already",
                retry_after_s=RETRY_AFTER_S,
            )
        flight = await self._admit(prompt)
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
            if not ended:  # the client is gone
                self._abandon(flight)

    async def _admit(self, prompt: Prompt) -> Flight:
        """Submits the request when it is its turn. Raises Refused."""
        tokens = len(prompt.tokens) + prompt.n * prompt.sampling.max_tokens
        ticket = self.admission.enter(prompt.tenant, prompt.priority, tokens)
        try:
            if not len(self.admission) and self._has_room():
                self.admission.admitted(ticket)
                return self._submit(prompt, ticket)
            return await self._wait(prompt, ticket)
        except Refused:
            self._spent(ticket, 0)
            raise

    async def _wait(self, prompt: Prompt, ticket: Ticket) -> Flight:
        """In the queue, at most until the deadline."""
        if self.admission.full:
            raise Refused(
                RefusalKind.NO_ROOM,
                f"{self.spec.max_queued} requests wait at this router already",
                retry_after_s=RETRY_AFTER_S,
            )
        turn: asyncio.Future[Flight] = asyncio.get_running_loop().create_future()
        self.admission.wait(ticket)
        self._turns[ticket.arrival] = (prompt, turn)
        limit_s = self.spec.max_queued_s
        if prompt.deadline_s is not None:
            limit_s = min(limit_s, prompt.account.arrived + prompt.deadline_s - time.monotonic())
        flight = None
        try:
            async with asyncio.timeout(max(0.0, limit_s)):
                flight = await turn
            return flight
        except TimeoutError:
            if limit_s < self.spec.max_queued_s:
                raise _too_late(prompt, "it waited for its turn") from None
            raise Refused(
                RefusalKind.NO_ROOM,
                f"no room within {self.spec.max_queued_s:g} s",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        finally:
            self._turns.pop(ticket.arrival, None)
            self.admission.leave(ticket)
            if flight is None and turn.done() and not turn.cancelled() and turn.exception() is None:
                self._abandon(turn.result())  # its turn came while its client left, or its time was over

    def _has_room(self) -> bool:
        """A decode worker would soon begin with one more. True also when there is none: that is told at once."""
        pool = self.cluster.view.decode
        if not pool.usable.any():
            return True
        return bool((pool.candidates & (pool.sequences < pool.max_running + self.spec.worker_queue)).any())

    def _next_turns(self) -> None:
        """Something changed at the workers: whoever can go in now does."""
        while len(self.admission) and self._has_room():
            ticket = self.admission.next()
            if ticket is None:
                return
            prompt, turn = self._turns.pop(ticket.arrival)
            if turn.done():
                continue
            try:
                turn.set_result(self._submit(prompt, ticket))
            except Refused as refused:
                turn.set_exception(refused)

    def _spent(self, ticket: Ticket, tokens: int) -> None:
        """The request used so many tokens; it was counted with `ticket.tokens`."""
        self.admission.give_back(ticket.tenant, ticket.tokens - tokens)
        ticket.tokens = tokens

    def _abandon(self, flight: Flight) -> None:
        """Nobody waits for it any longer: nobody is to work for it either."""
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

    def _submit(self, prompt: Prompt, ticket: Ticket) -> Flight:
        now = time.monotonic()
        hints = PromptHints(prompt.tokens, prompt.salt)
        ask = self._ask(prompt, hints, now)
        view = self.cluster.view
        decision = self._decide(ask, view, now)
        if (
            prompt.deadline_s is not None
            and now + decision.ttft_s > prompt.account.arrived + prompt.deadline_s
        ):
            raise _too_late(
                prompt, f"it would come {now + decision.ttft_s - prompt.account.arrived:.3f} s after"
            )
        self.decisions.decided(ask, view, now, time.time(), self.spec.policy, decision)
        link = self._links[decision.decode_worker]
        message = pb.ToWorker(submit=submit_message(self._next_key, prompt, decision))
        placement = self.placements.submitted(decision, ask, now)
        flight = Flight(self._next_key, link, placement, ticket, prompt.account)
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
            ttft_s=max(0.001, (prompt.ttft_s or self.spec.ttft_s) - (now - prompt.account.arrived)),
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
        account = flight.account
        self._spent(flight.ticket, account.prompt_tokens + account.generated_tokens)
        for expected in flight.expected:  # it ends without a first token
            self.index.forget(expected)
        flight.expected.clear()
        self._next_turns()

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
                flight.push(PromptScores(scores.first_index, logprobs_of(scores.logprobs)))
        for entry in message.tokens:
            flight = self._flights.get(entry.key)
            if flight is not None:
                if flight.expected:
                    self._settle(flight, now)
                gap_s = self.metrics.tokens(flight.account, entry.choice, len(entry.ids), now)
                self.placements.token(flight.placement, entry.choice, now, gap_s)
                logprobs = logprobs_of(entry.logprobs) if entry.HasField("logprobs") else None
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
            self._next_turns()
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
                hints_of(s.hashes),
                s.wire_dtype,
            )
        for e in message.kv_events:
            self.index.events(
                worker_id, e.incarnation, e.seq, hints_of(e.added), hints_of(e.evicted), e.cleared
            )

    def _end(self, flight: Flight, end: pb.RequestEnd) -> Ended | Refused:
        if end.HasField("trace"):
            flight.account.trace = trace_of(end.trace)
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
        self._next_turns()

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
        self._next_turns()
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
            workers=[link.whole_status() for link in self._links.values()],
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


def _too_late(prompt: Prompt, why: str) -> Refused:
    return Refused(
        RefusalKind.TOO_LATE,
        f"the first token cannot come within {1e3 * (prompt.deadline_s or 0):g} ms: {why}",
        param="deadline_ms",
        retry_after_s=RETRY_AFTER_S,
    )
