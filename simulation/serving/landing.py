"""Hand-offs of a simulated decode worker: the same face to the role as the real landing zone, with timed pieces instead
of leases, slots and digests.

A piece is what one step of the prefill worker computed. It takes blocks of the ledger when it has arrived, the oldest
hand-off first, under the rules of `decode.landing`; what finds no block waits, its source stays held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decode.landing import LEAST_PATIENCE_S, PATIENCE, LandingZone
from engine.api import Submit
from engine.ledger import BlockLedger
from engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class TimedHandoff:
    """One hand-off, known to both of its workers. Times are virtual seconds."""

    number: int
    submit: Submit
    sequence: Sequence  # the decode worker's
    to: str  # worker_id of the prefill worker
    start: int  # leading tokens that the decode worker had
    wanted: int  # leading tokens that it wants
    began: float
    deadline: float
    arrived: int = 0  # leading tokens whose KV is at the decode worker, in blocks or not yet
    # What the prefill worker tells in Done.
    queue_s: float = 0.0
    compute_s: float = 0.0
    over: bool = False

    def remaining_blocks(self, ledger: BlockLedger) -> int:
        return ledger.blocks_for(self.wanted) - len(self.sequence.block_table)


class TimedLanding(LandingZone):
    """`begin_at(handoff)` asks the prefill worker and returns why that cannot be; `over(handoff)` is called once for
    each when the decode worker needs nothing more of it."""

    begin_at: Callable[[TimedHandoff], str]
    over: Callable[[TimedHandoff], None]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.open: dict[int, TimedHandoff] = {}  # the oldest first
        self._waits: list[tuple[float, TimedHandoff]] = []  # when to look again

    # ---- what the role asks ------------------------------------------------------------------------------------

    @property
    def open_count(self) -> int:
        return len(self.open)

    @property
    def handoffs(self) -> int:
        return len(self.open)

    @property
    def expecting(self) -> bool:
        return bool(self.open)

    @property
    def reserved_blocks(self) -> int:
        for oldest in self.open.values():
            return max(0, oldest.remaining_blocks(self.blocks))
        return 0

    def connected_peers(self) -> list[str]:
        return []

    def begin(self, submit: Submit, sequence: Sequence, cached: int, now: float) -> str:
        handoff = TimedHandoff(
            self._next_id,
            submit,
            sequence,
            submit.prefill_worker,
            cached,
            sequence.wanted,
            now,
            now + self.timeout_s,
            arrived=cached,
        )
        why = self.begin_at(handoff)
        if why:
            return why
        self._next_id += 1
        sequence.take_prefix(self.blocks, cached)
        self.open[handoff.number] = handoff
        if submit.handoff_s:
            self._waits.append((now + max(LEAST_PATIENCE_S, PATIENCE * submit.handoff_s), handoff))
        return ""

    def cancel(self, sequence: Sequence, reason: str) -> None:
        self._shut(next(one for one in self.open.values() if one.sequence is sequence))

    def stuck(self, others_wait: bool) -> bool:
        for oldest in self.open.values():
            return others_wait or self.blocks.available < oldest.remaining_blocks(self.blocks)
        return False

    def give_up_youngest(self, now: float) -> Sequence:
        youngest = next(reversed(self.open.values()))
        self.fail(youngest, "short of KV blocks", now)
        return youngest.sequence

    def tick(self, now: float, running: int) -> None:
        if not self.open:
            return
        for handoff in [one for one in self.open.values() if now >= one.deadline]:
            self._counters["handoffs_expired"] += 1
            self.fail(handoff, f"not complete after {self.timeout_s:g} s", now)
        self._give_blocks(now)
        self._look(now)

    # ---- what happens to a hand-off ----------------------------------------------------------------------------

    def next_look(self) -> float | None:
        """When something is to be looked at although nothing comes."""
        times = [when for when, handoff in self._waits if not handoff.over]
        times += [handoff.deadline for handoff in self.open.values()]
        return min(times, default=None)

    def fail(self, handoff: TimedHandoff, reason: str, now: float) -> None:
        """What is in blocks stays, the rest is computed here."""
        self._counters["handoffs_failed"] += 1
        self._finish(handoff, reason, now)

    def _shut(self, handoff: TimedHandoff) -> None:
        del self.open[handoff.number]
        handoff.over = True
        self.over(handoff)

    def _finish(self, handoff: TimedHandoff, failure: str, now: float) -> None:
        self._shut(handoff)
        remote = handoff.sequence.computed - handoff.start
        size_bytes = remote * self.hello.kv.token_bytes
        if not failure:
            exposed_s = now - handoff.began - handoff.queue_s - handoff.compute_s
            self._on_timed(handoff.to, size_bytes, exposed_s)
        self._on_end(handoff.sequence, remote, size_bytes, failure, now)

    def _give_blocks(self, now: float) -> None:
        """What has arrived gets its blocks."""
        blocks, oldest = self.blocks, next(iter(self.open.values()), None)
        for handoff in list(self.open.values()):
            sequence = handoff.sequence
            if handoff.arrived > sequence.computed:
                needed = blocks.blocks_for(handoff.arrived) - len(sequence.block_table)
                kept = oldest.remaining_blocks(blocks) if oldest and oldest is not handoff else 0
                taken = blocks.take_landing(needed) if needed + kept <= blocks.available else None
                if taken is None:
                    continue
                blocks.landed(taken)
                sequence.block_table.extend(taken)
                sequence.advance(blocks, handoff.arrived - sequence.computed)
            if sequence.computed >= handoff.wanted:
                self._finish(handoff, "", now)
                oldest = next(iter(self.open.values()), None)

    def _look(self, now: float) -> None:
        """See `LandingZone._look_again`."""
        for entry in [one for one in self._waits if one[0] <= now or one[1].over]:
            self._waits.remove(entry)
            handoff = entry[1]
            if handoff.over or handoff.arrived > handoff.start:
                continue
            waited_s = now - handoff.began
            if self._local_s(handoff.wanted - handoff.start, handoff.start) < waited_s:
                self._counters["handoffs_slipped"] += 1
                self.fail(handoff, f"nothing came for {waited_s:.3f} s; here it is quicker", now)
            else:
                self._waits.append((now + waited_s, handoff))
