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
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import CHECKOUT

TAIL_LINES = 20
_LINE_LIMIT = 1 << 20
_LAST_WORDS_S = 1.0  # between the end of a process and the end of its output, in either order


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
    """A running child. Make it with `ChildProcess.start`.

    Not asyncio's own subprocesses: their `wait` lasts until the pipes are closed as well, so a child's death would go
    unnoticed for as long as a process that it started holds its output.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._gone = False  # killed and reaped: its process group's number may soon be someone else's
        self._drain: asyncio.Task[None] | None = None
        self._output: asyncio.ReadTransport | None = None
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._reap, args=(self._exit,), name=f"reap {name}", daemon=True).start()

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
        child = cls(name, _spawn(command, log, environment), log)
        try:
            line, rest = await child._first_line(spec, timeout_s)
        except BaseException:
            await child.kill()
            raise
        child._drain = asyncio.create_task(child._log_output(rest), name=f"{name} output")
        return child, line

    async def wait_dead(self) -> str:
        """Waits for the end of the process and says how it ended."""
        code = await asyncio.shield(self._exit)
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    async def stop(self, grace_s: float) -> None:
        """Asks it to end by closing its standard input, and kills what still runs after `grace_s`."""
        self._close_stdin()
        await asyncio.wait([self._exit], timeout=grace_s)
        await self.kill()

    async def kill(self) -> None:
        """Kills the child and what it started, and reaps it."""
        self.kill_now()
        await asyncio.shield(self._exit)
        self._gone = True
        if self._drain is not None:
            # A grandchild that left the session may hold the pipe open: its output is not worth waiting for.
            self._drain.cancel()
            await asyncio.gather(self._drain, return_exceptions=True)
        if self._output is not None:
            self._output.close()

    def kill_now(self) -> None:
        """Sends SIGKILL to the child's whole process group, without waiting."""
        if self._gone:
            return
        self._close_stdin()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _reap(self, ended: asyncio.Future[int]) -> None:
        code = self._process.wait()
        # The loop may be closed already when this process is ending.
        with contextlib.suppress(RuntimeError):
            ended.get_loop().call_soon_threadsafe(ended.set_result, code)

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    async def _first_line(self, spec: bytes, timeout_s: float) -> tuple[bytes, asyncio.StreamReader]:
        assert self._process.stdin is not None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_LINE_LIMIT)
        self._output, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        # A spec fits the pipe's buffer, so that writing never blocks.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(spec + b"\n")
            self._process.stdin.flush()
        reading = asyncio.create_task(reader.readline())
        try:
            either: set[asyncio.Future[Any]] = {reading, self._exit}
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() and self._exit.done():
                await asyncio.wait([reading], timeout=_LAST_WORDS_S)
            if reading.done() and (line := reading.result()).endswith(b"\n"):
                return line, reader
            if not reading.done() and not self._exit.done():
                raise StartError(self._complaint(f"was not ready within {timeout_s:g} s"))
            await asyncio.wait([self._exit], timeout=_LAST_WORDS_S)
            how = await self.wait_dead() if self._exit.done() else "closed its output"
            raise StartError(self._complaint(f"{how} before it was ready"))
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _complaint(self, what: str) -> str:
        return f"{self.name} {what}; the end of {self.log}:\n{log_tail(self.log)}"

    async def _log_output(self, output: asyncio.StreamReader) -> None:
        """Keeps standard output empty, or a chatty child would block on a full pipe."""
        with self.log.open("ab") as sink:
            while block := await output.read(65536):
                sink.write(block)
                sink.flush()


def _spawn(command: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            env=_environment(environment),
            start_new_session=True,
        )


def module_command(module: str) -> list[str]:
    """Runs a module of this project with this interpreter."""
    return [sys.executable, "-u", "-m", module]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, so that the checkout is importable even where it is not installed."""
    merged = {**os.environ, **extra}
    paths = [str(CHECKOUT), *filter(None, merged.get("PYTHONPATH", "").split(os.pathsep))]
    merged["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return merged
