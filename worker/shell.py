"""The shell process of a worker: gRPC on the outside, the ring to its rank process on the inside. Decides nothing.

`prefill.shell` and `decode.shell` add the services of their role. It runs under asyncio, in a process of its own
(`python -m prefill`, `python -m decode`) or inside a Ray actor; it never imports ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time

import grpc.aio
import msgspec

from baton import rpc
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2_grpc
from engine.api import Costs, KvEvents, Load, RequestEnd, StepOutput
from worker.engine_process import EngineProcess
from worker.messages import Fatal, FromEngine, LedgerRead, PeerRefused, Ready, ToEngine, ToPeer
from worker.sessions import WorkerService, worker_status
from worker.spec import Started, WorkerSpec

log = logging.getLogger("baton.shell")

ENGINE_GRACE_S = 3.0
SERVER_GRACE_S = 0.5


class WorkerShell:
    """One worker. Subclasses name the rank module and add services and links."""

    rank_module: str

    def __init__(self, spec: WorkerSpec, listener: socket.socket | None = None) -> None:
        """`listener`: where this worker's other ranks will dial, when they are on other hosts."""
        self.spec = spec
        self._listener = listener
        self.ready: Ready | None = None
        self._load: Load | None = None
        self._costs: Costs | None = None
        self._address = ""
        self._engine: EngineProcess | None = None
        self._server: grpc.aio.Server | None = None
        self._is_ready: asyncio.Future[Ready] | None = None
        self._closed: asyncio.Future[str] | None = None
        self._stopping = False
        self._heard = time.monotonic()  # when the engine last said anything
        self.service = WorkerService(spec, self.send, self.describe)

    # ---- life --------------------------------------------------------------------------------------------------

    async def start(self) -> Started:
        """Starts engine and server; returns when requests can be taken. RuntimeError says why they cannot."""
        loop = asyncio.get_running_loop()
        self._is_ready = loop.create_future()
        self._closed = loop.create_future()
        self._engine = EngineProcess(
            self.spec, self.rank_module, self._from_engine, self._engine_died, self._listener
        )
        await asyncio.wait([self._is_ready, self._closed], return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
        if not self._is_ready.done():
            raise RuntimeError(f"{self.spec.worker_id}: {self._closed.result()}")
        self.ready = self._is_ready.result()
        self._server = rpc.server(self.spec.token)
        worker_pb2_grpc.add_WorkerServicer_to_server(self.service, self._server)
        self.add_services(self._server)
        port = self._server.add_insecure_port(f"{self.spec.bind_host}:{self.spec.port}")
        await self._server.start()
        self._address = f"{self.spec.advertise_host}:{port}"
        log.info("%s serves at %s with %d KV blocks", self.spec.worker_id, self._address, self.ready.blocks)
        return Started(
            worker_id=self.spec.worker_id,
            role=self.spec.role,
            incarnation=self.spec.incarnation,
            address=self._address,
            pid=os.getpid(),
            engine_pids=self.ready.pids,
            transport=self.ready.hello.transport,
            blocks=self.ready.blocks,
        )

    async def wait_closed(self) -> str:
        """Returns why the worker cannot go on, when that happens."""
        assert self._closed is not None, "not started"
        return await asyncio.shield(self._closed)

    async def stop(self) -> None:
        """Ends links, server and engine, each within its grace."""
        self._stopping = True
        await self.close_links()
        if self._server is not None:
            await self._server.stop(SERVER_GRACE_S)
        if self._engine is not None:
            await self._engine.stop(ENGINE_GRACE_S)

    def add_services(self, server: grpc.aio.Server) -> None:
        """For the role: its services beside `baton.v1.Worker`."""

    async def close_links(self) -> None:
        """For the role: its streams to other workers."""

    def to_peer(self, message: ToPeer) -> None:
        """For the role: what its engine says to another worker."""

    # ---- the engine --------------------------------------------------------------------------------------------

    def send(self, message: ToEngine) -> None:
        if self._engine is not None:
            self._engine.send(message)

    def describe(self) -> api.WorkerStatus:
        assert self._engine is not None
        transport = self.ready.hello.transport if self.ready else ""
        silent_s = time.monotonic() - self._heard
        return worker_status(
            self.spec,
            self._address,
            transport,
            os.getpid(),
            self.ready.pids if self.ready else [self._engine.pid],
            silent_s,
            self._load,
            self._costs,
        )

    def _from_engine(self, message: FromEngine) -> None:
        self._heard = time.monotonic()
        if isinstance(message, StepOutput):
            self.service.step_output(message)
        elif isinstance(message, ToPeer):
            self.to_peer(message)
        elif isinstance(message, RequestEnd):
            self.service.request_end(message)
        elif isinstance(message, Load):
            self._load = message
            self._costs = message.costs or self._costs
            self.service.load(new_costs=message.costs is not None)
        elif isinstance(message, LedgerRead):
            assert self.ready is not None
            self.service.ledger_read(message, sum(self.ready.hello.slot_bytes))
        elif isinstance(message, KvEvents):
            self.service.kv_events(message)
        elif isinstance(message, Ready):
            # What a prefill worker has was computed there, and has the plain names.
            self.service.ready(
                self.spec.block_size, self.spec.wire_dtype if self.spec.role == "decode" else ""
            )
            assert self._is_ready is not None
            self._is_ready.set_result(message)
        elif isinstance(message, PeerRefused):
            log.error("%s: no hand-offs with %s: %s", self.spec.worker_id, message.peer, message.reason)
        elif isinstance(message, Fatal):
            self._close(message.reason)

    def _engine_died(self, reason: str) -> None:
        self._close(f"engine process ended: {reason}")

    def _close(self, reason: str) -> None:
        if self._closed is not None and not self._closed.done() and not self._stopping:
            log.error("%s: %s", self.spec.worker_id, reason)
            self._closed.set_result(reason)


async def run_from_stdin(shell_type: type[WorkerShell]) -> int:
    """The plain way to run a worker; see `worker.spec`. Returns the exit status."""
    loop = asyncio.get_running_loop()
    spec_line = await loop.run_in_executor(None, sys.stdin.readline)
    spec = msgspec.json.decode(spec_line, type=WorkerSpec)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s {spec.worker_id} shell %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    shell = shell_type(spec)
    try:
        started = await shell.start()
    except RuntimeError as error:
        log.error("%s", error)
        return 1
    sys.stdout.write(msgspec.json.encode(started).decode() + "\n")
    sys.stdout.flush()
    # A parent that dies, however it dies, closes our standard input.
    parent = asyncio.create_task(_end_of_stdin())
    closed = asyncio.create_task(shell.wait_closed())
    await asyncio.wait({parent, closed}, return_when=asyncio.FIRST_COMPLETED)
    failed = closed.done()
    await shell.stop()
    for task in (parent, closed):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return 1 if failed else 0


async def _end_of_stdin() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while await reader.read(4096):
            pass
    finally:
        transport.close()


def run(shell_type: type[WorkerShell]) -> None:
    """`python -m prefill` and `python -m decode`."""
    import signal

    import uvloop

    async def main() -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is the supervisor's to handle
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        return await run_from_stdin(shell_type)

    try:
        status = uvloop.run(main())
    except asyncio.CancelledError:
        status = 0
    os._exit(status)
