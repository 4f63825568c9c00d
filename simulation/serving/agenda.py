"""Virtual time: one heap of events. Events of one instant happen in the order in which they were planned."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Agenda:
    """`now` is the time of the event that is happening, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        """`what(*args)` happens then; in the past means now."""
        self._order += 1
        heapq.heappush(self._heap, (max(when, self.now), self._order, what, args))

    def run(self, done: Callable[[], bool]) -> bool:
        """Until `done` (asked after each event) or nothing is planned any more; returns whether it is done."""
        heap, pop = self._heap, heapq.heappop
        while not done():
            if not heap:
                return False
            self.now, _, what, args = pop(heap)
            self.events += 1
            what(*args)
        return True
