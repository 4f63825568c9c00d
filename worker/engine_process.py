"""A rank process as its shell sees it: started, spoken to over the ring, watched, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

from worker import ring
from worker.messages import FromEngine, Shutdown, ToEngine
from worker.spec import WorkerSpec

RETRY_S = 0.002  # while the ring is full


class EngineProcess:
    """Start it inside a running asyncio loop; both callbacks are called from that loop."""

    def __init__(
        self,
        spec: WorkerSpec,
        module: str,
        on_message: Callable[[FromEngine], None],
        on_death: Callable[[str], None],
        listener: socket.socket | None = None,
    ) -> None:
        """`listener`: where the other ranks will dial, when they are on other hosts."""
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_death = on_death
        to_engine, from_engine = ring.create(), ring.create()
        life_read, life_write = os.pipe2(os.O_CLOEXEC)
        inherited = [to_engine.memory, to_engine.event, from_engine.memory, from_engine.event, life_read]
        # Without the cluster token: anyone on the machine can read a command line. Only ranks on several hosts need it.
        token = _sealed(spec.token) if listener is not None else -1
        arguments = {
            "spec": msgspec.structs.replace(spec, token=""),
            "to_engine": to_engine,
            "from_engine": from_engine,
            "life": life_read,
            "listener": -1 if listener is None else listener.fileno(),
            "token": token,
        }
        if listener is not None:
            inherited += [listener.fileno(), token]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(spec.threads),
            "MKL_NUM_THREADS": str(spec.threads),
            "PYTHONUNBUFFERED": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, msgspec.json.encode(arguments).decode()],
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if sys.stderr.isatty() else None,
            env=environment,
        )
        os.close(life_read)
        if listener is not None:
            os.close(token)
            listener.close()
        self._life: int | None = life_write
        self._writer = ring.RingWriter(to_engine)
        self._reader = ring.RingReader(from_engine, FromEngine)
        self._fds = [to_engine.memory, to_engine.event, from_engine.memory, from_engine.event]
        self._retry: asyncio.TimerHandle | None = None
        self.dead = self._loop.create_future()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._died)
        self._loop.add_reader(self._reader.fileno(), self._readable)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queues a message; never blocks. Messages to a dead engine are dropped: its death is told once."""
        if self._life is None:
            return
        self._writer.send(message)
        self._flush()

    def _flush(self) -> None:
        self._retry = None
        if self._life is not None and not self._writer.flush():
            self._retry = self._loop.call_later(RETRY_S, self._flush)

    def _readable(self) -> None:
        for message in self._reader.read():
            self._on_message(message)

    def _died(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._readable()  # its last words
        status = self._process.wait()
        self._release()
        self._loop.remove_reader(self._reader.fileno())
        for fd in [*self._fds, self._pidfd]:
            os.close(fd)
        reason = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        self.dead.set_result(reason)
        self._on_death(reason)

    def _release(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        if self._life is not None:
            os.close(self._life)
            self._life = None

    async def stop(self, grace_s: float) -> None:
        """Asks it to end, and kills it when it has not within `grace_s`."""
        if self.dead.done():
            return
        self.send(Shutdown())
        try:
            await asyncio.wait_for(asyncio.shield(self.dead), grace_s)
        except TimeoutError:
            self._process.kill()
            await self.dead


def _sealed(text: str) -> int:
    """A descriptor from which a child can read this text."""
    fd = os.memfd_create("baton-token", os.MFD_CLOEXEC)
    os.pwrite(fd, text.encode(), 0)
    return fd
