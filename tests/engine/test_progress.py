"""How far a step has come: what waits is woken once, by exactly the layer that it asked for, and misses nothing."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from engine.gpu_progress import GpuProgress
from engine.progress import Progress


def test_layers_are_reached_in_order() -> None:
    progress = Progress()
    assert progress.reached((0, 0)) and not progress.reached((0, 1))
    progress.begin(3)
    assert progress.reached((2, 99)) and progress.reached((3, 0)) and not progress.reached((3, 1))
    progress.wrote(0)
    progress.wrote(1)
    assert progress.reached((3, 2)) and not progress.reached((3, 3)) and not progress.reached((4, 0))


def test_who_waits_is_woken_once_and_at_once_when_it_is_late() -> None:
    progress, woken = Progress(), list[int]()
    progress.on_wake(lambda: woken.append(1))
    progress.begin(1)
    progress.wake_at((1, 2))
    progress.wrote(0)
    assert not woken
    progress.wrote(1)
    progress.wrote(2)
    assert len(woken) == 1
    progress.wake_at((1, 3))
    assert len(woken) == 2
    progress.wake_at((4, 1))
    progress.begin(5)  # steps may be skipped
    assert len(woken) == 3


def test_no_wake_up_is_lost_between_two_threads() -> None:
    progress, event = Progress(), threading.Event()
    progress.on_wake(event.set)
    steps, layers = 50, 20

    def compute() -> None:
        for step in range(1, steps + 1):
            progress.begin(step)
            for layer in range(layers):
                progress.wrote(layer)

    thread = threading.Thread(target=compute)
    wanted = itertools.product(range(1, steps + 1), range(1, layers + 1))
    thread.start()
    for at in wanted:
        while not progress.reached(at):
            event.clear()
            progress.wake_at(at)
            assert event.wait(30.0)
    thread.join()


class FakeEvent:
    """Of a GPU that passes events when a test says so."""

    recorded: list[FakeEvent] = []  # noqa: RUF012 - emptied by the test

    def __init__(self) -> None:
        self.passed = False

    def record(self) -> None:
        self.recorded.append(self)

    def query(self) -> bool:
        return self.passed


def test_on_a_gpu_a_layer_is_there_when_its_event_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    recorded: list[Any] = FakeEvent.recorded
    recorded.clear()
    progress = GpuProgress()
    progress.begin(1)
    progress.wrote(0)
    assert not recorded  # nobody listens: a worker that only receives pays nothing
    progress.on_wake(lambda: None)
    progress.begin(2)
    for layer in range(3):
        progress.wrote(layer)
    assert not progress.reached((2, 1))
    recorded[0].passed = recorded[2].passed = True
    assert progress.reached((2, 1)) and not progress.reached((2, 3))  # in the stream's order
    recorded[1].passed = True
    assert progress.reached((2, 3)) and progress.reached((1, 9))
    progress.begin(3)
    assert not progress._events and not progress.reached((3, 1))
