"""What a person sees while a deployment starts."""

from __future__ import annotations

import io

from rich.console import Console

from cluster.report import Report
from cluster.supervisor import _WEIGHTS


def test_a_bar_shows_how_much_of_the_weights_is_read() -> None:
    sink = io.StringIO()
    report = Report(Console(file=sink, force_terminal=True, width=100))
    report.open()
    report.starting("decode-0")
    report.loading("decode-0", 40)
    report.loading("unknown", 10)
    assert report._progress is not None
    task = report._progress.tasks[0]
    assert (task.completed, task.total, task.description) == (40, 100, "decode-0 loads its weights")
    report.ready("decode-0", "pid 1")
    assert task.completed == 100 and not report._progress.tasks[1:]
    report.close()
    assert "decode-0 ready" in sink.getvalue()


def test_what_the_rank_logs_is_what_the_supervisor_reads() -> None:
    """The two ends of one line; the other one is in worker/rank.py."""
    import logging

    from worker import rank_parts

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    rank_parts.log.addHandler(handler)
    rank_parts.log.setLevel(logging.INFO)
    try:
        progress = rank_parts._logged(iter(range(100)).__next__)
        for done in (1, 5, 10):
            progress(done << 30, 10 << 30)
    finally:
        rank_parts.log.removeHandler(handler)
    assert _WEIGHTS.findall("\n".join(records))[-1] == "100"
