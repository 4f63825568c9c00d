"""What a session found, as JSON for machines and tables for people. The JSON's fields are those of `Report`.

docs/bench.md explains each figure. Filled by `bench.session`; `bench.plots` draws it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.door import Facts
from bench.figures import Comparison, Distribution, Summary

SCHEMA = "baton-bench/1"
_PIPE_COLUMNS = 160  # nothing is cut where nobody looks at a screen
_FEW_ROUNDS = 3


class Generator(msgspec.Struct, frozen=True):
    """What the load generator itself took."""

    cpu_s: float
    cpu_share: float  # of one core, over the run
    cpu_us_per_piece: float  # everything it did, divided by the pieces that came


class RunReport(msgspec.Struct, frozen=True):
    label: str  # its name in the tables
    side: str
    round: int
    rate: float  # as asked for
    interrupted: bool
    summary: Summary
    generator: Generator


class Try(msgspec.Struct, frozen=True):
    """A rate of a sweep or of a search."""

    rate: float
    attainment: float
    goodput_rps: float


class Report(msgspec.Struct):
    """Everything of one invocation."""

    schema: str = SCHEMA
    started: str = msgspec.field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    options: dict[str, Any] = {}  # as given on the command line
    slo: str = ""
    salt: str = ""  # with the same one, prompts are the same again
    servers: dict[str, Facts] = {}  # by side
    runs: list[RunReport] = []
    comparison: list[Comparison] = []
    tries: list[Try] = []
    best_rate: float | None = None  # of a search
    notes: list[str] = []  # what makes figures doubtful

    def note(self, text: str) -> None:
        self.notes.append(text)

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def console() -> Console:
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=_PIPE_COLUMNS)


def show(report: Report, out: Console) -> None:
    """The tables."""
    for side, facts in report.servers.items():
        out.print(f"[bold]{escape(side)}[/]: {escape(_about(facts))}")
    if report.runs:
        out.print(_runs(report.runs))
        out.print(_latencies(report.runs))
    if report.slo != "none" and report.runs:
        out.print(f"SLO: {report.slo}. Share of requests that meet it, times a factor:")
        out.print(_scales(report.runs))
    if report.tries:
        out.print(_tries(report))
    if report.comparison:
        out.print(_comparison(report))
    for kind, message in {k: m for run in report.runs for k, m in run.summary.messages.items()}.items():
        out.print(f"[red]{kind}[/]: {escape(message) or '-'}", soft_wrap=True)
    for note in report.notes:
        out.print("[yellow]note:[/] " + escape(note), soft_wrap=True)


def _about(facts: Facts) -> str:
    if facts.end_id:
        prompts = f"prompts of token ids below {facts.end_id}"
    else:
        prompts = (
            f"prompts of words, {facts.tokens_per_word:.2f} tokens each and {facts.extra_tokens:.0f} more"
        )
    more = f", with {', '.join(facts.extensions)}" if facts.extensions else ""
    return f"{facts.url}, {facts.api}, model {facts.model}, {prompts}{more}"


def _runs(runs: list[RunReport]) -> Table:
    table = _table(
        "run", "due/s", "requests", "answered", "errors", "met SLO", "goodput/s", "in tok/s", "out tok/s",
        "cached", "late p99", "lag p99", "generator",
    )  # fmt: skip
    for run in runs:
        summary = run.summary
        errors = ", ".join(f"{kind} {count}" for kind, count in summary.errors.items())
        table.add_row(
            _name(run),
            f"{summary.offered_rps:.2f}",
            str(summary.requests),
            str(summary.answered),
            f"[red]{errors}[/]" if errors else "0",
            f"{summary.attainment:.1%}",
            f"{summary.goodput_rps:.2f}",
            f"{summary.input_tps:.0f}",
            f"{summary.output_tps:.0f}",
            f"{summary.cached_share:.0%}",
            f"{summary.late_ms.p99:.1f} ms",
            f"{summary.lag_ms.p99:.1f} ms",
            f"{run.generator.cpu_us_per_piece:.0f} us/piece, {run.generator.cpu_share:.0%}",
        )
    return table


def _latencies(runs: list[RunReport]) -> Table:
    """One row for each figure of each run."""
    table = _table("ms", "run", "count", "mean", "p50", "p90", "p95", "p99", "max")
    for name in ("ttft", "itl", "tpot", "e2e"):
        for run in runs:
            d: Distribution = getattr(run.summary, f"{name}_ms")
            values = (d.mean, d.p50, d.p90, d.p95, d.p99, d.max)
            table.add_row(name.upper(), _name(run), str(d.count), *(f"{v:.2f}" for v in values))
    return table


def _scales(runs: list[RunReport]) -> Table:
    table = _table("run", *(f"x{scale:g}" for scale, _ in runs[0].summary.slo_curve))
    for run in runs:
        table.add_row(_name(run), *(f"{share:.0%}" for _, share in run.summary.slo_curve))
    return table


def _tries(report: Report) -> Table:
    table = _table("rate", "met SLO", "goodput/s")
    for one in sorted(report.tries, key=lambda one: one.rate):
        best = report.best_rate is not None and one.rate == report.best_rate
        table.add_row(
            f"{one.rate:.3g}/s" + (" <- highest" if best else ""),
            f"{one.attainment:.1%}",
            f"{one.goodput_rps:.2f}",
        )
    return table


def _comparison(report: Report) -> Table:
    """Against the first side. What is within the spread of a side with itself is not coloured."""
    table = _table(
        "against " + report.runs[0].side, "figure", "first", "other", "change", "rounds", "same side"
    )
    for each in report.comparison:
        change = f"{each.change:+.1%}"
        table.add_row(
            escape(each.side),
            each.figure,
            f"{each.first:.4g}",
            f"{each.other:.4g}",
            f"[bold]{change}[/]" if each.beyond_spread else change,
            f"{each.low:+.1%} .. {each.high:+.1%}",
            f"±{each.spread:.1%}",
        )
    rounds = len(report.comparison[0].ratios)
    table.caption = "bold: larger than what a side differs from itself" + (
        f"; {rounds} rounds are too few to say, take {_FEW_ROUNDS}" if rounds < _FEW_ROUNDS else ""
    )
    return table


def _name(run: RunReport) -> str:
    return escape(run.label)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "errors", "figure") else "right")
    return table
