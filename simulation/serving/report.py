"""What a person sees of a simulation: tables, a picture, a page. Reads results, decides nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from simulation.serving.plan import Split
from simulation.serving.results import PolicyResult

_TITLE = ("policy", "rate/s", "goodput/s", "met SLO", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "remote")
_MORE = ("busy prefill", "busy decode", "$/M output", "errors")


def rows(results: Sequence[PolicyResult]) -> list[list[str]]:
    """The table, heading first."""
    found = [[*_TITLE, *_MORE]]
    for one in results:
        errors = ", ".join(f"{kind} {count}" for kind, count in one.summary.errors.items())
        cost = one.cost_per_million_output_tokens_usd
        found.append(
            [
                one.policy,
                f"{one.rate:.2f}",
                f"{one.goodput_rps:.2f}",
                f"{one.attainment:.1%}",
                f"{one.ttft_p50_ms:.0f} ms",
                f"{one.ttft_p99_ms:.0f} ms",
                f"{one.itl_p50_ms:.1f} ms",
                f"{one.itl_p99_ms:.1f} ms",
                f"{one.remote_share:.0%}",
                f"{one.utilisation['prefill']:.0%}" if "prefill" in one.utilisation else "-",
                f"{one.utilisation['decode']:.0%}",
                f"{cost:.2f}" if cost else "-",
                errors or "0",
            ]
        )
    return found


def show(results: Sequence[PolicyResult], out: Console) -> None:
    first = results[0]
    kind = "DERIVED, not measured" if first.derived else "measured"
    out.print(f"{first.profile} ({kind}), {first.gpus} devices, {first.trace}, SLO: {first.slo}")
    out.print(_table(rows(results)))


def show_plan(splits: Sequence[Split], out: Console) -> None:
    out.print(_table(plan_rows(splits)))


def plan_rows(splits: Sequence[Split]) -> list[list[str]]:
    found = [
        [
            "prefill",
            "decode",
            "devices",
            "highest rate",
            "per device",
            "TTFT p99",
            "ITL p99",
            "remote",
            "note",
        ]
    ]
    for one in splits:
        last = one.result
        found.append(
            [
                f"{one.prefill} x tp {one.prefill_tp}" if one.prefill else "-",
                f"{one.decode} x tp {one.decode_tp}" + ("" if one.prefill else " (mixed)"),
                str(one.gpus),
                f"{one.rate:.2f}/s",
                f"{one.rate / one.gpus:.3f}/s",
                f"{last.ttft_p99_ms:.0f} ms" if last else "-",
                f"{last.itl_p99_ms:.1f} ms" if last else "-",
                f"{last.remote_share:.0%}" if last else "-",
                one.note,
            ]
        )
    return found


def _table(cells: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for at, name in enumerate(cells[0]):
        table.add_column(name, justify="left" if at == 0 else "right", no_wrap=True)
    for row in cells[1:]:
        table.add_row(*row)
    return table


# ---- pictures ----------------------------------------------------------------------------------------------------


def draw(results: Sequence[PolicyResult], target: Path | IO[bytes]) -> None:
    """TTFT and ITL quantiles, the share within the SLO, and where time went."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), dpi=100)
    try:
        labels = [_label(one, results) for one in results]
        if len({one.rate for one in results}) > 1:
            _over_rates(axes, results)
        else:
            _quantiles(axes[0][0], results, labels, "ttft_ms", "TTFT")
            _quantiles(axes[0][1], results, labels, "itl_ms", "ITL")
            _curves(axes[1][0], results, labels)
            _busy(axes[1][1], results, labels)
        first = results[0]
        kind = "derived, not measured" if first.derived else "measured"
        figure.suptitle(f"{first.profile} ({kind}), {first.trace}, SLO: {first.slo}", fontsize=10)
        figure.tight_layout()
        figure.savefig(target, format="png")
    finally:
        plt.close(figure)


def _label(one: PolicyResult, results: Sequence[PolicyResult]) -> str:
    several = len({other.rate for other in results}) > 1
    return f"{one.policy} {one.rate:g}/s" if several else one.policy


def _quantiles(axis: Any, results: Sequence[PolicyResult], labels: list[str], field: str, name: str) -> None:
    at = range(len(results))
    for quantile, width in (("p99", 0.8), ("p90", 0.6), ("p50", 0.4)):
        heights = [getattr(getattr(one.summary, field), quantile) for one in results]
        axis.bar(at, heights, width=width, label=quantile)
    axis.set(title=name, ylabel="ms", yscale="log")
    axis.set_xticks(list(at), labels, rotation=20, fontsize=8)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)


def _curves(axis: Any, results: Sequence[PolicyResult], labels: list[str]) -> None:
    for one, label in zip(results, labels, strict=True):
        if one.slo_curve:
            scales, shares = zip(*one.slo_curve, strict=True)
            axis.plot(scales, shares, marker=".", label=label)
    axis.axvline(1.0, color="gray", lw=0.8, ls=":")
    axis.set(title="Within the SLO", xlabel="SLO times", ylabel="share of all requests", xscale="log")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _busy(axis: Any, results: Sequence[PolicyResult], labels: list[str]) -> None:
    at = range(len(results))
    for role, shift in (("prefill", -0.2), ("decode", 0.2)):
        places = [place + shift for place in at]
        axis.bar(places, [one.utilisation.get(role, 0.0) for one in results], width=0.38, label=role)
    axis.set(title="Share of the time in which a step ran", ylim=(0, 1.02))
    axis.set_xticks(list(at), labels, rotation=20, fontsize=8)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)


def _over_rates(axes: Any, results: Sequence[PolicyResult]) -> None:
    policies = list(dict.fromkeys(one.policy for one in results))
    shown = (
        (axes[0][0], "goodput_rps", "Goodput", "requests/s within the SLO", "linear"),
        (axes[0][1], "attainment", "Within the SLO", "share of all requests", "linear"),
        (axes[1][0], "ttft_p99_ms", "TTFT p99", "ms", "log"),
        (axes[1][1], "itl_p99_ms", "ITL p99", "ms", "log"),
    )
    for axis, field, title, unit, scale in shown:
        for policy in policies:
            own = sorted((one for one in results if one.policy == policy), key=lambda one: one.rate)
            axis.plot(
                [one.rate for one in own], [getattr(one, field) for one in own], marker=".", label=policy
            )
        axis.set(title=title, xlabel="requests/s", ylabel=unit, yscale=scale)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)


def draw_plan(splits: Sequence[Split], title: str, target: Path) -> None:
    """The highest rate of every split that was tried."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.5), dpi=100)
    try:
        names = [one.name for one in splits]
        colours = ["tab:orange" if not one.prefill else "tab:blue" for one in splits]
        axis.bar(range(len(splits)), [one.rate for one in splits], color=colours)
        axis.set_xticks(range(len(splits)), names, rotation=35, fontsize=8, ha="right")
        axis.set(title=title, ylabel="highest rate within the SLO, requests/s")
        axis.grid(alpha=0.3, axis="y")
        figure.tight_layout()
        figure.savefig(target, format="png")
    finally:
        plt.close(figure)


def page(results: Sequence[PolicyResult]) -> str:
    """One HTML file without references."""
    picture = BytesIO()
    draw(results, picture)
    data = base64.b64encode(picture.getvalue()).decode()
    cells = rows(results)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in cells[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells[1:]
    )
    first = results[0]
    kind = "derived, not measured" if first.derived else "measured"
    about = (
        f"{first.profile} ({kind}), {first.gpus} devices, {first.trace}, SLO: {first.slo}, seed {first.seed}"
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>baton simulate</title>"
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.3em .7em;text-align:right;"
        "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}img{max-width:100%}</style>"
        f"<h1>baton simulate</h1><p>{html.escape(about)}</p><table><tr>{head}</tr>{body}</table>"
        f"<p><img alt='latencies, share within the SLO, utilisation' src='data:image/png;base64,{data}'></p></html>\n"
    )
