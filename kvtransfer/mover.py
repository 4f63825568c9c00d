"""The thread of a rank process that owns its transport and moves KV: sends this rank's pieces, copies landed ones out.

    step loop --submit(job)--> queue --> [ mover thread ] --on_report(report)--> Join, over all ranks --> step loop
                                              |  ^
                                          transport: write, poll

The step loop's thread never waits for it. Every job gets exactly one report (`Disconnect` none), whatever goes wrong in
it. It decides nothing: deadlines, retries and who may write where are the roles' business.

A SendChunk needs a staging buffer from gathering until all its writes have settled, and waits for one in its peer's own
line. The last free buffer goes only to a peer that holds none, so that one peer which hangs does not hold up the
others. What is sent straight from the pool takes its turn the same way and leaves the buffer empty.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvtransfer import failpoints, layout
from kvtransfer.linking import Linking
from kvtransfer.memory import Side, TransferMemory
from kvtransfer.messages import (
    Connect,
    Connected,
    Copied,
    CopyOut,
    Disconnect,
    KvSpec,
    MoverJob,
    MoverReport,
    Probe,
    Probed,
    SendChunk,
    Sent,
)
from kvtransfer.peers import Peer, Peers
from kvtransfer.plan import Outgoing, kv_heads
from kvtransfer.receiving import Receiving
from kvtransfer.sending import Sending
from kvtransfer.transport import Rows, Settled, TransportError

log = logging.getLogger(__name__)

BUSY_POLL_S = 0.0002  # with writes in flight, either way
IDLE_POLL_S = 0.05


@dataclass(slots=True)
class _Sending:
    """A chunk of which some write has not settled."""

    job: SendChunk
    buffer: int
    pieces: list[int]
    digests: list[bytes]
    size_bytes: int
    open: set[int] = field(default_factory=set)  # tickets
    error: str = ""


class Mover:
    """See the module's text. `submit`, `expecting` and `close` are for one other thread."""

    def __init__(
        self,
        memory: TransferMemory,
        layers: Sequence[torch.Tensor],
        kv: KvSpec,
        *,
        rank: int,
        role: Side,
        on_report: Callable[[MoverReport], None],
        on_fatal: Callable[[BaseException], None],
        set_device: Callable[[], None] | None = None,
        gather: str = "auto",
    ) -> None:
        """Takes over `memory` and its endpoint, and starts.

        `layers`: this rank's KV pool, see `kvtransfer.layout`. `kv`: of the whole worker. The callbacks run in the
        mover's thread and must not block: `on_report` for each report; `on_fatal` when the thread ends because the
        transport or a callback broke. `set_device` runs there first. `gather`: "never" sends straight from the pool,
        "auto" does where its pieces are large enough, "always" never does. Raises ValueError when the pool is not what
        `kv` says or does not lie where `gather` needs it.
        """
        self._layers = list(layers)
        _check_pool(self._layers, kv, rank)
        self._memory = memory
        self._endpoint = memory.endpoint
        self._kv = kv
        self._rank = rank
        self._sending = Sending(memory, self._layers, kv, gather) if role == "prefill" else None
        self._receiving = Receiving(memory, self._layers, kv, rank) if role == "decode" else None
        self._on_report = on_report
        self._on_fatal = on_fatal
        self._set_device = set_device
        self._jobs: queue.SimpleQueue[MoverJob | None] = queue.SimpleQueue()  # None: look around
        self._stopping = False
        self._ended = False
        self._expecting = False
        # From here on: the mover's thread only.
        self._peers = Peers(self._endpoint, kv, rank, self._sending)
        self._linking = Linking(memory, on_report)
        self._lines: dict[str, deque[SendChunk]] = {}  # by peer; the first peer is next
        self._free = list(range(memory.buffers))
        self._held: Counter[str] = Counter()
        self._in_flight: dict[int, _Sending] = {}  # by ticket
        self._thread = threading.Thread(target=self._run, name="mover", daemon=True)
        self._thread.start()

    # ---- for the other thread ------------------------------------------------------------------------------------

    def submit(self, job: MoverJob) -> None:
        """Queues a job, never blocks. Raises RuntimeError when the mover has ended, and nobody would report."""
        if self._ended or self._stopping:
            raise RuntimeError("the mover has ended")
        self._jobs.put(job)

    def expecting(self, on: bool) -> None:
        """Whether peers may be writing here: some transports need this side's progress, so it polls often then."""
        if on != self._expecting:
            self._expecting = on
            self._jobs.put(None)

    def close(self) -> None:
        """Ends the thread and joins it. Jobs that wait are reported as failed; posted writes are not stopped."""
        self._stopping = True
        self._jobs.put(None)
        self._thread.join()

    # ---- the mover's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        fatal: BaseException | None = None
        try:
            if self._set_device is not None:
                self._set_device()
            while not self._stopping:
                self._take_jobs(self._wait_s())
                self._send_next()
                self._poll()
                self._linking.tick()
        except BaseException as error:
            log.exception("the mover's thread ends")
            fatal = error
        self._end(fatal)

    def _end(self, fatal: BaseException | None) -> None:
        self._ended = True
        reason = "the mover was closed" if fatal is None else f"the mover broke: {fatal}"
        try:
            while not self._jobs.empty():
                self._refuse(self._jobs.get_nowait(), reason)
            for line in self._lines.values():
                for job in line:
                    self._refuse(job, reason)
            self._linking.close(reason)
            self._endpoint.close()
        except BaseException as error:
            log.exception("the mover could not end cleanly")
            fatal = fatal or error
        if fatal is not None:
            self._on_fatal(fatal)

    def _wait_s(self) -> float:
        if self._next_peer() is not None:
            return 0.0
        return BUSY_POLL_S if self._in_flight or self._expecting or self._linking.busy else IDLE_POLL_S

    def _take_jobs(self, wait_s: float) -> None:
        try:
            job = self._jobs.get(timeout=wait_s) if wait_s else self._jobs.get_nowait()
            while not self._stopping:
                self._do(job)
                job = self._jobs.get_nowait()
            self._refuse(job, "the mover was closed")
        except queue.Empty:
            pass

    def _do(self, job: MoverJob | None) -> None:
        if isinstance(job, SendChunk):
            self._queue(job)
        elif isinstance(job, CopyOut):
            self._on_report(Copied(job.handoff_id, job.lease_id, self._copy_out(job)))
        elif isinstance(job, Connect):
            self._connect(job)
        elif isinstance(job, Disconnect):
            for waiting in self._lines.pop(job.peer, ()):
                self._refuse(waiting, f"{job.peer} was disconnected")
            self._linking.forget(job.peer, "it was disconnected")
            self._peers.disconnect(job.peer)
        elif isinstance(job, Probe):
            self._on_report(Probed(job.peer, self._peers.gone(job.peer)))

    def _connect(self, job: Connect) -> None:
        """Reported once the links to those ranks are measured, which is when chunks may be sent over them."""
        name = job.hello.incarnation
        self._linking.forget(name, "it was connected again")
        error = self._peers.connect(job.hello)
        peer = self._peers.get(name)
        if error or peer is None or self._sending is None:
            self._on_report(Connected(name, error))
        else:
            self._linking.measure(peer)

    def _refuse(self, job: MoverJob | None, reason: str) -> None:
        """The report of a job that is not done."""
        if isinstance(job, SendChunk):
            self._on_report(_sent(job, reason))
        elif isinstance(job, CopyOut):
            self._on_report(Copied(job.handoff_id, job.lease_id, False))
        elif isinstance(job, Connect):
            self._on_report(Connected(job.hello.incarnation, reason))
        elif isinstance(job, Probe):
            self._on_report(Probed(job.peer, False))

    # ---- sending -------------------------------------------------------------------------------------------------

    def _queue(self, job: SendChunk) -> None:
        """A chunk of which this rank has no piece is done at once, others wait for their turn."""
        peer = self._peers.get(job.peer)
        if peer is not None and self._sending is not None:
            try:
                has_part = bool(peer.plan.outgoing(self._rank, job.lease.chunk, job.tokens).writes)
            except ValueError as error:
                return self._on_report(_sent(job, str(error)))
            if not has_part:
                return self._on_report(_sent(job))
        self._lines.setdefault(job.peer, deque()).append(job)

    def _next_peer(self) -> str | None:
        """The first peer in turn which has a chunk waiting and may take a staging buffer."""
        if not self._free and self._memory.buffers:
            return None
        last = len(self._free) <= 1
        return next((peer for peer in self._lines if not last or not self._held[peer]), None)

    def _send_next(self) -> None:
        peer = self._next_peer()
        if peer is None:
            return
        line = self._lines.pop(peer)
        job = line.popleft()
        if line:
            self._lines[peer] = line  # now the last in turn
        error = self._send(job)
        if error:
            self._on_report(_sent(job, error))

    def _send(self, job: SendChunk) -> str:
        """Prepares and posts one chunk. Returns why nothing of it was posted, or an empty string."""
        peer = self._peers.get(job.peer)
        if self._sending is None or not self._memory.buffers:
            return "this mover has no staging buffers: it cannot send"
        if peer is None:
            return f"{job.peer} is not connected"
        failpoints.reached("before-chunk")
        buffer = self._free.pop()
        try:
            outgoing = peer.plan.outgoing(self._rank, job.lease.chunk, job.tokens)
            _check_slot(peer, job.lease.slot, outgoing)
            prepared = self._sending.prepare(job, peer.plan, outgoing, buffer)
        except Exception as unexpected:
            if not isinstance(unexpected, ValueError):
                log.exception("gathering chunk %d of hand-off %d", job.lease.chunk, job.handoff_id)
            self._free.append(buffer)
            return _text(unexpected)
        pieces = [index for write in outgoing.writes for index in write.pieces]
        digests = [prepared.digests[part] for write in outgoing.writes for part in write.parts]
        sending = _Sending(job, buffer, pieces, digests, outgoing.size_bytes)
        self._post(sending, peer, outgoing, prepared.rows)
        if not sending.open:
            self._free.append(buffer)
            return sending.error
        self._held[job.peer] += 1
        return ""

    def _post(self, sending: _Sending, peer: Peer, outgoing: Outgoing, rows: list[Rows]) -> None:
        """One write for each target; after one that is refused no more. Anything but TransportError may have posted:
        it is fatal."""
        for write, each in zip(outgoing.writes, rows, strict=True):
            slot = sending.job.lease.slot * peer.hello.slot_bytes[write.target]
            for settled in failpoints.half_written(self._endpoint, peer.name(write.target), each, slot):
                self._write_settled(settled)
            try:
                ticket = self._endpoint.write(
                    peer.name(write.target), each + np.array([0, slot, 0], dtype=np.uint64)
                )
            except TransportError as refused:
                sending.error = str(refused)
                return
            sending.open.add(ticket)
            self._in_flight[ticket] = sending

    def _poll(self) -> None:
        for settled in self._endpoint.poll():
            if not self._linking.settled(settled):
                self._write_settled(settled)

    def _write_settled(self, settled: Settled) -> None:
        done = self._in_flight.pop(settled.ticket)
        done.open.remove(settled.ticket)
        done.error = done.error or settled.error
        if done.open:
            return
        failpoints.reached("after-last-byte")
        job = done.job
        self._free.append(done.buffer)
        self._held[job.peer] -= 1
        if not self._held[job.peer]:
            del self._held[job.peer]
        if done.error:
            self._on_report(_sent(job, done.error))
        else:
            self._on_report(_sent(job, "", done.size_bytes, done.pieces, done.digests))

    # ---- receiving -----------------------------------------------------------------------------------------------

    def _copy_out(self, job: CopyOut) -> bool:
        made = self._peers.plan_of(job.peer)
        if made is None or self._receiving is None:
            log.error("hand-off %d: a chunk of %s, which was never connected", job.handoff_id, job.peer)
            return False
        try:
            return self._receiving.copy_out(job, made)
        except Exception:
            log.exception("copying a chunk of hand-off %d out of slot %d", job.handoff_id, job.slot)
            return False


def _check_pool(layers: Sequence[torch.Tensor], kv: KvSpec, rank: int) -> None:
    """Raises ValueError when the pool is not what `kv` says of this rank."""
    shape = (2, kv.block_size, len(kv_heads(kv, rank)), kv.head_dim)
    found = [(layer.shape[0], *layer.shape[2:]) for layer in layers]
    dtype = layout.DTYPES[kv.dtype]
    if (
        len(layers) != kv.layers
        or any(one != shape for one in found)
        or any(x.dtype != dtype for x in layers)
    ):
        raise ValueError(
            f"the pool has {len(layers)} layers of {layers[0].dtype} {found[0]} without their blocks, rank {rank} of "
            f"this worker {kv.layers} of {dtype} {shape} by its spec"
        )


def _check_slot(peer: Peer, slot: int, outgoing: Outgoing) -> None:
    """Raises ValueError when the peer's slots do not hold what is written: it would land in another slot."""
    if not 0 <= slot < peer.hello.slot_count:
        raise ValueError(f"slot {slot} of {peer.hello.worker_id}, which has {peer.hello.slot_count}")
    for write in outgoing.writes:
        size = peer.hello.slot_bytes[write.target]
        if write.end > size:
            raise ValueError(f"{write.end} bytes for rank {write.target}, whose slots hold {size}")


def _sent(
    job: SendChunk,
    error: str = "",
    size_bytes: int = 0,
    pieces: Sequence[int] = (),
    digests: Sequence[bytes] = (),
) -> Sent:
    lease = job.lease
    return Sent(
        peer=job.peer,
        handoff_id=job.handoff_id,
        lease_id=lease.lease_id,
        chunk=lease.chunk,
        size_bytes=size_bytes,
        error=error,
        epoch=lease.epoch,
        pieces=list(pieces),
        digests=list(digests),
    )


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
