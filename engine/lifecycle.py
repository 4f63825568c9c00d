"""One transition table per kind of thing that lives through states; every move is checked and counted here.

Metrics and traces hang on these counts, and the tests ask that every transition was taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

State = TypeVar("State", bound=Enum)


class IllegalTransition(AssertionError):
    """A defect of Baton: something happened to a thing in a state in which that cannot happen."""


class Lifecycle(Generic[State]):
    """The allowed moves of one kind of thing, and how often each was taken in this process."""

    def __init__(self, name: str, moves: Mapping[State, frozenset[State] | set[State]]) -> None:
        self.name = name
        self.moves = {state: frozenset(after) for state, after in moves.items()}
        self.taken: Counter[tuple[State, State]] = Counter()

    def move(self, before: State, after: State, times: int = 1) -> State:
        """Checks and counts the move of `times` things at once, and returns `after`."""
        if after not in self.moves[before]:
            raise IllegalTransition(f"{self.name}: {before.name} -> {after.name}")
        self.taken[before, after] += times
        return after
