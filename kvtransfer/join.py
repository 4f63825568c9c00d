"""Joins the reports of a worker's movers, one for each rank, to one report a job, as the role expects it.

When the last rank's part of a chunk has settled well, `ChunkDone` leaves at once on the control stream, from the
thread that brought the report, so that a long step does not hold it up. Thread-safe. Never waits for a rank: one that
does not report any more is its supervisor's to end, and the whole worker with it.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable

from kvtransfer.messages import ChunkDone, Connected, Copied, MoverReport, Probed, Sent
from kvtransfer.preflight import worst

log = logging.getLogger(__name__)


class Join:
    """See the module's text. `put` is for any thread."""

    def __init__(
        self,
        ranks: int,
        on_report: Callable[[MoverReport], None],
        send_control: Callable[[str, ChunkDone], None],
    ) -> None:
        """`on_report` and `send_control(peer, ChunkDone)` run in the thread that calls `put`, one at a time and in the
        order in which jobs were completed; they must neither block nor call `put`."""
        if ranks < 1:
            raise ValueError(f"ranks={ranks}: must be positive")
        self._ranks = ranks
        self._on_report = on_report
        self._send_control = send_control
        self._lock = threading.Lock()
        self._open: dict[tuple[object, ...], deque[dict[int, MoverReport]]] = {}

    def put(self, rank: int, report: MoverReport) -> None:
        """One rank's report of one job. Each rank reports jobs of the same kind and peer in the order in which all
        ranks were given them."""
        if not 0 <= rank < self._ranks:
            raise ValueError(f"rank {rank} is not one of {self._ranks}")
        with self._lock:
            key = _key(report)
            jobs = self._open.setdefault(key, deque())
            job = next((job for job in jobs if rank not in job), None)
            if job is None:
                job = {}
                jobs.append(job)
            job[rank] = report
            if len(job) < self._ranks:
                return
            jobs.popleft()  # whoever reports the n-th has reported all before it, so the first is complete first
            if not jobs:
                del self._open[key]
            self._on_report(self._joined([job[of] for of in range(self._ranks)]))

    def _joined(self, reports: list[MoverReport]) -> MoverReport:
        first = reports[0]
        if isinstance(first, Sent):
            return self._sent([report for report in reports if isinstance(report, Sent)])
        if isinstance(first, Connected):
            return _connected([report for report in reports if isinstance(report, Connected)])
        if isinstance(first, Copied):
            verified = all(report.verified for report in reports if isinstance(report, Copied))
            return Copied(first.handoff_id, first.lease_id, verified)
        return Probed(first.peer, all(report.gone for report in reports if isinstance(report, Probed)))

    def _sent(self, reports: list[Sent]) -> Sent:
        """The report of a whole chunk; `ChunkDone` has left for it when its `error` is empty."""
        first = reports[0]
        error = _errors([report.error for report in reports])
        pieces = sorted(
            pair for report in reports for pair in zip(report.pieces, report.digests, strict=False)
        )
        sent = [index for index, _ in pieces]
        digests = [checksum for _, checksum in pieces]
        whole = bool(sent) and sent == list(range(len(sent)))
        if not error and not (whole and all(len(r.pieces) == len(r.digests) for r in reports)):
            error = f"the ranks sent the pieces {sent}, which are no whole chunk"
        size = sum(report.size_bytes for report in reports)
        if not error:
            done = ChunkDone(first.handoff_id, first.lease_id, first.epoch, first.chunk, size, digests)
            try:
                self._send_control(first.peer, done)
            except Exception as unexpected:
                log.exception("sending ChunkDone to %s", first.peer)
                error = f"ChunkDone could not be sent: {type(unexpected).__name__}: {unexpected}"
        return Sent(
            peer=first.peer,
            handoff_id=first.handoff_id,
            lease_id=first.lease_id,
            chunk=first.chunk,
            size_bytes=size,
            error=error,
            epoch=first.epoch,
            pieces=[] if error else sent,
            digests=[] if error else digests,
        )


def _connected(reports: list[Connected]) -> Connected:
    slowest = functools.reduce(worst, (report.measured for report in reports))
    devices = ", ".join(dict.fromkeys(d for r in reports for d in r.devices.split(", ") if d))
    warning = next((report.warning for report in reports if report.warning), "")
    return Connected(
        reports[0].peer, _errors([report.error for report in reports]), slowest, devices, warning
    )


def _key(report: MoverReport) -> tuple[object, ...]:
    if isinstance(report, Sent):
        return (Sent, report.peer, report.handoff_id, report.lease_id, report.chunk, report.epoch)
    if isinstance(report, Copied):
        return (Copied, report.handoff_id, report.lease_id)
    return (type(report), report.peer)


def _errors(errors: list[str]) -> str:
    """Empty when no rank failed, else what each that did says."""
    if len(errors) == 1:
        return errors[0]
    return "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
