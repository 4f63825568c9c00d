"""Starting one worker and seeing it end, whoever provides the process: plain subprocesses here, Ray in `ray_launcher`.

A launcher only starts, watches and ends processes. When to start one again, and who else must know, is decided by
`cluster.supervisor`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from cluster import guard
from cluster.process import ChildProcess, StartError, log_tail, thread_environment
from cluster.specs import Place
from worker.spec import Role, Started, WorkerSpec


class WorkerHandle(Protocol):
    """One life of one worker."""

    @property
    def started(self) -> Started:
        """What it said when it was ready."""

    async def wait_dead(self) -> str:
        """Waits until it is certainly over and says why. Cancelling the wait changes nothing."""

    async def stop(self, grace_s: float) -> None:
        """Ends it: gracefully, by force after `grace_s`. Afterwards no process of it is left. Idempotent."""

    async def kill(self) -> None:
        """Ends it by force, at once."""


class Launcher(Protocol):
    """Provides workers' processes."""

    name: str
    host: (
        str  # once open: this machine's address as the workers' nodes reach it; empty: all is on this machine
    )

    async def open(self) -> None:
        """Gets ready to start workers; raises StartError."""

    async def start_worker(self, spec: WorkerSpec, place: Place) -> WorkerHandle:
        """Starts a worker and waits until it is ready; raises StartError, and leaves nothing behind then."""

    async def close(self) -> None:
        """Ends everything that this launcher started."""

    def kill_now(self) -> None:
        """Kills everything without waiting: the second Ctrl-C."""

    def log_tail(self, worker_id: str) -> str:
        """The last lines that this worker logged, as far as they are on this machine."""


def decode_started(line: bytes, spec: WorkerSpec) -> Started:
    """The worker's answer, checked against what was asked; raises StartError."""
    try:
        started = msgspec.json.decode(line, type=Started)
    except msgspec.DecodeError as error:
        raise StartError(
            f"{spec.worker_id} printed {line[:200]!r} instead of a Started message: {error}"
        ) from None
    if (started.worker_id, started.incarnation) != (spec.worker_id, spec.incarnation):
        raise StartError(
            f"{spec.worker_id} answered as {started.worker_id}, incarnation {started.incarnation}"
        )
    return started


class PlainLauncher:
    """Workers as subprocesses of this process, on this machine: `python -m prefill` and `python -m decode`."""

    name = "plain"
    host = ""

    def __init__(
        self, commands: Mapping[Role, list[str]], *, log_dir: Path, start_timeout_s: float, mark: str
    ) -> None:
        self._log_dir = log_dir
        self._start_timeout_s = start_timeout_s
        self._mark = mark
        self._commands = commands
        self._children: set[ChildProcess] = set()

    async def open(self) -> None:
        """Nothing to prepare."""

    async def start_worker(self, spec: WorkerSpec, place: Place) -> WorkerHandle:
        environment = {**thread_environment(spec.threads), guard.MARK: self._mark}
        if place.gpu >= 0:
            # The worker then sees one device, number 0; Ray gives its workers the same view.
            environment["CUDA_VISIBLE_DEVICES"] = str(place.gpu)
        child, line = await ChildProcess.start(
            self._commands[spec.role],
            msgspec.json.encode(spec),
            name=spec.worker_id,
            log=self._log(spec.worker_id),
            timeout_s=self._start_timeout_s,
            environment=environment,
        )
        self._children.add(child)
        try:
            return _PlainHandle(child, decode_started(line, spec), self._children.discard)
        except StartError:
            self._children.discard(child)
            await child.kill()
            raise

    async def close(self) -> None:
        await asyncio.gather(*(child.kill() for child in list(self._children)))
        self._children.clear()

    def kill_now(self) -> None:
        for child in self._children:
            child.kill_now()

    def log_tail(self, worker_id: str) -> str:
        return log_tail(self._log(worker_id))

    def _log(self, worker_id: str) -> Path:
        return self._log_dir / f"{worker_id}.log"


class _PlainHandle:
    def __init__(self, child: ChildProcess, started: Started, forget: Callable[[ChildProcess], None]) -> None:
        self.started = started
        self._child = child
        self._forget = forget

    async def wait_dead(self) -> str:
        return await self._child.wait_dead()

    async def stop(self, grace_s: float) -> None:
        await self._child.stop(grace_s)
        self._forget(self._child)

    async def kill(self) -> None:
        await self._child.kill()
        self._forget(self._child)
