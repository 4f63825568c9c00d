"""One connection between two endpoints: a TCP line on which they talk, and a torch.distributed group of just these two
(gloo) for the bytes. `kvtransfer.distributed_transport` opens and serves them, in threads that may block.

A group for each connection, because a group is spoilt as a whole by one dead member. Headers and receipts go over the
line, so that gloo waits only where bytes are due; the group's addresses are exchanged over it too, so that no store has
to listen. What shapes this file, all of it observed: `is_completed` of a send or receive never becomes true, so one can
only wait. The one way to end a connection is a wait that times out, which is how `close` is a fence. A wait in the
middle of a message does not end with the connection, so nobody may depend on its end: senders wait for receipts on the
line instead, and a receiver's connection is closed around it. A receive shorter than what is sent ends the process, so
lengths follow from the header alone, by the same code on both sides.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from kvtransfer.transport import Region, Rows, TransportError

HANDSHAKE_BYTES = 4096  # the longest message from one who has not shown that it knows the secret
_FRAME_BYTES = 256 << 20  # ten million rows
_MEET_S = 10.0  # for both sides to form the group
_PATIENCE = timedelta(minutes=10)  # of a receiver in the middle of a message; deadlines belong to the leases
_DIRECT_BYTES = 512 << 10  # rows of at least this length on average are sent from where they lie
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))

Message = TypeVar("Message")


class Line:
    """MessagePack messages with a length before each, over one connected socket. Every failure is a TransportError."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        """`deadline` (time.monotonic): no wait lasts longer; see `steady`."""
        self._socket = sock
        self.deadline: float | None = deadline
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that vanished is noticed in 30 s
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    @property
    def local_host(self) -> str:
        """This side's address on the way to the other."""
        return str(self._socket.getsockname()[0])

    def fileno(self) -> int:
        return self._socket.fileno()

    def hung_up(self) -> bool:
        """Whether the other side has hung up, or has not answered for so long that the kernel gave it up."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def steady(self) -> None:
        """From here on waits end with a message, or when either side hangs up."""
        self.deadline = None
        self._socket.settimeout(None)

    def send(self, message: object) -> None:
        data = msgspec.msgpack.encode(message)
        try:
            self._hurry()
            self._socket.sendall(len(data).to_bytes(8, "little") + data)
        except OSError as error:
            raise TransportError(f"the connection broke: {error}") from error

    def receive(self, kind: type[Message], limit: int = _FRAME_BYTES) -> Message:
        size = int.from_bytes(self._exactly(8), "little")
        if size > limit:
            raise TransportError(f"a message of {size} bytes; at most {limit} are taken")
        try:
            return msgspec.msgpack.decode(self._exactly(size), type=kind)
        except msgspec.DecodeError as error:
            raise TransportError(f"no {kind.__name__}: {error}") from error

    def hang_up(self) -> None:
        """Wakes whoever waits on either side. The number stays taken until `close`, which only its thread calls."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._socket.close()

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            try:
                self._hurry()
                got = self._socket.recv_into(view[at:])
            except OSError as error:
                raise TransportError(f"the connection broke: {error}") from error
            if not got:
                raise TransportError("the other side has hung up")
            at += got
        return data

    def _hurry(self) -> None:
        if self.deadline is not None:
            self._socket.settimeout(max(0.001, self.deadline - time.monotonic()))


class Pair:
    """The group of two over a `Line`. `rank` 0 is who writes, 1 whose landing memory it is."""

    def __init__(self, line: Line, rank: int) -> None:
        """Blocks until the other side has come too, at most some seconds. Raises TransportError."""
        self._other = 1 - rank
        self._broken = threading.Event()
        self._line = line
        line.deadline = time.monotonic() + _MEET_S
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [_device(line.local_host)]
        options._timeout = timedelta(seconds=_MEET_S)
        options._threads = 1
        try:
            self._group: Any = gloo(_LineStore(line), rank, 2, options)
        except Exception as error:
            raise TransportError(f"gloo finds no connection: {error}") from error
        line.steady()

    def send(self, operation: Rows, region: Region) -> Posted:
        """Begins to send the bytes of an operation (see `kvtransfer.rows`) out of `region`. Raises TransportError."""
        return self._post(self._group.send, operation[:, [0, 2]], region, packs=True)

    def receive(self, operation: Rows, region: Region) -> Posted:
        """Begins to receive the bytes of an operation into `region`, within which it lies. Raises TransportError."""
        return self._post(self._group.recv, operation[:, [1, 2]], region, packs=False)

    def close(self) -> None:
        """Nothing is sent or received here any more, and the other side learns of it. Any thread; at once."""
        if self._broken.is_set():
            return
        self._broken.set()
        self._line.hang_up()
        with contextlib.suppress(Exception):  # this time-out closes gloo's connection, see the module's text
            nothing = torch.zeros(1, dtype=torch.uint8)
            self._group.recv([nothing], self._other, 9).wait(timedelta(milliseconds=1))

    def _post(
        self, call: Callable[[list[torch.Tensor], int, int], Any], part: Rows, region: Region, packs: bool
    ) -> Posted:
        size = int(part[:, 1].sum())
        packed = None
        if size < _DIRECT_BYTES * len(part):
            packed = np.empty(size, dtype=np.uint8)
            if packs:
                _copy(part, region, packed, out=True)
        views = [packed] if packed is not None else [region[at : at + length] for at, length in part.tolist()]
        try:
            works = [call([torch.from_numpy(view)], self._other, 1) for view in views]
        except Exception as error:
            raise TransportError(f"the transfer broke: {error}") from error
        return Posted(works, None if packs else packed, part, region)


@dataclass(frozen=True, slots=True)
class Posted:
    """An operation under way. Once it is dropped gloo touches its bytes no more."""

    works: list[Any]
    packed: Region | None
    part: Rows
    region: Region

    def wait(self) -> None:
        """Until all is sent or received. Raises TransportError when the pair broke, perhaps minutes after that."""
        try:
            for work in self.works:
                work.wait(_PATIENCE)
        except Exception as error:
            raise TransportError(f"the transfer broke: {error}") from error
        if self.packed is not None:
            _copy(self.part, self.region, self.packed, out=False)


def _copy(part: Rows, region: Region, packed: Region, *, out: bool) -> None:
    """Rows of a region into one piece, or back."""
    to = 0
    for at, length in part.tolist():
        here, there = region[at : at + length], packed[to : to + length]
        np.copyto(there, here) if out else np.copyto(here, there)
        to += length


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    key: str
    value: bytes


class _LineStore(dist.Store):  # type: ignore[name-defined,misc]
    """What gloo needs to find the other side: the keys that each of the two sets, told to the other over the line."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line
        self._entries: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        self._entries[key] = value.encode() if isinstance(value, str) else bytes(value)
        self._line.send(_Entry(key, self._entries[key]))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until the line's deadline, whatever `timeout` says."""
        for key in keys:
            while key not in self._entries:
                entry = self._line.receive(_Entry, HANDSHAKE_BYTES)
                self._entries[entry.key] = entry.value

    def check(self, keys: list[str]) -> bool:
        return all(key in self._entries for key in keys)


_devices: dict[str, Any] = {}
_devices_lock = threading.Lock()


def _device(host: str) -> Any:
    """gloo's thread and listening port for an address of this host; one for all groups of this process."""
    with _devices_lock:
        if host not in _devices:
            gloo: Any = dist.ProcessGroupGloo
            _devices[host] = gloo.create_device(hostname=host, lazy_init=False)
        return _devices[host]
