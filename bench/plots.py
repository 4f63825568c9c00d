"""Pictures of a report. matplotlib is optional: without it `baton bench --plot` says what to install."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import gaps, latency, measured
from bench.record import Run
from bench.report import Report

_TIMELINE_BINS = 120
_TICKS = (0.25, 0.5, 1, 2, 4, 8)
_SHORTEST_MS = 0.1  # shorter gaps are drawn here: pieces that were read together


class PlotError(Exception):
    """No picture can be drawn."""


def check() -> None:
    """Raises PlotError where matplotlib is missing: before a run, not after it."""
    try:
        import matplotlib
    except ImportError:
        raise PlotError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")


def draw(report: Report, runs: Sequence[tuple[str, Run]], path: Path) -> None:
    """Distributions, the share within the SLO, and what happened when; one line for each run of (label, run)."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), dpi=100)
    try:
        ttft, itl, slo, when = axes.flat
        for label, run in runs:
            good = [record for record in measured(run) if record.ok]
            _cumulative(ttft, [latency(record).ttft for record in good], label)
            _cumulative(itl, [gap for record in good for gap in gaps(record)], label)
        itl.set_xlim(left=_SHORTEST_MS)
        ttft.set(title="TTFT", xlabel="ms", ylabel="share of answered requests", xscale="log")
        itl.set(title="ITL", xlabel="ms", ylabel="share of gaps", xscale="log")
        if report.tries:
            _rates(slo, report)
        else:
            _scales(slo, report)
        _timeline(when, runs[-1][1])
        for axis in axes.flat:
            axis.grid(alpha=0.3)
            if len(axis.get_legend_handles_labels()[0]) > 1:
                axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path)
    finally:
        plt.close(figure)


def _cumulative(axis: Any, seconds: list[float], label: str) -> None:
    if seconds:
        values = np.sort(np.asarray(seconds)) * 1e3
        axis.plot(
            np.maximum(values, _SHORTEST_MS), np.arange(1, len(values) + 1) / len(values), label=label, lw=1.2
        )


def _scales(axis: Any, report: Report) -> None:
    for run in report.runs:
        if run.summary.slo_curve:
            scales, shares = zip(*run.summary.slo_curve, strict=True)
            axis.plot(scales, shares, marker=".", label=run.label)
    axis.axvline(1.0, color="gray", lw=0.8, ls=":")
    axis.set(title=f"Within the SLO ({report.slo})", xlabel="SLO times", ylabel="share of all requests")
    axis.set_xscale("log")
    axis.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axis.minorticks_off()
    axis.set_ylim(-0.02, 1.02)


def _rates(axis: Any, report: Report) -> None:
    tries = sorted(report.tries, key=lambda one: one.rate)
    axis.plot([one.rate for one in tries], [one.attainment for one in tries], marker="o")
    if report.best_rate is not None:
        axis.axvline(report.best_rate, color="gray", lw=0.8, ls=":")
    axis.set(title=f"Within the SLO ({report.slo})", xlabel="requests/s", ylabel="share of all requests")
    axis.set_ylim(-0.02, 1.02)


def _timeline(axis: Any, run: Run) -> None:
    """Open requests and tokens a second of one run, warm-up included."""
    ends = [record.end for record in run.records if record.end is not None]
    last = max(ends, default=run.end) - run.begin
    edges = np.linspace(0.0, max(last, 1e-3), _TIMELINE_BINS + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    due = np.sort(np.asarray([record.scheduled - run.begin for record in run.records]))
    over = np.sort(np.asarray(ends) - run.begin)
    axis.plot(
        middle, np.searchsorted(due, middle) - np.searchsorted(over, middle), label="open requests", lw=1.2
    )
    if run.records:
        times = np.concatenate([np.asarray(record.piece_times) for record in run.records]) - run.begin
        tokens = np.concatenate([np.asarray(record.piece_tokens) for record in run.records])
        rate = np.histogram(times, edges, weights=tokens)[0] / np.diff(edges)
        other = axis.twinx()
        other.plot(middle, rate, color="tab:orange", lw=0.8, alpha=0.7)
        other.set_ylabel("tokens/s", color="tab:orange")
    axis.set(title="Last run", xlabel="s", ylabel="open requests")
