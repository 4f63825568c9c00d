"""Joins the reports of a worker's movers, one for each rank, to one report a job, as the role expects it.

When the last rank's part of a chunk has settled well, `ChunkDone` leaves at once on the control stream, from the
thread that brought the report, so that a long step does not hold it up. Thread-safe. Never waits.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtransfer.messages import ChunkDone, MoverReport


class Join:
    """See the module's text."""

    def __init__(
        self, ranks: int, on_report: Callable[[MoverReport], None], send_control: Callable[[str, ChunkDone], None]
    ) -> None:
        raise NotImplementedError

    def put(self, rank: int, report: MoverReport) -> None:
        """One rank's report of one job."""
        raise NotImplementedError
