"""The cluster as a policy sees it: numbers of every worker as arrays, versioned, changed in place, never copied. Pure.

What a worker reported is old by the time it is read. So the router books each placement at once, and a worker's load
is the larger of what it reported and what this router knows to be placed on it: stale reports cause no herd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Pool:
    """The workers of one role, read-only arrays over them, shape [workers].

    usable: alive and reachable. reported: requests (decode) or hand-offs (prefill) it said it has. placed: those this
    router has placed and not seen the end of (prefill: the first token of).
    """

    ids: tuple[str, ...]
    usable: Bools
    reported: Ints
    placed: Ints

    @property
    def load(self) -> Ints:
        """Work at each worker, shape [workers]."""
        return np.maximum(self.reported, self.placed)


@dataclass(frozen=True, slots=True)
class View:
    """What a policy decides on."""

    version: int
    decode: Pool
    prefill: Pool


class PoolBook:
    """The writable side of a `Pool`. Adding or removing a worker rebuilds it; everything else is one array write."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._usable: Bools = np.zeros(0, dtype=bool)
        self._reported: Ints = np.zeros(0, dtype=np.int64)
        self._placed: Ints = np.zeros(0, dtype=np.int64)
        self.pool = self._publish()

    def set_workers(self, ids: list[str]) -> None:
        """The workers that exist now; those that stay keep their numbers."""
        before = self._index
        self._index = {worker_id: at for at, worker_id in enumerate(ids)}
        kept = [(at, before[worker_id]) for worker_id, at in self._index.items() if worker_id in before]
        usable, reported, placed = self._usable, self._reported, self._placed
        self._usable = np.zeros(len(ids), dtype=bool)
        self._reported = np.zeros(len(ids), dtype=np.int64)
        self._placed = np.zeros(len(ids), dtype=np.int64)
        for now, then in kept:
            self._usable[now], self._reported[now], self._placed[now] = (
                usable[then],
                reported[then],
                placed[then],
            )
        self.pool = self._publish()

    def at(self, worker_id: str) -> int:
        """The worker's place in the pool's arrays; KeyError when there is no such worker."""
        return self._index[worker_id]

    def set_usable(self, worker_id: str, usable: bool) -> None:
        if worker_id in self._index:
            self._usable[self._index[worker_id]] = usable

    def report(self, worker_id: str, work: int) -> None:
        if worker_id in self._index:
            self._reported[self._index[worker_id]] = work

    def place(self, worker_id: str, change: Literal[1, -1]) -> None:
        """Books a placement, or its end. A worker that is gone has no books."""
        if worker_id in self._index:
            at = self._index[worker_id]
            self._placed[at] = max(0, self._placed[at] + change)

    def _publish(self) -> Pool:
        usable, reported, placed = self._usable.view(), self._reported.view(), self._placed.view()
        for array in (usable, reported, placed):
            array.flags.writeable = False
        return Pool(tuple(self._index), usable, reported, placed)


class ClusterView:
    """What one router knows of all workers."""

    def __init__(self) -> None:
        self.decode = PoolBook()
        self.prefill = PoolBook()
        self.version = 0

    @property
    def view(self) -> View:
        """The view as of now; its arrays follow later changes."""
        return View(self.version, self.decode.pool, self.prefill.pool)

    def set_workers(self, decode: list[str], prefill: list[str]) -> None:
        self.version += 1
        self.decode.set_workers(decode)
        self.prefill.set_workers(prefill)
