"""What Baton reaches on one GPU, beside what the machine allows and the bars that we set ourselves. One command:

    python -m benchmarks.gpu [--json FILE] [--quick] [--only decode,prefill] [--smoke]

Below 8 minutes on one H200, 2 with `--quick`. Every section is a process of its own (`benchmarks.gpu_sections`) with a
budget of time: one that fails or overruns says so, keeps the figures that it had, and the rest goes on. Plain
processes, no Ray. `--smoke` does all of it in tiny shapes, on a CPU where there is no GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
FIGURE = "figure "  # how a section's line of standard output begins that is one; others are progress
FAILED = "failed "
DONE = "done"


@dataclass(frozen=True)
class Section:
    name: str
    about: str
    budget_s: float
    quick_s: float = 0.0  # 0: not in the quick form


# What everything else is measured against comes first, then whether the answers are right at all.
SECTIONS = [
    Section("limits", "the machine's own limits", 40, 15),
    Section("agreement", "greedy tokens against transformers", 50, 25),
    Section("kernels", "tests/engine/kernels on the device", 90),
    Section("decode", "decode steps, gaps, host time", 90, 45),
    Section("prefill", "prefill", 50, 20),
    Section("push", "CUDA IPC between two processes", 45, 15),
    Section("handoff", "a hand-off while its prompt is computed", 50),
    Section("deterministic", "deterministic mode", 5),
    Section("transformers", "transformers' continuous batching", 55),
]
NEEDED = ("torch", "triton", "numpy", "msgspec", "safetensors", "xxhash")
USEFUL = {"transformers": "agreement, transformers", "nixl_cu13": "push", "pytest": "kernels"}


@dataclass
class Outcome:
    """What came of one section."""

    name: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


def run_sections(
    command: list[str], names: list[str], budget_s: float, show: Console | None = None
) -> Iterator[Outcome]:
    """Runs `command`, a process that does these sections in turn, for at most `budget_s`; never raises for its faults.

    An `Outcome` for each: one that was not finished when the process ended has the reason as its error.
    """
    began = since = time.monotonic()
    waiting = [Outcome(name) for name in names]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it started ends with it
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *_inherited_path()])},
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reason = f"ran past its {budget_s:.0f} s"
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        try:
            while waiting:
                line = lines.get(timeout=max(0.0, began + budget_s - time.monotonic()))
                if line is None:
                    reason = f"its process ended with {process.wait()}"
                    break
                if _take(line, waiting[0], show):
                    waiting[0].seconds, since = time.monotonic() - since, time.monotonic()
                    yield waiting.pop(0)
        except queue.Empty:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(5)
        for outcome in waiting:
            outcome.error = f"{reason}: {last}" if (last := _last_line(errors)) else reason
            outcome.seconds, since = time.monotonic() - since, time.monotonic()
            yield outcome


def _take(line: str, outcome: Outcome, show: Console | None) -> bool:
    """Enters one line of a section's output; whether it was its last."""
    if line.startswith(FIGURE):
        outcome.figures.append(json.loads(line.removeprefix(FIGURE)))
    elif line.startswith(FAILED):
        outcome.error = line.removeprefix(FAILED)
    elif line and line != DONE and show is not None:
        show.print(f"    {line}", style="dim", highlight=False, markup=False)
    return line == DONE or line.startswith(FAILED)


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError, OSError), process.stdout:
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
    lines.put(None)


def _inherited_path() -> list[str]:
    return [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []


def _last_line(errors: Any) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return str(lines[-1])[:300] if lines else ""


# ---- what is shown -----------------------------------------------------------------------------------------------


def reached(figure: dict[str, Any]) -> float | None:
    """The share of the physical limit; None without one."""
    value, limit = figure["value"], figure["limit"]
    if not value or not limit:
        return None
    return float(value / limit if figure["more_is_better"] else limit / value)


def verdict(figure: dict[str, Any]) -> str:
    """ "stretch", "bar" or "below", of those that have a bar and were measured; else empty."""
    value, sign = figure["value"], 1 if figure["more_is_better"] else -1
    if value is None or figure["bar"] is None:
        return ""
    if figure["stretch"] is not None and sign * value >= sign * figure["stretch"]:
        return "stretch"
    return "bar" if sign * value >= sign * figure["bar"] else "below"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_COLOURS = {"stretch": "bold green", "bar": "green", "below": "red", "": "default"}


def table(outcomes: list[Outcome]) -> Table:
    made = Table(title="Baton on one GPU", title_justify="left")
    for column in ("section", "figure"):
        made.add_column(column)
    for column in ("value", "unit", "bar", "stretch", "limit", "of limit"):
        made.add_column(column, justify="right")
    made.add_column("remark", overflow="fold")
    for outcome in outcomes:
        for index, figure in enumerate(outcome.figures):
            colour, share = _COLOURS[verdict(figure)], reached(figure)
            made.add_row(
                "" if index else outcome.name,
                figure["name"],
                "n/a" if figure["value"] is None else f"[{colour}]{_number(figure['value'])}[/]",
                figure["unit"],
                *(_number(figure[key]) for key in ("bar", "stretch", "limit")),
                "–" if share is None else f"{share:.0%}",
                figure["note"],
            )
        if outcome.error:
            made.add_row(
                outcome.name, "[red]failed[/]", *[""] * 6, outcome.error.replace("[", "\\["), style="red"
            )
        made.add_section()
    return made


def missing() -> list[str]:
    """What is not installed, and what that costs."""
    found = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    told = [f"without {name} most sections fail: pip install {name}" for name in found]
    return told + [
        f"without {name}: less of {what}"
        for name, what in USEFUL.items()
        if importlib.util.find_spec(name) is None
    ]


def _report(outcomes: list[Outcome], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "form": "smoke" if arguments.smoke else "quick" if arguments.quick else "full",
        "python": platform.python_version(),
        "seconds": round(seconds, 1),
        "sections": [
            {
                "name": outcome.name,
                "seconds": round(outcome.seconds, 1),
                "error": outcome.error,
                "figures": [
                    {**figure, "of_limit": reached(figure), "verdict": verdict(figure)}
                    for figure in outcome.figures
                ],
            }
            for outcome in outcomes
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the figures, written anew after each section"
    )
    parser.add_argument("--quick", action="store_true", help="2 minutes: what matters most, fewer repeats")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one process, any device")
    parser.add_argument("--only", metavar="NAMES", help=f"of {','.join(names)}")
    parser.add_argument("--budget", type=float, default=0, metavar="SECONDS", help="of all; 470, quick 120")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--only {','.join(sorted(unknown))}: choose from {','.join(names)}")
    sections = [
        section
        for section in SECTIONS
        if section.name in wanted and (section.quick_s or not arguments.quick or arguments.only)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and not without ending what runs
    console = Console(width=None if sys.stdout.isatty() else 180)
    for line in missing():
        console.print(line, style="yellow")
    began, outcomes = time.monotonic(), list[Outcome]()
    budget_s = arguments.budget or (120.0 if arguments.quick else 470.0)
    limits: dict[str, float] = {}
    for group in [sections] if arguments.smoke else [[section] for section in sections]:
        left = began + budget_s - time.monotonic()
        own = sum((arguments.quick and section.quick_s) or section.budget_s for section in group)
        told = ", ".join(section.about for section in group)
        console.print(f"[bold]{told}[/] ({min(own, left):.0f} s at most)", highlight=False)
        command = [sys.executable, "-m", "benchmarks.gpu_sections", ",".join(s.name for s in group)]
        command += ["--form", "smoke" if arguments.smoke else "quick" if arguments.quick else "full"]
        command += ["--limits", json.dumps(limits)]
        if left < 5:
            outcomes += [Outcome(section.name, error="no time was left for it") for section in group]
            continue
        for outcome in run_sections(command, [s.name for s in group], min(own, left), console):
            outcomes.append(outcome)
            limits |= {f["key"]: f["value"] for f in outcome.figures if f["section_limit"]}
            console.print(f"  {outcome.name}: {outcome.error or DONE}, {outcome.seconds:.1f} s", markup=False)
            if arguments.json:
                report = _report(outcomes, arguments, time.monotonic() - began)
                arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    console.print(table(outcomes))
    console.print(f"{time.monotonic() - began:.0f} s in all")
    return 1 if any(outcome.error for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
