"""Who may write one chunk into one landing slot: the receiver's book of leases. Pure.

    granted -> landed -> completed              the chunk was copied out; the slot is free again
    granted -> aborted | expired                its slot is quarantined until the writer is quiet or certainly gone
    landed  -> aborted                          its write had settled: the slot is free once the copy ended

Each lease has exactly one outcome. Messages for a closed lease are late: counted and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from engine.ledger import SlotLedger
from engine.lifecycle import Lifecycle
from kvtransfer.messages import ChunkDone, Lease


class LeaseState(Enum):
    GRANTED = "granted"
    LANDED = "landed"
    COMPLETED = "completed"
    ABORTED = "aborted"
    EXPIRED = "expired"


LEASES = Lifecycle(
    "lease",
    {
        LeaseState.GRANTED: {LeaseState.LANDED, LeaseState.ABORTED, LeaseState.EXPIRED},
        LeaseState.LANDED: {LeaseState.COMPLETED, LeaseState.ABORTED},
        LeaseState.COMPLETED: set(),
        LeaseState.ABORTED: set(),
        LeaseState.EXPIRED: set(),
    },
)


@dataclass(slots=True)
class LeaseRecord:
    """One lease as the receiver knows it. `peer` is the incarnation that holds it."""

    lease: Lease
    handoff_id: int
    peer: str
    state: LeaseState = LeaseState.GRANTED
    since: float = 0.0  # when it was granted


class LeaseBook:
    """Grants leases on the slots of one ledger and knows when each slot may be used again."""

    def __init__(self, slots: SlotLedger) -> None:
        self.slots = slots
        self._open: dict[int, LeaseRecord] = {}  # granted or landed
        self._of_handoff: dict[int, set[int]] = {}  # lease ids of `_open`
        self._quarantine: dict[str, dict[int, LeaseRecord]] = {}  # peer -> lease id -> record
        self._next_id = 1
        self.late_messages = 0

    @property
    def open_count(self) -> int:
        return len(self._open)

    def records(self) -> Iterator[tuple[LeaseRecord, bool]]:
        """Every lease whose slot is not free, and whether it is quarantined."""
        for record in self._open.values():
            yield record, False
        for records in self._quarantine.values():
            for record in records.values():
                yield record, True

    def quarantined_peers(self) -> list[str]:
        """Incarnations that some quarantined slot waits for."""
        return list(self._quarantine)

    def grant(
        self, handoff_id: int, peer: str, epoch: int, chunk: int, deadline_s: float, now: float = 0.0
    ) -> Lease | None:
        """A lease on a free slot, or None when there is none."""
        slot = self.slots.lease()
        if slot is None:
            return None
        lease = Lease(self._next_id, epoch, chunk, slot, deadline_s)
        self._next_id += 1
        self._open[lease.lease_id] = LeaseRecord(lease, handoff_id, peer, since=now)
        self._of_handoff.setdefault(handoff_id, set()).add(lease.lease_id)
        return lease

    def landed(self, peer: str, done: ChunkDone) -> LeaseRecord | None:
        """The write settled, says its writer. None (counted late) unless it is for an open lease in every detail."""
        record = self._open.get(done.lease_id)
        if (
            record is None
            or record.state is not LeaseState.GRANTED
            or record.peer != peer
            or record.handoff_id != done.handoff_id
            or record.lease.epoch != done.epoch
            or record.lease.chunk != done.chunk
        ):
            self.late_messages += 1
            return None
        record.state = LEASES.move(record.state, LeaseState.LANDED)
        return record

    def copied_out(self, lease_id: int, *, used: bool) -> None:
        """The slot of a landed lease was copied out; `used`: the copy was verified and is being used."""
        record = self._close(lease_id)
        record.state = LEASES.move(record.state, LeaseState.COMPLETED if used else LeaseState.ABORTED)
        self.slots.free_slot(record.lease.slot)

    def abandon(self, handoff_id: int, *, expired: bool = False) -> int:
        """Closes the hand-off's granted leases and quarantines their slots; returns how many. Landed ones go on to
        `copied_out`, since their writes have settled."""
        closed = 0
        for lease_id in list(self._of_handoff.get(handoff_id, ())):
            record = self._open[lease_id]
            if record.state is LeaseState.GRANTED:
                self._close(lease_id)
                record.state = LEASES.move(
                    record.state, LeaseState.EXPIRED if expired else LeaseState.ABORTED
                )
                self.slots.quarantine(record.lease.slot)
                self._quarantine.setdefault(record.peer, {})[lease_id] = record
                closed += 1
        return closed

    def quiet(self, peer: str, handoff_id: int, epoch: int) -> int:
        """The writer is quiet (0: all its hand-offs of epochs up to `epoch`): ends quarantines, returns how many."""
        return self._end_quarantine(
            peer,
            [
                lease_id
                for lease_id, record in self._quarantine.get(peer, {}).items()
                if record.lease.epoch <= epoch and handoff_id in (0, record.handoff_id)
            ],
        )

    def gone(self, peer: str) -> int:
        """The writer is dead and nothing of it can still arrive: ends its quarantines, returns how many."""
        return self._end_quarantine(peer, list(self._quarantine.get(peer, {})))

    def _end_quarantine(self, peer: str, lease_ids: list[int]) -> int:
        records = self._quarantine.get(peer, {})
        for lease_id in lease_ids:
            self.slots.end_quarantine(records.pop(lease_id).lease.slot)
        if not records:
            self._quarantine.pop(peer, None)
        return len(lease_ids)

    def _close(self, lease_id: int) -> LeaseRecord:
        record = self._open.pop(lease_id)
        mine = self._of_handoff[record.handoff_id]
        mine.discard(lease_id)
        if not mine:
            del self._of_handoff[record.handoff_id]
        return record
