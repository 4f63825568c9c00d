"""The thread of a rank process that owns its transport and moves KV: gathers and sends chunks, copies landed ones out.

    step loop --submit(job)--> queue --> [ mover thread ] --on_report(report)--> step loop
                                              |  ^
                          send_control(ChunkDone)  transport: write, poll

The step loop's thread never waits for it. Every job gets exactly one report (`Disconnect` none), whatever goes wrong in
it. It decides nothing: deadlines, retries and who may write where are the roles' business.

A SendChunk needs a staging buffer from gathering until its write has settled, and waits for one in its peer's own line.
The last free buffer goes only to a peer that holds none, so that one peer which hangs does not hold up the others.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtransfer import layout
from kvtransfer.digest import copy_and_digest, digest
from kvtransfer.messages import (
    ChunkDone,
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
from kvtransfer.transport import Region, Settled, TransportError
from kvtransfer.transports import Endpoint

log = logging.getLogger(__name__)

BUSY_POLL_S = 0.0002  # with writes in flight, either way
IDLE_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _InFlight:
    job: SendChunk
    buffer: int
    size_bytes: int
    digest: bytes


class Mover:
    """See the module's text. `submit`, `expecting` and `close` are for one other thread."""

    def __init__(
        self,
        endpoint: Endpoint,
        layers: Sequence[torch.Tensor],
        kv: KvSpec,
        *,
        slot_bytes: int,
        on_report: Callable[[MoverReport], None],
        send_control: Callable[[str, ChunkDone], None],
        on_fatal: Callable[[BaseException], None],
        set_device: Callable[[], None] | None = None,
    ) -> None:
        """Takes over `endpoint`, whose staging and landing are cut into buffers of `slot_bytes`, and starts.

        `layers`: the KV pool, see `kvtransfer.layout`. `kv` and `slot_bytes` must be the same at every peer (compared
        in the hand-shake). The callbacks run in the mover's thread and must not block: `on_report` for each report;
        `send_control(peer, ChunkDone)` when a write has settled well, before its report; `on_fatal` when the thread
        ends because the transport or a callback broke. `set_device` runs there first. Raises ValueError when the pool
        is not what `kv` says.
        """
        if slot_bytes <= 0:
            raise ValueError(f"slot_bytes={slot_bytes}: must be positive")
        self._layers = list(layers)
        self._token_bytes = layout.token_bytes(self._layers)
        if self._token_bytes != kv.token_bytes:
            raise ValueError(
                f"a token's KV has {self._token_bytes} bytes in the pool, {kv.token_bytes} by its spec"
            )
        self._endpoint = endpoint
        self._slot_bytes = slot_bytes
        self._on_report = on_report
        self._send_control = send_control
        self._on_fatal = on_fatal
        self._set_device = set_device
        self._jobs: queue.SimpleQueue[MoverJob | None] = queue.SimpleQueue()  # None: look around
        self._stopping = False
        self._ended = False
        self._expecting = False
        # From here on: the mover's thread only.
        self._lines: dict[str, deque[SendChunk]] = {}  # by peer; the first peer is next
        self._buffers = endpoint.staging.nbytes // slot_bytes
        self._free = list(range(self._buffers))
        self._held: Counter[str] = Counter()
        self._in_flight: dict[int, _InFlight] = {}
        self._scratch: Region = np.zeros(slot_bytes if endpoint.landing.nbytes else 0, dtype=np.uint8)
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
            self._endpoint.close()
        except BaseException as error:
            log.exception("the mover could not end cleanly")
            fatal = fatal or error
        if fatal is not None:
            self._on_fatal(fatal)

    def _wait_s(self) -> float:
        if self._next_peer() is not None:
            return 0.0
        return BUSY_POLL_S if self._in_flight or self._expecting else IDLE_POLL_S

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
            self._lines.setdefault(job.peer, deque()).append(job)
        elif isinstance(job, CopyOut):
            self._on_report(Copied(job.handoff_id, job.lease_id, self._copy_out(job)))
        elif isinstance(job, Connect):
            self._on_report(self._connect(job))
        elif isinstance(job, Disconnect):
            for waiting in self._lines.pop(job.peer, ()):
                self._refuse(waiting, f"{job.peer} was disconnected")
            self._endpoint.disconnect(job.peer)
        elif isinstance(job, Probe):
            self._on_report(Probed(job.peer, self._endpoint.gone(job.peer)))

    def _refuse(self, job: MoverJob | None, reason: str) -> None:
        """The report of a job that is not done."""
        if isinstance(job, SendChunk):
            self._on_report(_sent(job, 0, reason))
        elif isinstance(job, CopyOut):
            self._on_report(Copied(job.handoff_id, job.lease_id, False))
        elif isinstance(job, Connect):
            self._on_report(Connected(job.peer, reason))
        elif isinstance(job, Probe):
            self._on_report(Probed(job.peer, False))

    def _connect(self, job: Connect) -> Connected:
        try:
            self._endpoint.connect(job.peer, job.endpoint)
        except TransportError as error:
            return Connected(job.peer, str(error))
        except Exception as error:
            log.exception("connecting %s", job.peer)
            return Connected(job.peer, _text(error))
        return Connected(job.peer)

    # ---- sending -------------------------------------------------------------------------------------------------

    def _next_peer(self) -> str | None:
        """The first peer in turn which has a chunk waiting and may take a staging buffer."""
        if not self._free and self._buffers:
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
            self._on_report(_sent(job, 0, error))

    def _send(self, job: SendChunk) -> str:
        """Gathers, digests and posts one chunk. Returns why it was not posted, or an empty string."""
        size = job.tokens * self._token_bytes
        error = self._misfit(job, size)
        if error:
            return error
        buffer = self._free.pop()
        view = self._endpoint.staging[buffer * self._slot_bytes :][:size]
        try:
            layout.gather(self._layers, job.blocks, job.blocks_start, job.first_token, job.tokens, view)
            checksum = digest(view, job.seed)
            landing = job.lease.slot * self._slot_bytes
            rows = np.array([[buffer * self._slot_bytes, landing, size]], dtype=np.uint64)
        except Exception as unexpected:
            log.exception("gathering chunk %d of hand-off %d", job.lease.chunk, job.handoff_id)
            self._free.append(buffer)
            return _text(unexpected)
        try:
            ticket = self._endpoint.write(
                job.peer, rows
            )  # anything but TransportError may have posted: it is fatal
        except TransportError as refused:
            self._free.append(buffer)
            return str(refused)
        self._held[job.peer] += 1
        self._in_flight[ticket] = _InFlight(job, buffer, size, checksum)
        return ""

    def _misfit(self, job: SendChunk, size: int) -> str:
        if not self._buffers:
            return "this mover has no staging buffers: it cannot send"
        if not 0 < size <= self._slot_bytes:
            return f"a chunk of {job.tokens} tokens has {size} bytes, slots hold {self._slot_bytes}"
        return ""

    def _poll(self) -> None:
        for settled in self._endpoint.poll():
            self._write_settled(settled)

    def _write_settled(self, settled: Settled) -> None:
        done = self._in_flight.pop(settled.ticket)
        job = done.job
        self._free.append(done.buffer)
        self._held[job.peer] -= 1
        if not self._held[job.peer]:
            del self._held[job.peer]
        error = settled.error
        if not error:
            lease = job.lease
            message = ChunkDone(
                job.handoff_id, lease.lease_id, lease.epoch, lease.chunk, done.size_bytes, done.digest
            )
            try:
                self._send_control(job.peer, message)
            except Exception as unexpected:
                log.exception("sending ChunkDone to %s", job.peer)
                error = f"ChunkDone could not be sent: {_text(unexpected)}"
        self._on_report(_sent(job, done.size_bytes, error))

    # ---- receiving -----------------------------------------------------------------------------------------------

    def _copy_out(self, job: CopyOut) -> bool:
        """Whether the chunk was what it should be and is now in its blocks; if not, no block was touched.

        Copy first, then verify the copy: a write that was given up may still change the slot at any time.
        """
        size = job.tokens * self._token_bytes
        begin = job.slot * self._slot_bytes
        if job.size_bytes != size or not 0 < size <= self._slot_bytes:
            log.warning("hand-off %d: a chunk of %d bytes, not %d", job.handoff_id, job.size_bytes, size)
            return False
        if job.slot < 0 or begin + self._slot_bytes > self._endpoint.landing.nbytes:
            log.error("hand-off %d: no slot %d here", job.handoff_id, job.slot)
            return False
        try:
            copy = self._scratch[:size]
            if copy_and_digest(self._endpoint.landing[begin : begin + size], copy, job.seed) != job.digest:
                log.warning("hand-off %d: a chunk at %d has another digest", job.handoff_id, job.first_token)
                return False
            layout.scatter(self._layers, job.blocks, job.blocks_start, job.first_token, job.tokens, copy)
        except Exception:
            log.exception("copying a chunk of hand-off %d out of slot %d", job.handoff_id, job.slot)
            return False
        return True


def _sent(job: SendChunk, size_bytes: int, error: str) -> Sent:
    return Sent(job.peer, job.handoff_id, job.lease.lease_id, job.lease.chunk, size_bytes, error)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
