"""Tensor-parallel replicas for tests: the test itself is rank 0, the other ranks are processes that follow its plans.

The processes are started once and serve many models: `RankProcesses.open` loads a model on the first `tp` of them and
gives a runner that looks like any other. A follower is sent as little of a plan as `Runner.run` promises to need.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from engine.api import SamplingParams
from engine.collective import SharedMemory
from engine.plan import StepPlan, StepResult
from engine.runner import Runner, load_runner

ANSWER_S = 60.0


class RankProcesses:
    """Ranks 1 .. largest-1, and the memory between them and this process for each size of a group."""

    def __init__(self, largest: int, timeout_s: float = 60.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._groups = {size: SharedMemory.create(size) for size in range(2, largest + 1)}
        self.connections: list[Connection[Any, Any]] = []
        self.processes = []
        paths = {size: f"/proc/{os.getpid()}/fd/{descriptor}" for size, descriptor in self._groups.items()}
        for rank in range(1, largest):
            mine, theirs = context.Pipe()
            process = context.Process(target=_follow, args=(rank, paths, theirs, timeout_s), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(mine)
            self.processes.append(process)
        self.mine = {
            size: SharedMemory(descriptor, 0, size, timeout_s) for size, descriptor in self._groups.items()
        }

    def open(self, folder: Path, tp: int, dtype: str = "float32", **sizes: int) -> RankZero:
        """The model over `tp` ranks; those of an earlier model are gone."""
        others = self.connections[: tp - 1]
        for connection in others:
            connection.send(("load", (folder, tp, dtype, sizes)))
        runner = load_runner(folder, dtype, collective=self.mine[tp], **sizes)  # type: ignore[arg-type]
        for connection in others:
            _answer(connection)
        return RankZero(runner, others)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(20)
        for mine in self.mine.values():
            mine.close()
        for connection in self.connections:
            connection.close()
        for descriptor in self._groups.values():
            os.close(descriptor)


class RankZero(Runner):
    """Rank 0's runner; what it runs, its followers run."""

    def __init__(self, runner: Runner, others: list[Connection[Any, Any]]) -> None:
        self.__dict__ |= runner.__dict__
        self._others = others

    def run(self, plan: StepPlan) -> StepResult:
        self.tell("run", plan)
        result = super().run(plan)
        assert self.answers() == [StepResult([-1] * len(plan.rows))] * len(self._others)
        return result

    def logits(self, plan: StepPlan) -> torch.Tensor:
        self.tell("logits", plan)
        found = super().logits(plan)
        assert self.answers() == [(0, self.config.vocab_size)] * len(self._others)
        return found

    def ask(self, question: Callable[[Runner], Any]) -> list[Any]:
        """What `question`, a function of a module, finds on each rank."""
        for connection in self._others:
            connection.send(("ask", question))
        return [question(self), *self.answers()]

    def answers(self) -> list[Any]:
        """What the followers made of what they were told; AssertionError with a follower's traceback."""
        return [_answer(connection) for connection in self._others]

    def tell(self, verb: str, plan: StepPlan) -> None:
        """Sends the followers a plan to "run", or to compute the "logits" of."""
        rows = [
            replace(
                row,
                sampling=row.sampling and SamplingParams(),
                history=[],
                prompt_length=0,
                targets=[0] * len(row.targets),
                top=0,
            )
            for row in plan.rows
        ]
        for connection in self._others:
            connection.send((verb, StepPlan(plan.step, rows, plan.copies)))


def _answer(connection: Connection[Any, Any]) -> Any:
    assert connection.poll(ANSWER_S), "a rank does not answer"
    error, value = connection.recv()
    assert not error, error
    return value


def _follow(rank: int, paths: dict[int, str], connection: Connection[Any, Any], timeout_s: float) -> None:
    """The life of another rank."""
    torch.set_num_threads(1)
    groups = {}
    for size, path in paths.items():
        if rank < size:
            descriptor = os.open(path, os.O_RDWR)
            groups[size] = SharedMemory(descriptor, rank, size, timeout_s)
            os.close(descriptor)
    runner: Runner | None = None
    while True:
        verb, argument = connection.recv()
        value: Any = None
        try:
            if verb == "load":
                folder, tp, dtype, sizes = argument
                collective = groups[tp]
                runner = load_runner(folder, dtype, collective=collective, **sizes)
            else:
                assert runner is not None
                if verb == "ask":
                    value = argument(runner)
                else:
                    value = runner.run(argument) if verb == "run" else tuple(runner.logits(argument).shape)
        except Exception as error:
            if not isinstance(error, IndexError):  # of the plan: raised before anybody waits for anybody
                collective.abort(f"{type(error).__name__}: {error}")
            connection.send((traceback.format_exc(), None))
        else:
            connection.send(("", value))
