"""`Progress` where layers are written by a GPU: an event on its stream behind each layer's write.

The thread that computes only enqueues, and is far ahead of the GPU; so who waits has to ask again (`polled`), and asks
the events. Nothing is recorded before somebody listens, and what has passed is forgotten at the next step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from engine.progress import At, Progress


class GpuProgress(Progress):
    """See the module's text. `begin` and `wrote` are called with the model's stream current."""

    polled = True

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._events: deque[tuple[At, torch.cuda.Event]] = deque()
        self._listened_to = False
        self._step = 0

    def begin(self, step: int) -> None:
        self._step = step
        self._forget()

    def wrote(self, layer: int) -> None:
        if self._listened_to:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(((self._step, layer + 1), event))

    def on_wake(self, wake: Callable[[], None]) -> None:
        self._listened_to = True

    def reached(self, at: At) -> bool:
        if self._at < at:
            self._forget()
        return self._at >= at

    def wake_at(self, at: At) -> None:
        """Nothing wakes the waiter: it asks again."""

    def _forget(self) -> None:
        """Takes out the events that have passed."""
        with self._lock:
            while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
                self._at = self._events.popleft()[0]
