"""Workers whose every move is asked for from outside: real roles, real movers without their threads, KV in real torch
pools, a loopback fabric, control streams. `loopback_cluster` holds several of them.

    inbox --+                  +--> stream --> the other worker's inbox
    reports-+--> [ role turn ]-+--> jobs ----> [ mover ] --> fabric --> the other worker's slots
            +<-----------------------------------+

A turn is that of `worker.loop`, cut in two: what the mover and the fabric do while a step computes is a choice, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from decode.role import DecodeRole
from engine.api import RequestEnd, StepOutput
from engine.ledger import BlockLedger, SlotLedger
from engine.plan import StepPlan, StepResult
from engine.scheduler import Limits
from engine.sequence import Sequence
from kvtransfer.leases import LeaseRecord
from kvtransfer.loopback import LoopbackFabric, LoopbackFaults, _Landing, _Write
from kvtransfer.messages import (
    Connect,
    ControlMessage,
    CopyOut,
    Disconnect,
    Hello,
    KvSpec,
    MoverReport,
    Probe,
    SendChunk,
)
from kvtransfer.mover import Mover
from prefill.role import PrefillRole
from simulation.model import draw, kv_of
from worker.messages import FromPeer, PeerLost, PeerRefused, PeerUp, ToEngine, ToPeer

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 4
CHUNK_TOKENS = 8
SLOT_BYTES = CHUNK_TOKENS * 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
UNWRITTEN = 0x7FC0DEAD  # a NaN
_LANES = np.arange(1, 2 * LAYERS * KV_HEADS * HEAD_DIM + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

Words = npt.NDArray[np.uint32]

# What may happen to one write; one that is "dirty" may spoil a slot that the rules of the wire had freed for others.
FAULTS = {
    "": LoopbackFaults(delay=(0, 6), reorder=True),
    "slow": LoopbackFaults(delay=(20, 80), reorder=True),
    "lose": LoopbackFaults(lose=1.0),
    "fail": LoopbackFaults(fail=1.0, delay=(0, 4), reorder=True),
    "duplicate": LoopbackFaults(duplicate=1.0),
    "corrupt": LoopbackFaults(corrupt=1.0),
}
DIRTY = ("fail", "duplicate", "corrupt")


class Pool:
    """A KV pool of float32 layers and a model over it. The KV of a position is a hash of all tokens up to it."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        shape = (2, blocks, block_size, KV_HEADS, HEAD_DIM)
        self._words: list[Words] = [np.full(shape, UNWRITTEN, dtype=np.uint32) for _ in range(LAYERS)]
        self.layers = [torch.from_numpy(words.view(np.float32)) for words in self._words]

    def run(self, plan: StepPlan, sequences: list[Sequence]) -> StepResult:
        """Computes a step; AssertionError when what it reads is not, bit for bit, what the sequence demands."""
        for source, target in plan.copies:
            for words in self._words:
                words[:, target] = words[:, source]
        sampled = []
        for row, sequence in zip(plan.rows, sequences, strict=True):
            start, end = row.start, row.start + len(row.tokens)
            assert row.tokens == sequence.tokens[start:end]
            kv = kv_of(sequence.tokens[:end], sequence.salt, [])
            right = _words_of(kv)
            at = np.arange(end)
            blocks, offsets = row.block_table.ids[at // self.block_size], at % self.block_size
            for layer, words in enumerate(self._words):
                found = words[:, blocks[:start], offsets[:start]]
                wrong = np.flatnonzero((found != right[layer][:, :start]).any(axis=(0, 2, 3)))
                assert not len(wrong), (
                    f"{sequence.request}: KV of position {wrong[0]} of {start} is not its own"
                )
                words[:, blocks[start:], offsets[start:]] = right[layer][:, start:]
            sampled.append(draw(kv[-1], row.sampling, end) if row.sampling else -1)
        return StepResult(sampled)


def _words_of(kv: list[int]) -> Words:
    """[layers, 2, tokens, kv_heads, head_dim]: no two words are alike, so a misplaced one shows."""
    mixed = (np.array(kv, dtype=np.uint64)[:, None] ^ _LANES) * np.uint64(0xD6E8FEB86659FD93)
    words = (mixed >> np.uint64(32)).astype(np.uint32).reshape(len(kv), LAYERS, 2, KV_HEADS, HEAD_DIM)
    return words.transpose(1, 2, 0, 3, 4)


class WatchedFabric(LoopbackFabric):
    """Cuts each write in three, so that slots are torn, and sees what lands where it has no right to."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.workers: dict[str, Worker] = {}  # every incarnation that ever was
        self.job: SendChunk | None = None  # whose write is being posted
        self.coming: deque[str] = deque()  # faults of the next writes
        self.seen: set[str] = set()  # faults that struck
        self._writes_of: dict[tuple[str, int], tuple[SendChunk, str]] = {}  # by incarnation and ticket

    def post(self, write: _Write) -> None:
        assert self.job is not None
        fault = self.coming.popleft() if self.coming else ""
        self._writes_of[write.source.incarnation, write.ticket] = (self.job, fault)
        self.faults = FAULTS[fault]
        self.seen.add(fault)
        staging, landing, size = (int(value) for value in write.rows[0])
        cuts = [0, size // 3, size // 2, size]
        pieces = [(staging + begin, landing + begin, end - begin) for begin, end in pairwise(cuts)]
        write.rows = np.array(pieces, dtype=np.uint64)
        write.left, write.sent = len(pieces), [None] * len(pieces)
        super().post(write)

    def lost(self) -> list[tuple[str, str]]:
        """Sender and receiver of each write that settles only when one of them is dead."""
        found = []
        for write in self._writes:
            source, target = write.source.incarnation, write.target.incarnation
            if self._writes_of[source, write.ticket][1] == "lose" and source not in self._dead:
                found.append((source, target))
        return found

    def _land(self, landing: _Landing) -> None:
        write = landing.write
        source, target = write.source.incarnation, write.target.incarnation
        job, fault = self._writes_of[source, write.ticket]
        travels = write.sent[landing.row] is not None or source not in self._dead
        if travels and target not in self._dead and fault not in DIRTY:
            record = self.workers[target].leases.get(job.lease.lease_id)
            assert record is not None and (record.peer, record.lease.slot) == (source, job.lease.slot), (
                f"bytes of lease {job.lease.lease_id} landed in slot {job.lease.slot} after the lease had ended"
            )
        super()._land(landing)


class SteppedMover(Mover):
    """The real mover without its thread: whoever holds it takes the thread's steps, one by one."""

    fabric: WatchedFabric

    def _run(self) -> None:
        """The thread ends at once."""

    def take_job(self) -> bool:
        """The next job of the queue; False when there is none."""
        if self._jobs.empty():
            return False
        self._do(self._jobs.get_nowait())
        return True

    def send_next(self) -> bool:
        """Posts the next chunk; False when none waits, or none may take a staging buffer."""
        could = self._next_peer() is not None
        self._send_next()
        return could

    def poll(self) -> None:
        """Learns which writes have settled. A tick passes."""
        self._poll()

    def moves(self) -> dict[str, Callable[[], object]]:
        """What the thread might do next."""
        possible: dict[str, Callable[[], object]] = {}
        if not self._jobs.empty():
            possible["does a job"] = self.take_job
        if self._next_peer() is not None:
            possible["sends a chunk"] = self.send_next
        if self._in_flight:
            possible["polls"] = self.poll
        return possible

    def _send(self, job: SendChunk) -> str:
        self.fabric.job = job
        return super()._send(job)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the workers of a cluster are like."""

    decodes: int
    prefills: int
    decode_blocks: int  # of 4 tokens
    prefill_blocks: int
    prefill_block_size: int
    slots: int
    staging: int
    limits: Limits
    max_waiting: int
    timeout_s: float


class Worker:
    """One incarnation of a worker. It moves only when `begin_step`, `finish_step` or its mover is called."""

    def __init__(self, fabric: WatchedFabric, size: Size, worker_id: str, life: int, *, decode: bool) -> None:
        self.worker_id, self.incarnation, self.decode = worker_id, f"{worker_id}.{life}", decode
        block_size = 4 if decode else size.prefill_block_size
        ledger = BlockLedger(size.decode_blocks if decode else size.prefill_blocks, block_size)
        slots, staging = (size.slots, 0) if decode else (0, size.staging)
        kv = KvSpec(
            model="hashes",
            layers=LAYERS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype="float32",
            block_size=block_size,
            chunk_tokens=CHUNK_TOKENS,
        )
        endpoint = fabric.open(
            self.incarnation, staging_bytes=staging * SLOT_BYTES, landing_bytes=slots * SLOT_BYTES
        )
        self.hello = Hello(
            worker_id=worker_id,
            incarnation=self.incarnation,
            kv=kv,
            transport="loopback",
            endpoint=endpoint.describe(),
            slot_count=slots,
            slot_bytes=SLOT_BYTES,
        )
        self.role: DecodeRole | PrefillRole
        if decode:
            self.role = DecodeRole(
                self.hello,
                ledger,
                SlotLedger(slots),
                size.limits,
                max_waiting=size.max_waiting,
                handoff_timeout_s=size.timeout_s,
            )
        else:
            self.role = PrefillRole(self.hello, ledger, size.limits, max_waiting=size.max_waiting)
        self.pool = Pool(ledger.total, block_size)
        self.reports: deque[MoverReport] = deque()
        self.mover = SteppedMover(
            endpoint,
            self.pool.layers,
            kv,
            slot_bytes=SLOT_BYTES,
            on_report=self.reports.append,
            send_control=lambda peer, done: self._send(peer, done.epoch, done),
            on_fatal=lambda error: None,
        )
        self.mover.fabric = fabric
        fabric.workers[self.incarnation] = self
        self.inbox: deque[ToEngine] = deque()
        self.said: list[StepOutput | RequestEnd] = []  # for the router
        self.links: dict[str, Stream] = {}  # by the peer's incarnation
        self.plan: StepPlan | None = None  # a step that computes
        self.alive, self.frozen = True, False

    @property
    def moves(self) -> bool:
        return self.alive and not self.frozen

    @property
    def leases(self) -> dict[int, LeaseRecord]:
        """All leases whose slots are not free."""
        assert isinstance(self.role, DecodeRole)
        book = self.role.landing.leases
        return book._open | {i: r for records in book._quarantine.values() for i, r in records.items()}

    def begin_step(self, now: float) -> bool:
        """The first half of a turn; True when a step computes from now on."""
        assert self.plan is None
        while self.inbox:
            self.role.handle(self.inbox.popleft(), now)
        while self.reports:
            self.role.report(self.reports.popleft(), now)
        self.role.tick(now)
        self.plan = self.role.schedule(now)
        self._carry_out()
        return self.plan is not None

    def finish_step(self, now: float) -> None:
        """The other half: the step was computed."""
        plan, self.plan = self.plan, None
        assert plan is not None
        self.role.commit(plan, self.pool.run(plan, self.role.scheduler.planned), now)
        self._carry_out()

    def _carry_out(self) -> None:
        for action in self.role.drain():
            if isinstance(action, ToPeer):
                self._send(action.peer, action.epoch, action.message)
            elif isinstance(action, Connect | Disconnect | SendChunk | CopyOut | Probe):
                self.mover.submit(action)
            elif not isinstance(action, PeerRefused):
                self.said.append(action)

    def _send(self, peer: str, epoch: int, message: ControlMessage) -> None:
        """As the shell: what is for a stream that is not the peer's latest, or has broken, is dropped."""
        stream = self.links.get(peer)
        if stream is not None and stream.epoch == epoch and not stream.cut:
            stream.end_of(stream.other(self)).queue.append(message)


class Opening(Enum):
    DIALLED = "dialled"
    OPEN = "open"
    CLOSED = "closed"


@dataclass(eq=False, slots=True)
class End:
    """One worker's end of a stream: what is on its way to it, and whether it believes in the stream."""

    worker: Worker
    queue: deque[ControlMessage] = field(default_factory=deque)
    opening: Opening = Opening.DIALLED


class Stream:
    """A control stream between two incarnations. Cut: nothing more gets in; what is in may still come, until each end
    learns of the break in its own time. The decode worker dials, and says hello first."""

    def __init__(self, decode: Worker, prefill: Worker, epoch: int) -> None:
        self.decode, self.prefill, self.epoch = decode, prefill, epoch
        self.ends = (End(decode), End(prefill))
        self.cut = False
        self.ends[1].queue.append(decode.hello)

    def other(self, worker: Worker) -> Worker:
        return self.prefill if worker is self.decode else self.decode

    def end_of(self, worker: Worker) -> End:
        return self.ends[worker is self.prefill]

    def deliver(self, end: End) -> None:
        """The next message for this end."""
        message, worker = end.queue.popleft(), end.worker
        peer = self.other(worker).incarnation
        if not isinstance(message, Hello):
            worker.inbox.append(FromPeer(peer, self.epoch, message))
            return
        end.opening = Opening.OPEN
        worker.links[peer] = self
        worker.inbox.append(PeerUp(msgspec.structs.replace(message, epoch=self.epoch)))
        if worker is self.prefill and not self.cut:
            self.ends[0].queue.append(worker.hello)

    def learn(self, end: End) -> None:
        """This end learns that the stream is cut."""
        worker, peer = end.worker, self.other(end.worker).incarnation
        if end.opening is Opening.OPEN:
            worker.inbox.append(PeerLost(peer, self.epoch))
            if worker.links.get(peer) is self:
                del worker.links[peer]
        end.opening = Opening.CLOSED
        end.queue.clear()
