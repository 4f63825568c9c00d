"""The other side of a transfer, for tests: an endpoint or a mover in a process of its own, driven over a socket.

`python -m tests.kvtransfer.peer FD`: requests are [method, arguments], answers [result, error], both length-prefixed
MessagePack. It polls its endpoint all the time, as a worker that expects writes does.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import numpy as np

from kvtransfer.transport import TransportError
from kvtransfer.transports import Endpoint, open_transport


def send(sock: socket.socket, message: Any) -> None:
    data = msgspec.msgpack.encode(message)
    sock.sendall(len(data).to_bytes(8, "little") + data)


def receive(sock: socket.socket) -> Any:
    def exactly(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = sock.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError("the other side has ended")
            data += part
        return bytes(data)

    return msgspec.msgpack.decode(exactly(int.from_bytes(exactly(8), "little")))


class PeerProcess:
    """The parent's handle. Methods of `Peer` are called by name: `peer.call("landing")`."""

    def __init__(self, environment: dict[str, str] | None = None, stderr: IO[str] | None = None) -> None:
        mine, theirs = socket.socketpair()
        root = Path(__file__).parents[2]
        self.sock = mine
        self.sock.settimeout(60)
        self.sound = True  # no signal has hurt it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvtransfer.peer", str(theirs.fileno())],
            cwd=root,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": str(root)} | (environment or {}),
            stderr=stderr,
        )
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        send(self.sock, [method, arguments])
        result, error = receive(self.sock)
        if error:
            raise TransportError(error)
        return result

    def signal(self, number: signal.Signals) -> None:
        self.sound = self.sound and number == signal.SIGCONT
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.sock.close()


class Peer:
    """The methods which the parent may call."""

    def __init__(self) -> None:
        self.endpoint: Endpoint | None = None
        self.settled_writes: list[tuple[int, str]] = []
        self.mover: Any = None
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.controls: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def idle(self) -> None:
        if self.endpoint is not None:
            self.settled_writes += [(settled.ticket, settled.error) for settled in self.endpoint.poll()]

    @property
    def it(self) -> Endpoint:
        assert self.endpoint is not None
        return self.endpoint

    def open(self, kind: str, staging_bytes: int, landing_bytes: int, incarnation: str) -> bytes:
        self.endpoint = open_transport(kind, staging_bytes, landing_bytes, incarnation)
        return self.endpoint.describe()

    def close(self) -> None:
        self.it.close()
        self.endpoint = None
        self.settled_writes = []

    def connect(self, peer: str, description: bytes) -> None:
        self.it.connect(peer, description)

    def fill(self, seed: int) -> None:
        self.it.staging[:] = np.random.default_rng(seed).integers(0, 256, self.it.staging.nbytes, np.uint8)

    def write(self, peer: str, rows: list[list[int]]) -> int:
        return self.it.write(peer, np.array(rows, dtype=np.uint64))

    def settled(self) -> list[tuple[int, str]]:
        settled, self.settled_writes = self.settled_writes, []
        return settled

    def gone(self, peer: str) -> bool:
        return self.it.gone(peer)

    def devices(self) -> str:
        return self.it.devices

    def landing(self) -> bytes:
        return self.it.landing.tobytes()

    # ---- a mover ---------------------------------------------------------------------------------------------------

    def open_mover(
        self, kind: str, pool: dict[str, Any], role: Literal["prefill", "decode"], seed: int
    ) -> Any:
        """One rank, joined as in a worker; its incarnation is its role. Returns its hello."""
        import torch

        from kvtransfer.join import Join
        from kvtransfer.memory import TransferMemory
        from kvtransfer.messages import Hello
        from kvtransfer.mover import Mover
        from tests.kvtransfer.pools import kv_spec, pool_bytes, random_layers

        torch.set_num_threads(1)
        kv = kv_spec(**pool)
        memory = TransferMemory.open(
            kind, kv, 0, role=role, slots=2, gather="auto", incarnation=role, pool_bytes=pool_bytes(kv, 0)
        )
        self.layers = random_layers(kv, seed, 0, memory.storage)
        join = Join(1, self.reports.put, lambda peer, done: self.controls.put([peer, done]))
        self.mover = Mover(
            memory,
            self.layers,
            kv,
            rank=0,
            role=role,
            on_report=lambda report: join.put(0, report),
            on_fatal=lambda error: os._exit(3),
        )
        hello = Hello(
            worker_id=role,
            incarnation=role,
            kv=kv,
            transport=memory.name,
            endpoints=[memory.describe()],
            slot_count=2,
            slot_bytes=[memory.slot_bytes],
        )
        return msgspec.to_builtins(hello)

    def submit(self, job: dict[str, Any]) -> None:
        from kvtransfer.messages import MoverJob

        self.mover.submit(msgspec.convert(job, type=MoverJob))

    def expecting(self, on: bool) -> None:
        self.mover.expecting(on)

    def report(self) -> Any:
        return self.reports.get(timeout=30)

    def control(self) -> Any:
        return self.controls.get(timeout=30)

    def pool(self) -> list[bytes]:
        return [layer.numpy().tobytes() for layer in self.layers]


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    peer = Peer()
    while True:
        peer.idle()
        if not select.select([sock], [], [], 0.0005)[0]:
            continue
        try:
            method, arguments = receive(sock)
        except EOFError:
            os._exit(0)
        try:
            answer = [getattr(peer, method)(*arguments), ""]
        except Exception as error:
            answer = [None, f"{type(error).__name__}: {error}"]
        send(sock, answer)


if __name__ == "__main__":
    main()
