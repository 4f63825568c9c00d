"""The decode role: every decision of a decode worker, pure. Events and `now` in, actions out.

    arrived -> [parked until another request has computed the same prefix]
            -> hand-off (fetch the KV from a prefill worker) or straight to the scheduler (prefill here)
            -> the scheduler runs the rest of the prompt, the last token always here, then decodes -> ended

The step loop of `worker.loop` feeds it and carries out its actions; the simulator and the tests do the same with
virtual time. It never waits, never reads a clock, and costs nothing for what is idle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from decode.landing import LandingZone
from decode.request import Request, open_request
from decode.states import REQUESTS, State
from engine.api import (
    Cancel,
    EndReason,
    KvEvents,
    Load,
    PromptEntry,
    RequestEnd,
    RequestKey,
    StepOutput,
    Submit,
    TokenEntry,
)
from engine.costs import StepModel, prompt_attention, prompts_s
from engine.ledger import BlockLedger, SlotLedger, counts
from engine.plan import StepPlan, StepResult
from engine.scheduler import Limits, Scheduler
from engine.sequence import Sequence
from kvtransfer.messages import Hello, MoverReport
from worker.messages import FromPeer, PeerLost, PeerUp, SessionLost, ToEngine
from worker.role import Action, HeldLease, Owner


class DecodeRole:
    """State of one decode worker. `slots` empty (a colocated deployment) means: everything is prefilled here."""

    def __init__(
        self,
        hello: Hello,
        blocks: BlockLedger,
        slots: SlotLedger,
        limits: Limits,
        *,
        max_waiting: int = 512,
        handoff_timeout_s: float = 30.0,
        landing: type[LandingZone] = LandingZone,
    ) -> None:
        self.blocks = blocks
        self.slots = slots
        self.scheduler = Scheduler(blocks, limits)
        self.counters: Counter[str] = Counter()
        self.costs = StepModel()
        self._actions: list[Action] = []
        self._requests: dict[RequestKey, Request] = {}
        # In order: a lost session cancels its requests in the order in which they came, in every process.
        self._by_session: dict[int, dict[RequestKey, None]] = {}
        self._parked: dict[
            bytes, list[Request]
        ] = {}  # by the hash that they wait for; key present = owner at work
        self._max_waiting = max_waiting
        self._planned_at = 0.0
        self._wire_dtype = hello.kv.wire_dtype
        self._sequences = 0  # of all requests: choices, or the trunks that they will fork from
        self.landing = landing(
            hello,
            blocks,
            slots,
            handoff_timeout_s,
            self.counters,
            self._actions,
            on_end=self._handoff_ended,
            on_timed=self._handoff_timed,
            local_s=self._local_s,
        )

    # ---- what the step loop asks -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True when a step might run now without any further event."""
        return self.scheduler.has_work

    @property
    def expecting(self) -> bool:
        """True while peers may write into this worker's slots."""
        return self.landing.expecting

    @property
    def at_rest(self) -> bool:
        return not self._requests and not self.landing.open_count

    def drain(self) -> list[Action]:
        """What is to be done since the last call, in order."""
        actions = self._actions[:]
        self._actions.clear()
        return actions

    def load(self) -> Load:
        return Load(
            step=self.scheduler.step,
            waiting=self.scheduler.waiting + sum(map(len, self._parked.values())),
            running=self.scheduler.running,
            waiting_tokens=self.scheduler.waiting_tokens,
            handoffs=self.landing.handoffs,
            ledger=counts(self.blocks, self.slots),
            peers=self.landing.connected_peers(),
            counters={
                **self.counters,
                "preemptions": self.scheduler.preemptions,
                "evictions": self.blocks.evictions,
                "late_messages": self.landing.leases.late_messages,
            },
            queue=self.scheduler.queue(
                self._max_waiting - self._sequences + self.scheduler.running,
                self.landing.hello.kv.token_bytes,
            ),
        )

    def kv_events(self, limit: int) -> KvEvents | None:
        return self.blocks.journal.take(limit)

    def owners(self) -> Iterator[Owner]:
        for request in self._requests.values():
            blocks = [block for sequence in request.live for block in sequence.held]
            name, state = request.submit.request_id, request.state.value
            yield Owner(name, "request", state, blocks, request.submitted)
        if self.scheduler.copied:
            yield Owner("", "step", "forks", self.scheduler.copied, self._planned_at)
        yield from self.landing.owners()

    def leases(self) -> Iterator[HeldLease]:
        for record, quarantined in self.landing.leases.records():
            lease = record.lease
            state = "quarantined" if quarantined else record.state.value
            yield HeldLease(record.peer, record.handoff_id, lease.chunk, lease.slot, state, record.since)

    def check(self) -> None:
        """The integrity check; raises LedgerError."""
        self.blocks.check(at_rest=self.at_rest)
        owners = list(self.owners())
        self.blocks.check_owners(
            [owner.blocks for owner in owners if not owner.landing],
            [owner.blocks for owner in owners if owner.landing],
        )
        self.slots.check(at_rest=self.at_rest)

    # ---- events ------------------------------------------------------------------------------------------------

    def handle(self, event: ToEngine, now: float) -> None:
        if isinstance(event, Submit):
            self._submit(event, now)
        elif isinstance(event, Cancel):
            self._cancel(event.request, now)
        elif isinstance(event, SessionLost):
            for key in list(self._by_session.get(event.session, ())):
                self._cancel(key, now)
        elif isinstance(event, PeerUp):
            self.landing.peer_up(event.hello, now)
        elif isinstance(event, PeerLost):
            self.landing.peer_lost(event.peer, event.epoch, now)
        elif isinstance(event, FromPeer):
            self.landing.from_peer(event, now)

    def report(self, report: MoverReport, now: float) -> None:
        self.landing.report(report, now)

    def tick(self, now: float) -> None:
        """Deadlines and credits; call it after the events of a turn, so that news beats time-outs."""
        self.landing.tick(now, self.scheduler.running)

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        self.scheduler.reserved = self.landing.reserved_blocks
        plan = self.scheduler.schedule()
        while plan is None and self._unstick(now):
            self.scheduler.reserved = self.landing.reserved_blocks
            plan = self.scheduler.schedule()
        if plan is not None:
            self._planned_at = now
            for sequence in self.scheduler.admitted:
                self._admitted(self._requests[sequence.request], now)
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> None:
        output = StepOutput(plan.step, [], [], [])
        for progress in self.scheduler.commit(plan, result):
            sequence = progress.sequence
            request = self._requests[sequence.request]
            key = request.submit.request
            if progress.scores is not None:
                first = sequence.scored - len(progress.scores.chosen)
                output.prompts.append(PromptEntry(key, first, progress.scores))
            if progress.token is None:
                if request.ready_to_fork:
                    self.scheduler.detach(sequence)
                    self._fork(request)
                continue
            if request.first_token is None:
                self._first_token(request, now)
            output.tokens.append(
                TokenEntry(key, sequence.generated - 1, [progress.token], progress.logprobs, sequence.choice)
            )
            if progress.end is not None:
                output.ends.append(self._choice_ended(request, sequence, progress.end, now))
        self._actions.append(output)

    def _unstick(self, now: float) -> bool:
        """Nothing could run: lets the youngest that holds blocks give way. False when time must help.

        Hand-offs are younger than what waits with blocks, which is younger than what runs.
        """
        if not self.scheduler.running and self.landing.stuck(self.scheduler.landed_waiting > 0):
            sequence = self.landing.give_up_youngest(now)
            if len(sequence.block_table):
                self.scheduler.give_way()  # it is the last of those that landed
            return True
        if self.scheduler.running or not self.landing.open_count:
            return self.scheduler.give_way() is not None
        return False

    # ---- the life of a request ---------------------------------------------------------------------------------

    def _submit(self, submit: Submit, now: float) -> None:
        refusal = self._refusal(submit)
        if refusal:
            self.counters["refused"] += 1
            self._actions.append(RequestEnd(submit.request, *refusal))
            return
        request = open_request(submit, now, self._wire_dtype)
        self._sequences += len(request.live)
        self._requests[submit.request] = request
        self._by_session.setdefault(submit.request.session, {})[submit.request] = None
        self.counters["accepted"] += 1
        self._place(request, now)

    def _refusal(self, submit: Submit) -> tuple[EndReason, str] | None:
        """Why the request cannot be taken, None when it can."""
        if submit.request in self._requests:
            return "invalid", f"request {submit.request_id!r} is running already"
        if not submit.prompt or submit.sampling.max_tokens < 1 or submit.n < 1:
            return "invalid", "a request needs a prompt, n of at least 1 and max_tokens of at least 1"
        tokens = len(submit.prompt) + submit.sampling.max_tokens
        needed = self.blocks.blocks_for(tokens)
        if needed > self.blocks.total:
            return "invalid", (
                f"{tokens} tokens (prompt and max_tokens) need {needed} KV blocks, this worker has "
                f"{self.blocks.total}: lower max_tokens, or raise decode.kv_cache_gib"
            )
        if self._sequences - self.scheduler.running >= self._max_waiting:
            return "no_room", f"{self._max_waiting} requests wait already"
        return None

    def _place(self, request: Request, now: float) -> None:
        """Where the prompt is computed: after a twin that is at it, by a prefill worker, or here."""
        sequence, submit = request.sequence, request.submit
        if sequence.targets:  # hand-offs and caches bring KV, not the logits that its log-probabilities need
            self.counters["local"] += 1
            self._queue(request, now)
            return
        wanted = sequence.wanted
        cached = sequence.match_prefix(self.blocks, wanted)
        full = cached // self.blocks.block_size
        if full < wanted // self.blocks.block_size:  # not the last token's block: it is computed anew anyway
            missing = sequence.hashes[full]
            if missing in self._parked:
                self._parked[missing].append(request)
                if request.state is State.ARRIVED:
                    request.state = REQUESTS.move(request.state, State.PARKED)
                return
            self._parked[missing] = []
            request.awaited = missing
        uncached = wanted - cached
        if submit.prefill_worker:
            if uncached < max(1, submit.local_below_tokens):
                # The router could not know how much is cached here.
                self.counters["turned_local"] += not submit.local
            else:
                why = self.landing.begin(request.submit, sequence, cached, now)
                if not why:
                    request.state = REQUESTS.move(request.state, State.HANDOFF)
                    request.begun = now
                    request.trace.cached_tokens = cached
                    request.trace.prefill_worker = submit.prefill_worker
                    self.counters["remote"] += 1
                    self.counters["turned_remote"] += submit.local
                    return
                request.trace.fallback = why
                self.counters["fallbacks"] += 1
        self.counters["local"] += 1
        if not request.choices and not uncached:  # a trunk of which nothing is left to compute
            sequence.take_prefix(self.blocks, cached)
            request.begun = now
            request.trace.cached_tokens = cached
        self._queue(request, now)

    def _handoff_timed(self, peer: str, size_bytes: int, exposed_s: float) -> None:
        self.costs.handed_off(peer, size_bytes, exposed_s)

    def _local_s(self, uncached: int, cached: int) -> float:
        """Until so many more tokens of a prompt would be computed here, after what waits already."""
        queue = self.scheduler.queue(0, 0)
        return float(
            prompts_s(
                self.costs.step,
                self.scheduler.running,
                queue.kv_tokens,
                queue.prompt_tokens + self.scheduler.waiting_tokens + uncached,
                queue.attention + prompt_attention(uncached, cached),
                max(1, queue.step_tokens - self.scheduler.running),
            )
        )

    def _queue(self, request: Request, now: float) -> None:
        request.state = REQUESTS.move(request.state, State.PREFILL)
        request.queued = now
        if request.ready_to_fork:
            self._fork(request)
        else:
            for sequence in request.live:
                self.scheduler.add(sequence)

    def _fork(self, request: Request) -> None:
        """The prompt's KV is there: from here on every choice goes its own way."""
        for sequence in request.fork(self.blocks):
            self.scheduler.add(sequence)
        self._sequences += request.submit.n - 1
        self.counters["forks"] += request.submit.n

    def _handoff_ended(
        self, sequence: Sequence, remote_tokens: int, size_bytes: int, failure: str, now: float
    ) -> None:
        """The landing zone is done with it: what was verified is in its blocks, the rest is computed here."""
        request = self._requests[sequence.request]
        trace = request.trace
        trace.handoff_s = now - (request.begun or now)
        trace.remote_tokens = remote_tokens
        trace.handoff_bytes = size_bytes
        if failure:
            trace.fallback = failure
            self.counters["fallbacks"] += 1
        self._queue(request, now)

    def _admitted(self, request: Request, now: float) -> None:
        if request.begun is None:
            request.begun = now
            request.trace.cached_tokens = request.sequence.computed
        if request.trace.queue_s == 0.0:
            request.trace.queue_s = request.begun - request.submitted

    def _first_token(self, request: Request, now: float) -> None:
        request.first_token = now
        request.state = REQUESTS.move(request.state, State.DECODING)
        trace = request.trace
        trace.prefill_s = now - request.queued
        trace.ttft_s = now - request.submitted
        prompt = len(request.submit.prompt)
        computed_here = prompt - trace.cached_tokens - trace.remote_tokens
        if trace.remote_tokens:
            trace.prefilled = "remote" if computed_here <= 1 else "mixed"
        elif trace.cached_tokens and computed_here <= self.blocks.block_size:
            trace.prefilled = "cached"
        self.counters[f"prefilled_{trace.prefilled}"] += 1
        self.counters["prompt_tokens"] += prompt
        self.counters["cached_tokens"] += trace.cached_tokens
        self.counters["remote_tokens"] += trace.remote_tokens
        self.counters["handoff_bytes"] += trace.handoff_bytes
        self._wake_parked(request, now)

    def _cancel(self, key: RequestKey, now: float) -> None:
        request = self._requests.get(key)
        if request is None:
            return  # it ended while the cancel was on its way
        if request.state is State.PARKED:
            for parked in self._parked.values():
                if request in parked:
                    parked.remove(request)
        if request.state is State.HANDOFF:
            self.landing.cancel(request.sequence, "cancelled")
        for sequence in request.live:
            self.scheduler.remove(sequence)
            self._sequences -= 1
            self.counters["generated_tokens"] += sequence.generated
        self.counters["cancelled"] += 1
        self._actions.append(self._end(request, 0, "cancelled", now))

    def _choice_ended(
        self, request: Request, sequence: Sequence, reason: EndReason, now: float
    ) -> RequestEnd:
        request.choices.remove(sequence)
        self._sequences -= 1
        self.counters["generated_tokens"] += sequence.generated
        if request.choices:
            more = len(request.choices)
            return RequestEnd(request.submit.request, reason, choice=sequence.choice, more=more)
        return self._end(request, sequence.choice, reason, now)

    def _end(self, request: Request, choice: int, reason: EndReason, now: float) -> RequestEnd:
        request.state = REQUESTS.move(request.state, State.ENDED)
        if request.first_token is not None:
            request.trace.decode_s = now - request.first_token
        key = request.submit.request
        del self._requests[key]
        session = self._by_session[key.session]
        session.pop(key, None)
        if not session:
            del self._by_session[key.session]
        self._wake_parked(request, now)
        return RequestEnd(key, reason, trace=request.trace, choice=choice)

    def _wake_parked(self, request: Request, now: float) -> None:
        """The request's prefix is there, or will not come from it: whoever waited for it is placed anew."""
        if request.awaited is None:
            return
        woken = self._parked.pop(request.awaited)
        request.awaited = None
        for parked in woken:
            self._place(parked, now)
