"""Virtual time: one heap of events and one source of chance. Nothing in a simulation uses another clock."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Protocol

Action = Callable[[], None]


class Process(Protocol):
    """What an event may belong to: it is dropped when the process is dead, and waits while it is frozen."""

    alive: bool
    frozen_until: float


class World:
    """The clock, the heap, the dice and the list of what went wrong."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.events = 0
        self.violations: list[str] = []
        self.facts: Counter[str] = Counter()
        self._heap: list[tuple[float, int, Action, Process | None]] = []
        self._next = 0

    def at(self, time: float, action: Action, process: Process | None = None) -> None:
        heapq.heappush(self._heap, (max(time, self.now), self._next, action, process))
        self._next += 1

    def after(self, delay: float, action: Action, process: Process | None = None) -> None:
        self.at(self.now + delay, action, process)

    def between(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def violate(self, what: str) -> None:
        self.violations.append(f"at {self.now:.4f} s: {what}")

    def run(self, done: Callable[[], bool], until: float) -> None:
        """Runs events until `done`, a violation, or the end of time, which is one."""
        while not self.violations and not done():
            if not self._heap:
                self.violate("nothing is going to happen any more, but work is left")
                return
            time, order, action, process = heapq.heappop(self._heap)
            if time > until:
                self.violate(f"work is left after {until:g} s")
                return
            self.now = time
            if process is not None and not process.alive:
                continue
            if process is not None and process.frozen_until > time:
                # Keeps its order among the process's other events.
                heapq.heappush(self._heap, (process.frozen_until, order, action, process))
                continue
            self.events += 1
            action()
