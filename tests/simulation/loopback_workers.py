"""Workers whose every move is asked for from outside: real roles, real movers without their threads, KV in real torch
pools, a loopback fabric, control streams. `loopback_cluster` holds several of them.

    inbox --+                  +--> stream --> the other worker's inbox
    reports-+--> [ role turn ]-+--> jobs ----> [ mover of each rank ] --> fabric --> slots of the other worker's ranks
            +<------------------- [ join ] <---------+

A turn is that of `worker.loop`, cut in two: what the mover and the fabric do while a step computes is a choice, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
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
from kvtransfer.handshake import CAPABILITIES, PREFLIGHT
from kvtransfer.join import Join
from kvtransfer.leases import LeaseRecord
from kvtransfer.loopback import LoopbackFabric, LoopbackFaults, _Landing, _Write
from kvtransfer.memory import Sizes, TransferMemory
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
from kvtransfer.plan import kv_heads
from prefill.role import PrefillRole
from simulation.model import draw, kv_of
from worker.messages import FromPeer, PeerLost, PeerRefused, PeerUp, ToEngine, ToPeer

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 4
CHUNK_TOKENS = 8
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
    """The KV pool of one rank, of float32 layers with its kv heads, and its share of a model over it. The KV of a
    position is a hash of all tokens up to it. `storage`: where it has to lie."""

    def __init__(self, blocks: int, block_size: int, heads: range, storage: torch.Tensor | None) -> None:
        self.block_size = block_size
        self._heads = heads
        shape = (LAYERS, 2, blocks, block_size, len(heads), HEAD_DIM)
        size = pool_bytes(blocks, block_size, heads)
        memory = np.zeros(size, dtype=np.uint8) if storage is None else storage.numpy()[:size]
        words = memory.view(np.uint32).reshape(shape)
        words[:] = UNWRITTEN
        self._words: list[Words] = list(words)
        self.layers = [torch.from_numpy(layer.view(np.float32)) for layer in self._words]

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
            right = _words_of(kv)[:, :, :, self._heads.start : self._heads.stop]
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


def pool_bytes(blocks: int, block_size: int, heads: range) -> int:
    return 2 * LAYERS * blocks * block_size * len(heads) * HEAD_DIM * 4


def _words_of(kv: list[int]) -> Words:
    """[layers, 2, tokens, kv_heads, head_dim]: no two words are alike, so a misplaced one shows."""
    mixed = (np.array(kv, dtype=np.uint64)[:, None] ^ _LANES) * np.uint64(0xD6E8FEB86659FD93)
    words = (mixed >> np.uint64(32)).astype(np.uint32).reshape(len(kv), LAYERS, 2, KV_HEADS, HEAD_DIM)
    return words.transpose(1, 2, 0, 3, 4)


class WatchedFabric(LoopbackFabric):
    """Cuts each row of a write in three, so that slots are torn, and sees what lands where it has no right to.

    Its endpoints are ranks, named incarnation/rank; who holds it speaks of whole workers.
    """

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
        pieces = []
        for staging, landing, size in write.rows.tolist():
            cuts = sorted({0, size // 3, size // 2, size})
            pieces += [(staging + begin, landing + begin, end - begin) for begin, end in pairwise(cuts)]
        write.rows = np.array(pieces, dtype=np.uint64)
        write.left, write.sent = len(pieces), [None] * len(pieces)
        super().post(write)

    def lost(self) -> list[tuple[str, str]]:
        """Sender and receiver of each write that settles only when one of them is dead."""
        found = []
        for write in self._writes:
            source, target = write.source.incarnation, write.target.incarnation
            if self._writes_of[source, write.ticket][1] == "lose" and source not in self._dead:
                found.append((_worker_of(source), _worker_of(target)))
        return found

    def each_rank(self, verb: Callable[[str], None], worker: Worker) -> None:
        """`kill`, `hang` or `resume` of all ranks of a worker."""
        for rank in range(worker.hello.kv.tensor_parallel):
            verb(f"{worker.incarnation}/{rank}")

    def _land(self, landing: _Landing) -> None:
        write = landing.write
        source, target = write.source.incarnation, write.target.incarnation
        job, fault = self._writes_of[source, write.ticket]
        travels = write.sent[landing.row] is not None or source not in self._dead
        if travels and target not in self._dead and fault not in DIRTY:
            record = self.workers[_worker_of(target)].leases.get(job.lease.lease_id)
            holder = _worker_of(source)
            assert record is not None and (record.peer, record.lease.slot) == (holder, job.lease.slot), (
                f"bytes of lease {job.lease.lease_id} landed in slot {job.lease.slot} after the lease had ended"
            )
        super()._land(landing)


def _worker_of(endpoint: str) -> str:
    return endpoint.rpartition("/")[0]


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
    decode_blocks: int
    decode_block_size: int
    decode_ranks: int
    prefill_blocks: int
    prefill_block_size: int
    prefill_ranks: int
    gather: str
    slots: int
    staging: int
    limits: Limits
    max_waiting: int
    timeout_s: float

    @property
    def decode_tokens(self) -> int:
        """What the pool of a decode worker holds."""
        return self.decode_blocks * self.decode_block_size


class Worker:
    """One incarnation of a worker. It moves only when `begin_step`, `finish_step` or one of its movers is called."""

    def __init__(self, fabric: WatchedFabric, size: Size, worker_id: str, life: int, *, decode: bool) -> None:
        self.worker_id, self.incarnation, self.decode = worker_id, f"{worker_id}.{life}", decode
        block_size = size.decode_block_size if decode else size.prefill_block_size
        ledger = BlockLedger(size.decode_blocks if decode else size.prefill_blocks, block_size)
        slots = size.slots if decode else 0
        kv = KvSpec(
            model="hashes",
            layers=LAYERS,
            q_heads=Q_HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype="float32",
            block_size=block_size,
            chunk_tokens=CHUNK_TOKENS,
            tensor_parallel=size.decode_ranks if decode else size.prefill_ranks,
        )
        memories = [
            _memory(fabric, f"{self.incarnation}/{rank}", size, kv, rank, ledger.total, decode=decode)
            for rank in range(kv.tensor_parallel)
        ]
        self.hello = Hello(
            worker_id=worker_id,
            incarnation=self.incarnation,
            kv=kv,
            transport="loopback",
            endpoints=[memory.describe() for memory in memories],
            # No preflight: it takes real time, and this fabric knows all that is written.
            capabilities=[name for name in CAPABILITIES if name != PREFLIGHT],
            slot_count=slots,
            slot_bytes=[memory.slot_bytes for memory in memories],
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
        self.pools = [
            Pool(ledger.total, block_size, kv_heads(kv, rank), memory.storage)
            for rank, memory in enumerate(memories)
        ]
        self.reports: deque[MoverReport] = deque()
        join = Join(
            kv.tensor_parallel,
            on_report=self.reports.append,
            send_control=lambda peer, done: self._send(peer, done.epoch, done),
        )
        self.movers = [
            SteppedMover(
                memory,
                self.pools[rank].layers,
                kv,
                rank=rank,
                role="decode" if decode else "prefill",
                on_report=partial(join.put, rank),
                on_fatal=lambda error: None,
                gather=size.gather,
            )
            for rank, memory in enumerate(memories)
        ]
        for mover in self.movers:
            mover.fabric = fabric
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
        results = [pool.run(plan, self.role.scheduler.planned) for pool in self.pools]
        self.role.commit(plan, results[0], now)
        self._carry_out()

    def _carry_out(self) -> None:
        for action in self.role.drain():
            if isinstance(action, ToPeer):
                self._send(action.peer, action.epoch, action.message)
            elif isinstance(action, Connect | Disconnect | SendChunk | CopyOut | Probe):
                for mover in self.movers:
                    mover.submit(action)
            elif not isinstance(action, PeerRefused):
                self.said.append(action)

    def _send(self, peer: str, epoch: int, message: ControlMessage) -> None:
        """As the shell: what is for a stream that is not the peer's latest, or has broken, is dropped."""
        stream = self.links.get(peer)
        if stream is not None and stream.epoch == epoch and not stream.cut:
            stream.end_of(stream.other(self)).queue.append(message)


def _memory(
    fabric: WatchedFabric, name: str, size: Size, kv: KvSpec, rank: int, blocks: int, *, decode: bool
) -> TransferMemory:
    sizes = Sizes.of(
        kv,
        rank,
        role="decode" if decode else "prefill",
        slots=size.slots,
        gather=size.gather,
        pool_bytes=pool_bytes(blocks, kv.block_size, kv_heads(kv, rank)),
        buffers=size.staging,
    )
    endpoint = fabric.open(name, staging_bytes=sizes.staging_bytes, landing_bytes=sizes.landing_bytes)
    return TransferMemory.over(endpoint, sizes)


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
