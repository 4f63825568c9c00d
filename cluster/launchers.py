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
from cluster.process import ChildProcess, StartError, log_tail, module_command, thread_environment
from cluster.specs import Place
from worker.spec import Role, Started, WorkerSpec

LAST_WORDS_S = 1.0  # for rank 0 to say why, after another rank failed


def rank_name(worker_id: str, rank: int) -> str:
    """The name of a rank's process and log."""
    return f"{worker_id}-rank{rank}" if rank else worker_id


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
        """All its ranks together: none is ready before all have met."""
        starting = [
            asyncio.create_task(self._start_rank(msgspec.structs.replace(spec, rank=rank), place))
            for rank in range(spec.tensor_parallel)
        ]
        try:
            await asyncio.wait(starting, return_when=asyncio.FIRST_EXCEPTION)
            if any(each.done() and each.exception() for each in starting):
                # Rank 0's words first: it knows what the others said before they ended.
                await asyncio.wait(starting[:1], timeout=LAST_WORDS_S)
                for each in starting:
                    if each.done():
                        each.result()
            ranks = [each.result() for each in starting]
            return _PlainHandle(
                [child for child, _ in ranks], decode_started(ranks[0][1], spec), self._children.discard
            )
        except BaseException:
            for each in starting:
                each.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            for each in starting:
                if not each.cancelled() and each.exception() is None:
                    child, _ = each.result()
                    self._children.discard(child)
                    await child.kill()
            raise

    async def _start_rank(self, spec: WorkerSpec, place: Place) -> tuple[ChildProcess, bytes]:
        environment = {**thread_environment(spec.threads), guard.MARK: self._mark}
        if place.gpu >= 0:
            # The rank then sees one device, number 0; Ray gives its workers the same view.
            environment["CUDA_VISIBLE_DEVICES"] = str(place.gpu + spec.rank)
        name = rank_name(spec.worker_id, spec.rank)
        child, line = await ChildProcess.start(
            self._commands[spec.role] if not spec.rank else module_command("worker.follower"),
            msgspec.json.encode(spec),
            name=name,
            log=self._log(name),
            timeout_s=self._start_timeout_s,
            environment=environment,
        )
        self._children.add(child)
        return child, line

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
    """The processes of one worker, rank 0 first, which ends by itself when any of the others does."""

    def __init__(
        self, children: list[ChildProcess], started: Started, forget: Callable[[ChildProcess], None]
    ) -> None:
        self.started = started
        self._children = children
        self._forget = forget

    async def wait_dead(self) -> str:
        return await self._children[0].wait_dead()

    async def stop(self, grace_s: float) -> None:
        await self._children[0].stop(grace_s)  # it tells the others
        await self._end_others()

    async def kill(self) -> None:
        await self._children[0].kill()
        await self._end_others()

    async def _end_others(self) -> None:
        await asyncio.gather(*(child.kill() for child in self._children[1:]))
        for child in self._children:
            self._forget(child)
