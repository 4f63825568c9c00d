"""The prefill worker of a serving simulation: the real scheduler and ledger, and hand-offs as timed pieces.

What `prefill.role` does, without leases, slots, digests and peers that come and go: computes prompts, gives each step's
KV to the link, holds the blocks until the decode worker needs nothing more, and lets the youngest give way when no
prompt finds a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from engine.api import KvEvents, Load, RequestKey
from engine.ledger import BlockLedger, counts
from engine.plan import StepPlan, StepResult
from engine.scheduler import Limits, Scheduler
from engine.sequence import Phase, Sequence
from prefill.role import STARVED_S
from simulation.serving.landing import TimedHandoff


@dataclass(slots=True, eq=False)
class Source:
    """A hand-off here. `sent`: leading tokens that the link was given, or that the decode worker had."""

    handoff: TimedHandoff
    sequence: Sequence
    sent: int
    began: float
    scheduled: float | None = None


# `send(source, tokens, last, step_s)`: so many more tokens are computed, by a step that took so long.
Send = Callable[[Source, int, bool, float], None]
Fail = Callable[[TimedHandoff, str], None]


class PrefillSide:
    """State of one prefill worker, driven by `simulation.serving.worker` as a role is."""

    def __init__(
        self,
        blocks: BlockLedger,
        limits: Limits,
        max_waiting: int,
        token_bytes: int,
        names: Callable[[TimedHandoff], list[bytes]],
        send: Send,
        fail: Fail,
    ) -> None:
        self.blocks = blocks
        self.scheduler = Scheduler(blocks, limits, urgent_preempts=False)
        self.counters: Counter[str] = Counter()
        self.step_s = 0.0  # of the step that is being committed
        self._max_waiting = max_waiting
        self._token_bytes = token_bytes
        self._names = names
        self._send = send
        self._fail = fail
        self._sources: dict[RequestKey, Source] = {}  # the oldest first
        self._of: dict[TimedHandoff, Source] = {}
        self._next = 1
        self._starved_since: float | None = None

    # ---- what the step loop asks -------------------------------------------------------------------------------

    @property
    def at_rest(self) -> bool:
        return not self._sources

    def load(self) -> Load:
        scheduler = self.scheduler
        return Load(
            step=scheduler.step,
            waiting=scheduler.waiting,
            running=scheduler.running,
            waiting_tokens=scheduler.waiting_tokens,
            handoffs=len(self._sources),
            ledger=counts(self.blocks),
            queue=scheduler.queue(self._max_waiting - scheduler.waiting, self._token_bytes),
        )

    def kv_events(self, limit: int) -> KvEvents | None:
        return self.blocks.journal.take(limit)

    def tick(self, now: float) -> None:
        """Deadlines are the decode worker's, which aborts."""

    def schedule(self, now: float) -> StepPlan | None:
        plan = self.scheduler.schedule()
        while plan is None and self._unstick(now):
            plan = self.scheduler.schedule()
        if plan is not None:
            self._starved_since = None
            for sequence in self.scheduler.admitted:
                source = self._sources[sequence.request]
                source.scheduled = now
                source.handoff.queue_s = now - source.began
                self.counters["cached_tokens"] += sequence.computed
                self._pump(source, False, 0.0)
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> None:
        for progress in self.scheduler.commit(plan, result):
            sequence = progress.sequence
            source = self._sources[sequence.request]
            complete = not sequence.remaining
            if complete:
                self.counters["prompt_tokens"] += sequence.prompt_length
                self.scheduler.detach(sequence)
                assert source.scheduled is not None
                source.handoff.compute_s = now - source.scheduled
            self._pump(source, complete, self.step_s)

    # ---- hand-offs ---------------------------------------------------------------------------------------------

    def begin(self, handoff: TimedHandoff, now: float) -> None:
        """A decode worker asks."""
        if handoff.over:
            return
        needed = self.blocks.blocks_for(handoff.wanted)
        if needed > self.blocks.total:
            self._fail(handoff, f"the prompt needs {needed} KV blocks, there are {self.blocks.total}")
        elif self.scheduler.waiting >= self._max_waiting:
            self._fail(handoff, f"no room: {self._max_waiting} hand-offs wait already")
        else:
            key = RequestKey(0, self._next)
            self._next += 1
            submit = handoff.submit
            sequence = Sequence(key, submit.prompt[: handoff.wanted], None, submit.salt, submit.priority)
            sequence.hashes = self._names(handoff)[: handoff.wanted // self.blocks.block_size]
            source = Source(handoff, sequence, handoff.start, now)
            self._sources[key] = self._of[handoff] = source
            self.counters["accepted"] += 1
            self.scheduler.add(sequence)

    def over(self, handoff: TimedHandoff, now: float) -> None:
        """The decode worker needs nothing more of it."""
        source = self._of.get(handoff)
        if source is not None:
            self._remove(source)

    def _pump(self, source: Source, last: bool, step_s: float) -> None:
        new = source.sequence.computed - source.sent
        if new > 0 or last:
            source.sent = max(source.sent, source.sequence.computed)
            self._send(source, max(0, new), last, step_s)

    def _remove(self, source: Source) -> None:
        sequence = source.sequence
        if sequence.phase is Phase.FINISHED:
            sequence.drop_blocks(self.blocks)
        else:
            self.scheduler.remove(sequence)
        del self._sources[sequence.request]
        del self._of[source.handoff]
        self._starved_since = None

    def next_look(self) -> float | None:
        """When a prompt that finds no block has waited long enough."""
        return None if self._starved_since is None else self._starved_since + STARVED_S

    def _unstick(self, now: float) -> bool:
        """See `PrefillRole._unstick`."""
        if not self.scheduler.has_work:
            self._starved_since = None
            return False
        if self._starved_since is None:
            self._starved_since = now
        holders = [one for one in self._sources.values() if len(one.sequence.block_table)]
        leaving = any(one.sequence.phase is Phase.FINISHED for one in holders)
        if not holders or (leaving and now < self._starved_since + STARVED_S):
            return False
        self._starved_since = now
        self.counters["starved"] += 1
        youngest = holders[-1]
        self._remove(youngest)
        self._fail(youngest.handoff, "the prefill worker is short of KV blocks")
        return True
