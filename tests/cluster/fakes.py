"""Stand-ins for the real workers and the real router: they keep the start contract and answer what a supervisor asks.

Run as `python tests/cluster/fakes.py worker|router|serve`; as a Ray shell through `open_shell`. How one misbehaves is
told by files in its model's folder, named FAULT-WORKER_ID, so that it can be changed while everything runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec

from baton import rpc
from baton.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from router.spec import RouterSpec, RouterStarted
from worker.spec import Role, Started, WorkerSpec

COMMANDS: dict[Role, list[str]] = {role: [sys.executable, __file__, "worker"] for role in get_args(Role)}
ROUTER = [sys.executable, __file__, "router"]
SHELLS: dict[Role, str] = dict.fromkeys(get_args(Role), "tests.cluster.fakes:open_shell")


class Members(worker_pb2_grpc.MembershipServicer):
    """Remembers the newest list and leaves it in a file, where a test can read it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.newest = worker_pb2.Members()

    async def SetMembers(self, request: worker_pb2.Members, context: object) -> worker_pb2.MembersAck:
        if request.version > self.newest.version:
            self.newest = request
            members = {member.worker_id: member.incarnation for member in request.members}
            restarts = {member.worker_id: member.restarts for member in request.members}
            aside = self.file.with_suffix(".part")
            aside.write_text(
                json.dumps({"version": request.version, "members": members, "restarts": restarts})
            )
            aside.replace(self.file)
        return worker_pb2.MembersAck(version=self.newest.version)


class FakeShell(worker_pb2_grpc.WorkerServicer):
    """A worker whose engine is a process that ends only when it is killed."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.folder = Path(spec.model_path)
        self.members = Members(self.folder / f"members-{spec.worker_id}.json")
        self.engine: subprocess.Popen[bytes] | None = None
        self.closed: asyncio.Future[str] | None = None

    def faulty(self, fault: str) -> bool:
        return (self.folder / f"{fault}-{self.spec.worker_id}").exists()

    async def start(self) -> Started:
        if self.faulty("crash"):
            raise RuntimeError(f"no weights for {self.spec.worker_id}")
        if self.faulty("mute"):
            await asyncio.Event().wait()
        self.closed = asyncio.get_running_loop().create_future()
        self.engine = subprocess.Popen(
            [sys.executable, "-S", "-c", "import signal\nwhile True: signal.pause()"]
        )
        self.server = rpc.server(self.spec.token)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)
        worker_pb2_grpc.add_MembershipServicer_to_server(self.members, self.server)
        port = self.server.add_insecure_port(f"{self.spec.bind_host}:{self.spec.port}")
        await self.server.start()
        incarnation = "someone-else" if self.faulty("impostor") else self.spec.incarnation
        return Started(
            worker_id=self.spec.worker_id,
            role=self.spec.role,
            incarnation=incarnation,
            address=f"{self.spec.advertise_host}:{port}",
            pid=os.getpid(),
            engine_pids=[self.engine.pid],
            transport="fake",
            blocks=16,
        )

    async def Describe(self, request: object, context: object) -> inference_pb2.WorkerStatus:
        if self.faulty("give-up") and self.closed is not None and not self.closed.done():
            self.closed.set_result("the engine said goodbye")
        peers = [member.incarnation for member in self.members.newest.members if member.role == "prefill"]
        return inference_pb2.WorkerStatus(
            worker_id=self.spec.worker_id, peers=[] if self.faulty("unlinked") else peers
        )

    async def wait_closed(self) -> str:
        assert self.closed is not None
        return await self.closed

    async def stop(self) -> None:
        if self.faulty("stubborn"):
            await asyncio.Event().wait()
        assert self.engine is not None
        self.engine.kill()
        self.engine.wait()
        await self.server.stop(0)
        (self.folder / f"stopped-{self.spec.worker_id}").touch()


def open_shell(spec: WorkerSpec, listener: socket.socket | None = None) -> FakeShell:
    return FakeShell(spec)


class FakeRouter(inference_pb2_grpc.InferenceServicer):
    def __init__(self, spec: RouterSpec) -> None:
        self.spec = spec
        name = spec.router_id.replace("router-0", "router")
        self.members = Members(Path(spec.model_path) / f"members-{name}.json")

    async def Status(self, request: object, context: object) -> inference_pb2.StatusResponse:
        return inference_pb2.StatusResponse(
            router=self.spec.router_id, ready=bool(self.members.newest.members)
        )


async def _stdin_closed() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    await reader.read()


async def _worker(line: bytes) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    shell = open_shell(msgspec.json.decode(line, type=WorkerSpec))
    print(msgspec.json.encode(await shell.start()).decode(), flush=True)
    gone = asyncio.create_task(_stdin_closed())
    dead = asyncio.create_task(shell.wait_closed())
    await asyncio.wait({gone, dead}, return_when=asyncio.FIRST_COMPLETED)
    await shell.stop()


async def _router(line: bytes) -> None:
    spec = msgspec.json.decode(line, type=RouterSpec)
    if (Path(spec.model_path) / "crash-router").exists():
        raise RuntimeError("no router today")
    fake = FakeRouter(spec)
    server = rpc.server(spec.token)
    inference_pb2_grpc.add_InferenceServicer_to_server(fake, server)
    worker_pb2_grpc.add_MembershipServicer_to_server(fake.members, server)
    port = server.add_insecure_port(spec.grpc)
    await server.start()
    started = RouterStarted(http=spec.http, grpc=f"127.0.0.1:{port}", pid=os.getpid())
    print(msgspec.json.encode(started).decode(), flush=True)
    await _stdin_closed()
    await server.stop(0)


def _serve(arguments: list[str]) -> int:
    """`baton serve` with the fakes in the places of the real processes."""
    from cluster.config import load
    from cluster.serve import Programs, serve

    return serve(load(None, arguments), Programs(workers=COMMANDS, router=ROUTER, shells=SHELLS))


if __name__ == "__main__":
    kind = sys.argv[1]
    if kind == "serve":
        os._exit(_serve(sys.argv[2:]))
    # One byte at a time: what follows the line belongs to the reader of the pipe's end.
    spec_line = b""
    while not spec_line.endswith(b"\n"):
        spec_line += os.read(0, 1)
    asyncio.run(_worker(spec_line) if kind == "worker" else _router(spec_line))
