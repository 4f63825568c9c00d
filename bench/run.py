"""Runs a session on an event loop of its own: signals, progress, and what is written when it is over.

Called by `bench.command`. The first Ctrl-C ends the run and reports what there is; the second ends the process.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bench import plots, report
from bench.figures import RateSearch, Slo
from bench.progress import Bar
from bench.record import Record, Run
from bench.session import Limits, Session, Side
from bench.workload import Workload

INTERRUPTED = 130
NOTHING_ANSWERED = 1


@dataclass(frozen=True)
class Wishes:
    """All that one invocation is to do."""

    sides: Sequence[Side]
    workload: Workload
    slo: Slo
    limits: Limits
    rate: float
    rounds: int = 1
    rates: Sequence[float] = ()
    search: RateSearch | None = None
    salt: str = ""
    json_file: Path | None = None
    plot: Path | None = None
    records: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)


def run(wishes: Wishes) -> int:
    """Does it and prints the report; the exit status. Raises DoorError, PlotError, ValueError, OSError."""
    _check(wishes)
    try:
        import uvloop
    except ImportError:  # not on every platform; slower, and right all the same
        return asyncio.run(_run(wishes))
    return int(uvloop.run(_run(wishes)))


def _check(wishes: Wishes) -> None:
    """What can be refused before anything is sent."""
    if wishes.plot is not None:
        plots.check()
    for file in (wishes.json_file, wishes.plot, wishes.records):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"there is no folder {file.parent} for {file.name}")
    alone = bool(wishes.rates) + (wishes.search is not None)
    if alone > 1 or (alone and (wishes.rounds > 1 or len(wishes.sides) > 1)):
        raise ValueError("--find-rate and --rates go alone, with one --url and without --rounds")
    if wishes.search is not None and not wishes.slo.items():
        raise ValueError("--find-rate needs --slo, e.g. ttft=500,itl=50")
    for rate in wishes.rates or [wishes.rate]:
        wishes.workload.schedule(rate)  # a trace that is too short is told now


async def _run(wishes: Wishes) -> int:
    out = report.console()
    kept: list[tuple[str, Run]] = []
    session = Session(
        wishes.sides,
        wishes.workload,
        wishes.slo,
        wishes.limits,
        salt=wishes.salt or secrets.token_hex(4),
        show=Bar(out).show,
        keep=lambda label, run: kept.append((label, run)),
    )
    session.report.options = wishes.options
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        session.interrupt()
        loop.remove_signal_handler(signal.SIGINT)  # the next one ends the process
        sys.stderr.write("baton: interrupted; once more to end at once\n")

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        await session.open()
        if wishes.search is not None:
            await session.search(wishes.search)
        elif wishes.rates:
            await session.sweep(wishes.rates)
        else:
            await session.rounds(wishes.rounds, wishes.rate)
    finally:
        await session.close()
        loop.remove_signal_handler(signal.SIGINT)
    report.show(session.report, out)
    _write(wishes, session.report, kept)
    if any(each.interrupted for each in session.report.runs) or not session.report.runs:
        return INTERRUPTED
    return 0 if any(each.summary.answered for each in session.report.runs) else NOTHING_ANSWERED


def _write(wishes: Wishes, made: report.Report, kept: Sequence[tuple[str, Run]]) -> None:
    if wishes.json_file is not None:
        wishes.json_file.write_bytes(made.to_json())
    if wishes.records is not None:
        with wishes.records.open("wb") as file:
            for label, each in kept:
                for record in each.records:
                    file.write(msgspec.json.encode(_row(label, each, record)) + b"\n")
    if wishes.plot is not None and kept:
        plots.draw(made, kept, wishes.plot)


def _row(label: str, of: Run, record: Record) -> dict[str, Any]:
    """One request, its times in seconds after the begin of the schedule."""
    return {
        "run": label,
        "number": record.number,
        "request_id": record.request_id,
        "warmup": record.warmup,
        "scheduled_s": record.scheduled - of.begin,
        "sent_s": None if record.sent is None else record.sent - of.begin,
        "end_s": None if record.end is None else record.end - of.begin,
        "piece_s": [round(at - of.begin, 6) for at in record.piece_times],
        "piece_tokens": list(record.piece_tokens),
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cached_tokens": record.cached_tokens,
        "finish_reason": record.finish_reason,
        "prefilled": record.prefilled,
        "status": record.status,
        "error": record.error,
        "message": record.message,
    }
