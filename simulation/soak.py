"""Runs seeds on every core, on and on, and tells of it: how many hold, what was violated, which transitions were taken.

`python -m simulation` and `scripts/soak` call it. Each seed is at least two workers of each role, 50 requests and 3
faults. It stops at nothing but its limits: a violation is printed with the line that replays it, and the rest goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count, islice
from types import FrameType
from typing import TextIO

from simulation.run import Report, run_seed
from simulation.transitions import Transition, allowed

BATCH = 8  # seeds that a process is given at once
SEED_LIMIT_S = 120.0  # of real time; a run that takes longer goes round in circles
QUIET_LINE_S = 10.0  # between lines of progress when nobody watches them being overwritten
STAY_S = 0.2  # between updates

RunSeed = Callable[[int], Report]


@dataclass(slots=True)
class Soak:
    """What has come of all seeds so far."""

    seeds: int = 0
    failed: int = 0
    requests: int = 0
    events: int = 0
    facts: Counter[str] = field(default_factory=Counter)
    transitions: Counter[Transition] = field(default_factory=Counter)
    began: float = field(default_factory=time.perf_counter)

    def add(self, report: Report) -> None:
        self.seeds += 1
        self.failed += bool(report.violations)
        self.events += report.events
        self.requests += report.facts["requests"]
        self.facts += report.facts
        self.transitions += report.transitions

    @property
    def line(self) -> str:
        seconds = max(time.perf_counter() - self.began, 1e-9)
        fewest = min((self.transitions[move] for move in allowed()), default=0)
        return (
            f"{self.seeds} seeds, {self.failed} with violations, {self.requests} requests, {self.events} events, "
            f"{seconds:.0f} s, {self.seeds / seconds:.1f} seeds/s, rarest transition taken {fewest} times"
        )

    def table(self) -> str:
        """How often each transition was taken, and which never."""
        rows = [
            f"  {of:9} {before:>11} -> {after:11} {self.transitions[of, before, after] or 'never':>12}"
            for of, before, after in allowed()
        ]
        never = sum(not self.transitions[move] for move in allowed())
        return "\n".join(["transitions taken:", *rows, f"{len(rows)} transitions, {never} never taken"])


def soak(
    first: int = 0,
    seeds: int | None = None,
    seconds: float | None = None,
    *,
    processes: int | None = None,
    stop: bool = False,
    out: TextIO = sys.stdout,
    run: RunSeed | None = None,
) -> Soak:
    """Runs `seeds` seeds from `first` on, for at most `seconds`; with neither, until Ctrl-C. `stop`: also at the first
    violation. `processes` 1: all in this process."""
    result = Soak()
    until = None if seconds is None else result.began + seconds
    numbers = count(first) if seeds is None else iter(range(first, first + seeds))
    processes = processes or len(os.sched_getaffinity(0))
    reports = (
        _here(numbers, run or soak_seed, until)
        if processes == 1 or seeds == 1
        else _everywhere(numbers, run or soak_seed, until, processes)
    )
    told = Progress(out)
    try:
        for report in reports:
            if report is not None:
                result.add(report)
                told.violations(report)
            told.line(result.line)
            if stop and result.failed:
                break
    except KeyboardInterrupt:
        told.say("stopped")
    finally:
        reports.close()  # type: ignore[attr-defined]
    told.line(result.line, last=True)
    return result


def soak_seed(seed: int) -> Report:
    """One seed, and a violation when it does not come to an end in real time."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {SEED_LIMIT_S:g} s of real time")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SEED_LIMIT_S)
    try:
        return run_seed(seed, soak=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _here(numbers: Iterator[int], run: RunSeed, until: float | None) -> Iterator[Report | None]:
    for seed in numbers:
        if until is not None and time.perf_counter() >= until:
            return
        yield run(seed)


def _everywhere(
    numbers: Iterator[int], run: RunSeed, until: float | None, processes: int
) -> Iterator[Report | None]:
    """Reports as they come; None now and then while none does."""
    pool = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_deaf_to_ctrl_c
    )
    try:
        pending: set[Future[list[Report]]] = set()
        while True:
            while len(pending) < 2 * processes and (until is None or time.perf_counter() < until):
                batch = list(islice(numbers, BATCH))
                if not batch:
                    break
                pending.add(pool.submit(_batch, run, batch, until))
            if not pending:
                return
            done, pending = wait(pending, timeout=STAY_S, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()
            yield None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batch(run: RunSeed, seeds: list[int], until: float | None) -> list[Report]:
    reports = []
    for seed in seeds:
        if until is not None and time.perf_counter() >= until:  # one clock for all processes of a host
            break
        reports.append(run(seed))
    return reports


def _deaf_to_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Progress:
    """One line that is overwritten on a terminal; elsewhere a line now and then."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty()
        self._next = 0.0

    def line(self, text: str, *, last: bool = False) -> None:
        now = time.perf_counter()
        if now < self._next and not last:
            return
        self._next = now + (STAY_S if self._live else QUIET_LINE_S)
        end = "" if self._live and not last else "\n"
        self._out.write(("\r\x1b[K" if self._live else "") + text + end)
        self._out.flush()

    def say(self, text: str) -> None:
        self._out.write(("\r\x1b[K" if self._live else "") + text + "\n")
        self._out.flush()

    def violations(self, report: Report) -> None:
        if report.violations:
            self.say(
                f"seed {report.seed}: {report.violations[0]}\n"
                f"  replay: ./scripts/soak --seeds 1 --seed {report.seed}"
            )
            for more in report.violations[1:]:
                self.say(f"  {more}")
