"""One child process that follows Baton's start contract: a spec on standard input, one line of JSON when it is ready.

The child ends when its standard input closes, so it dies with this process however that ends; its standard error (and
whatever else it prints) goes to a log file. Each child leads a session of its own: a terminal's Ctrl-C reaches only
the supervisor, and a kill reaches the child's own children too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.config import CHECKOUT

TAIL_LINES = 20
_LINE_LIMIT = 1 << 20


class StartError(RuntimeError):
    """A process did not get ready; the message says how it ended and quotes the end of its log."""


def log_tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented; says so when there are none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"  | (no log: {error})"
    found = text.splitlines()[-lines:]
    return "\n".join(f"  | {line}" for line in found) if found else f"  | (its log {path} is empty)"


def thread_environment(threads: int) -> dict[str, str]:
    """Bounds the thread pools of torch, BLAS and tokenizers; must be set before they are loaded."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


class ChildProcess:
    """A running child. Make it with `ChildProcess.start`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._drain: asyncio.Task[None] | None = None
        self._gone = False  # killed and reaped: its process group's number may soon be someone else's

    @classmethod
    async def start(
        cls,
        command: list[str],
        spec: bytes,
        *,
        name: str,
        log: Path,
        timeout_s: float,
        environment: Mapping[str, str],
    ) -> tuple[ChildProcess, bytes]:
        """Starts `command`, writes `spec` and a newline, and returns the child with its first line.

        Raises StartError when it ends or stays silent for `timeout_s`; no process is left then, nor when cancelled.
        """
        with log.open("ab") as sink:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=sink,
                env=_environment(environment),
                limit=_LINE_LIMIT,
                start_new_session=True,
            )
        child = cls(name, process, log)
        try:
            line = await child._first_line(spec, timeout_s)
        except BaseException:
            await child.kill()
            raise
        child._drain = asyncio.create_task(child._log_output(), name=f"{name} output")
        return child, line

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_dead(self) -> str:
        """Waits for the end of the process and says how it ended."""
        code = await self._process.wait()
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    async def stop(self, grace_s: float) -> None:
        """Asks it to end by closing its standard input, and kills what still runs after `grace_s`."""
        if self._process.returncode is None:
            self._close_stdin()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        await self.kill()

    async def kill(self) -> None:
        """Kills the child and what it started, and reaps it."""
        self.kill_now()
        await self._process.wait()
        self._gone = True
        if self._drain is not None:
            # A grandchild that left the session may hold the pipe open: its output is not worth waiting for.
            self._drain.cancel()
            await asyncio.gather(self._drain, return_exceptions=True)

    def kill_now(self) -> None:
        """Sends SIGKILL to the child's whole process group, without waiting."""
        if self._gone:
            return
        self._close_stdin()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _close_stdin(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def _first_line(self, spec: bytes, timeout_s: float) -> bytes:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._process.stdin.write(spec + b"\n")
                    await self._process.stdin.drain()
                line = await self._process.stdout.readline()
                ended = "" if line.endswith(b"\n") else await self.wait_dead()
        except TimeoutError:
            raise StartError(
                f"{self.name} was not ready within {timeout_s:g} s; the end of {self.log}:\n{log_tail(self.log)}"
            ) from None
        if ended:
            raise StartError(
                f"{self.name} {ended} before it was ready; the end of {self.log}:\n{log_tail(self.log)}"
            )
        return line

    async def _log_output(self) -> None:
        """Keeps standard output empty, or a chatty child would block on a full pipe."""
        assert self._process.stdout is not None
        with self.log.open("ab") as sink:
            while block := await self._process.stdout.read(65536):
                sink.write(block)
                sink.flush()


def module_command(module: str) -> list[str]:
    """Runs a module of this project with this interpreter."""
    return [sys.executable, "-u", "-m", module]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, so that the checkout is importable even where it is not installed."""
    merged = {**os.environ, **extra}
    paths = [str(CHECKOUT), *filter(None, merged.get("PYTHONPATH", "").split(os.pathsep))]
    merged["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return merged
