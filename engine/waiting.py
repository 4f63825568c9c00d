"""The queue of sequences that wait without blocks: by priority, then by arrival. Pure.

A preempted sequence keeps its arrival, so it comes before whoever came later. Adding and taking cost O(log waiting),
removing from the middle O(1).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from engine.sequence import Sequence


class WaitingQueue:
    """Sequences in the order in which they are to be admitted."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self._members: set[Sequence] = (
            set()
        )  # who was removed leaves its heap entry behind until that comes up

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return iter(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._members

    def add(self, sequence: Sequence) -> None:
        self._members.add(sequence)
        heapq.heappush(self._heap, (sequence.priority, sequence.arrival, sequence))

    def first(self) -> Sequence | None:
        """Who is next; it stays in the queue."""
        while self._heap:
            sequence = self._heap[0][2]
            if sequence in self._members:
                return sequence
            heapq.heappop(self._heap)
        return None

    def discard(self, sequence: Sequence) -> bool:
        """Takes it out wherever it stands; False when it is not in the queue."""
        if sequence not in self._members:
            return False
        self._members.remove(sequence)
        self.first()  # drops stale entries from the top, so that they cannot pile up behind a queue that only cancels
        return True
