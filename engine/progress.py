"""How far a rank's step has come: which layers' keys and values are in the cache. What moves KV waits for it.

The thread that computes says so after each layer (`begin`, `wrote`); one other thread asks (`reached`), or asks to be
woken (`wake_at`). Never the other way round: a step waits for nobody. Steps are numbered upwards; step 0 is of
calibrations. `engine.gpu_progress` is the same for work that a GPU has yet to do.
"""

from __future__ import annotations

from collections.abc import Callable

At = tuple[int, int]  # step, and how many of its layers


class Progress:
    """On a CPU, where a layer is written when the call that writes it has returned."""

    polled = False  # whether who waits has to ask again: nothing wakes it

    def __init__(self) -> None:
        self._at: At = (0, 0)
        self._wanted: At | None = None
        self._wake: Callable[[], None] = lambda: None

    # ---- for the thread that computes ----------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """All earlier steps are over, whichever were skipped."""
        self._reach((step, 0))

    def wrote(self, layer: int) -> None:
        """The keys and values of this layer, and of all before it, are in the cache."""
        self._reach((self._at[0], layer + 1))

    def _reach(self, at: At) -> None:
        self._at = at
        wanted = self._wanted
        if wanted is not None and at >= wanted:
            self._wanted = None
            self._wake()

    # ---- for the thread that waits -------------------------------------------------------------------------------

    def on_wake(self, wake: Callable[[], None]) -> None:
        """`wake` is called in the computing thread, and must not block."""
        self._wake = wake

    def reached(self, at: At) -> bool:
        """Whether so much has been computed."""
        return self._at >= at

    def wake_at(self, at: At) -> None:
        """Wakes the waiter once so much has been computed; replaces what it asked for before. Also when it has been
        reached already, so that nothing is missed between asking and waiting."""
        self._wanted = at
        if self._at >= at and self._wanted is not None:
            self._wanted = None
            self._wake()
