"""How the ranks of one worker meet and speak: rank 0 listens, every other rank dials it once.

On one host they meet at a unix socket (same user only) over which rank 0 passes the descriptors of two rings and of
the memory for collectives; afterwards that socket only shows who died. Between hosts they meet over TCP, prove to each
other that they know the cluster token, and the messages themselves go over the connection. Every wait is bounded.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import struct
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import msgspec

from kvtransfer.messages import MoverJob, MoverReport
from worker import ring
from worker.messages import Fatal, Shutdown
from worker.spec import WorkerSpec
from worker.step_codec import StepDelta

MEET_TIMEOUT_S = 120.0  # a rank imports torch before it dials
HELLO_TIMEOUT_S = 10.0
RETRY_S = 0.05
MESSAGE_LIMIT = 256 << 20
_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7)


class Expecting(msgspec.Struct, frozen=True, tag=True):
    """Peers may (not) be writing into the worker's slots now."""

    on: bool


class RankReady(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A rank has loaded its part: what rank 0 tells other workers of it."""

    rank: int
    pid: int
    blocks: int
    endpoint: bytes
    slot_bytes: int


ToRank = StepDelta | MoverJob | Expecting | Shutdown
FromRank = RankReady | MoverReport | Fatal


class Arrive(msgspec.Struct, frozen=True):
    """What a rank says first. `proof` is over rank 0's challenge; on one host the kernel knows who it is."""

    incarnation: str
    rank: int
    tensor_parallel: int
    proof: bytes = b""
    challenge: bytes = b""


class Welcome(msgspec.Struct, frozen=True):
    """Rank 0's answer. `store` is the HOST:PORT for torch.distributed where collectives do not use shared memory."""

    refusal: str = ""
    store: str = ""
    proof: bytes = b""


class MeetingError(RuntimeError):
    """The ranks of this worker did not come together; says which is missing or what is wrong with it."""


class LinkLost(ConnectionError):
    """The process at the other end is gone."""


class RankLink(Protocol):
    """Messages between rank 0 and one other rank, in order, both ways."""

    def send(self, message: Any) -> None:
        """Queues a message and writes what fits; never blocks. From any thread. Dropped when the other end is gone."""

    def flush(self) -> bool:
        """Writes what fits now; True when nothing is left."""

    def read(self) -> list[Any]:
        """All whole messages that have come; LinkLost once the other end is gone and all of it was read."""

    def filenos(self) -> list[int]:
        """Readable when there may be something to read, or the other end is gone; the last one shows the latter."""

    def close(self) -> None:
        """The other end sees this as the end of this process."""


class RingLink:
    """Two rings on one host, and the socket over which they came."""

    def __init__(self, out: ring.RingFds, into: ring.RingFds, into_type: Any, meeting: socket.socket) -> None:
        self._writer = ring.RingWriter(out)
        self._reader = ring.RingReader(into, into_type)
        self._socket = meeting
        self._socket.setblocking(False)

    def send(self, message: Any) -> None:
        self._writer.send(message)

    def flush(self) -> bool:
        return self._writer.flush()

    def read(self) -> list[Any]:
        lost = self._lost()  # before reading: what was written before the end is then seen
        messages = self._reader.read()
        if lost and not messages:
            raise LinkLost("its process is gone")
        return messages

    def filenos(self) -> list[int]:
        return [self._reader.fileno(), self._socket.fileno()]

    def close(self) -> None:
        self._socket.close()

    def _lost(self) -> bool:
        try:
            return self._socket.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


class StreamLink:
    """Length-framed MessagePack over one connection between two hosts."""

    def __init__(self, connection: socket.socket, into_type: Any) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._socket = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(into_type)
        self._pending: deque[memoryview] = deque()
        self._pending_bytes = 0
        self._buffer = bytearray()
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        data = self._encoder.encode(message)
        with self._lock:
            self._pending.append(memoryview(_LENGTH.pack(len(data)) + data))
            self._pending_bytes += len(data) + _LENGTH.size
            if self._pending_bytes > ring.PENDING_LIMIT:
                raise ring.RingFull(f"{self._pending_bytes} bytes wait for a rank that does not read")
            self._flush()

    def flush(self) -> bool:
        with self._lock:
            self._flush()
            return not self._pending

    def read(self) -> list[Any]:
        lost = False
        try:
            while data := self._socket.recv(1 << 20):
                self._buffer += data
            lost = True
        except BlockingIOError:
            pass
        except OSError:
            lost = True
        messages, at = [], 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if length > MESSAGE_LIMIT:
                raise LinkLost(f"a message of {length} bytes, which nobody sends")
            if len(self._buffer) - at - _LENGTH.size < length:
                break
            at += _LENGTH.size
            messages.append(self._decoder.decode(memoryview(self._buffer)[at : at + length]))
            at += length
        del self._buffer[:at]
        if lost and not messages:
            raise LinkLost("the connection ended")
        return messages

    def filenos(self) -> list[int]:
        return [self._socket.fileno()]

    def close(self) -> None:
        self._socket.close()

    def _flush(self) -> None:
        while self._pending:
            try:
                written = self._socket.send(self._pending[0])
            except BlockingIOError:
                return
            except OSError:  # who reads will see it, and say it
                self._pending.clear()
                self._pending_bytes = 0
                return
            self._pending_bytes -= written
            if written == len(self._pending[0]):
                self._pending.popleft()
            else:
                self._pending[0] = self._pending[0][written:]


# ---- meeting -------------------------------------------------------------------------------------------------------


def default_rendezvous(incarnation: str) -> str:
    """The path of the unix socket of this incarnation, in a folder that only this user can enter."""
    folder = Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise MeetingError(f"{folder}: must be a folder of this user that nobody else can enter; remove it")
    return str(folder / f"{incarnation}.sock")


def across_hosts(rendezvous: str) -> bool:
    """Whether the ranks meet over TCP."""
    return bool(rendezvous) and "/" not in rendezvous


def meet_followers(
    spec: WorkerSpec, listener: socket.socket | None, collective_fd: int, store: str
) -> dict[int, RankLink]:
    """Rank 0's side: waits until all other ranks have dialled. `listener` for TCP, else it makes its own socket.

    `collective_fd` is passed to ranks of this host, `store` told to those of others. Raises MeetingError.
    """
    deadline = time.monotonic() + MEET_TIMEOUT_S
    path = ""
    if listener is None:
        path = spec.rendezvous or default_rendezvous(spec.incarnation)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.bind(path)
        listener.listen(spec.tensor_parallel)
    links: dict[int, RankLink] = {}
    try:
        while len(links) < spec.tensor_parallel - 1:
            missing = sorted(set(range(1, spec.tensor_parallel)) - links.keys())
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise MeetingError(f"ranks {missing} did not come within {MEET_TIMEOUT_S:g} s") from None
            connection.settimeout(HELLO_TIMEOUT_S)
            try:
                rank, link = _welcome(spec, connection, missing, collective_fd, store, local=bool(path))
            except (OSError, msgspec.MsgspecError, MeetingError) as error:
                connection.close()
                if isinstance(error, MeetingError):
                    raise
                continue  # whoever that was, it was no rank of ours
            links[rank] = link
    except BaseException:
        for link in links.values():
            link.close()
        raise
    finally:
        listener.close()
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)
    return links


def _welcome(
    spec: WorkerSpec,
    connection: socket.socket,
    missing: list[int],
    collective_fd: int,
    store: str,
    *,
    local: bool,
) -> tuple[int, RankLink]:
    challenge = b"" if local else secrets.token_bytes(32)
    if local:
        _check_user(connection)
    else:
        _send(connection, challenge)
    arrive = _receive(connection, Arrive)
    if not local and not hmac.compare_digest(arrive.proof, _proof(spec.token, b"rank", challenge, arrive)):
        raise OSError("a wrong cluster token")
    refusal = ""
    if arrive.incarnation != spec.incarnation or arrive.tensor_parallel != spec.tensor_parallel:
        refusal = (
            f"it is of incarnation {arrive.incarnation} with {arrive.tensor_parallel} ranks, this worker "
            f"{spec.incarnation} with {spec.tensor_parallel}"
        )
    elif arrive.rank not in missing:
        refusal = f"rank {arrive.rank} is not awaited: {missing} are"
    proof = b"" if local else _proof(spec.token, b"leader", arrive.challenge, arrive)
    welcome = Welcome(refusal, store, proof)
    if refusal:
        _send(connection, welcome)
        raise OSError(refusal)
    if not local:
        _send(connection, welcome)
        return arrive.rank, StreamLink(connection, FromRank)
    out, into = ring.create(), ring.create()
    descriptors = [out.memory, out.event, into.memory, into.event, collective_fd]
    _send(connection, welcome, descriptors)
    return arrive.rank, RingLink(out, into, FromRank, connection)


def dial_leader(spec: WorkerSpec) -> tuple[RankLink, int, str]:
    """Another rank's side: the link to rank 0, the descriptor for collectives (-1 across hosts), and the store.

    Rank 0 may not listen yet: dials again until it does. Raises MeetingError.
    """
    deadline = time.monotonic() + MEET_TIMEOUT_S
    remote = across_hosts(spec.rendezvous)
    address: Any = spec.rendezvous or default_rendezvous(spec.incarnation)
    if remote:
        host, _, port = address.rpartition(":")
        address = (host.strip("[]"), int(port))
    pause = threading.Event()
    while True:
        family = socket.AF_UNIX if not remote else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.settimeout(HELLO_TIMEOUT_S)
        try:
            connection.connect(address)
            break
        except OSError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise MeetingError(f"rank 0 was not found at {spec.rendezvous or address}: {error}") from None
            pause.wait(RETRY_S)
    try:
        # Rank 0 answers those who came before first, and may be waiting for one of them.
        connection.settimeout(max(HELLO_TIMEOUT_S, deadline - time.monotonic()))
        return _arrive(spec, connection, remote)
    except MeetingError:
        connection.close()
        raise
    except (OSError, msgspec.MsgspecError) as error:
        connection.close()
        raise MeetingError(f"rank 0 at {spec.rendezvous or address}: {error}") from None


def _arrive(spec: WorkerSpec, connection: socket.socket, remote: bool) -> tuple[RankLink, int, str]:
    challenge = _receive(connection, bytes) if remote else b""
    arrive = Arrive(
        spec.incarnation,
        spec.rank,
        spec.tensor_parallel,
        challenge=secrets.token_bytes(32) if remote else b"",
    )
    if remote:
        arrive = msgspec.structs.replace(arrive, proof=_proof(spec.token, b"rank", challenge, arrive))
    _send(connection, arrive)
    descriptors: list[int] = []
    welcome = _receive(connection, Welcome, descriptors)
    if welcome.refusal:
        raise MeetingError(f"rank 0 refused rank {spec.rank}: {welcome.refusal}")
    if remote:
        if not hmac.compare_digest(welcome.proof, _proof(spec.token, b"leader", arrive.challenge, arrive)):
            raise MeetingError(f"who listens at {spec.rendezvous} does not know the cluster token")
        return StreamLink(connection, ToRank), -1, welcome.store
    if len(descriptors) != 5:
        raise MeetingError(f"rank 0 passed {len(descriptors)} descriptors, not 5")
    into, out = ring.RingFds(*descriptors[:2]), ring.RingFds(*descriptors[2:4])
    return RingLink(out, into, ToRank, connection), descriptors[4], welcome.store


def _proof(token: str, side: bytes, challenge: bytes, arrive: Arrive) -> bytes:
    told = f"{arrive.incarnation} {arrive.rank} {arrive.tensor_parallel}".encode()
    return hmac.digest(token.encode(), side + challenge + told, hashlib.sha256)


def _check_user(connection: socket.socket) -> None:
    given = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(given)
    if uid != os.getuid():
        raise OSError(f"a process of user {uid} dialled, this one runs as {os.getuid()}")


def _send(connection: socket.socket, message: Any, descriptors: list[int] | None = None) -> None:
    data = msgspec.msgpack.encode(message)
    frame = _LENGTH.pack(len(data)) + data
    if descriptors:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        sent = connection.sendmsg([frame], rights)
        frame = frame[sent:]
    connection.sendall(frame)


def _receive(connection: socket.socket, type_: Any, descriptors: list[int] | None = None) -> Any:
    data = b""
    if descriptors is not None:
        room = socket.CMSG_SPACE(8 * 4)
        data, ancillary, _, _ = connection.recvmsg(_LENGTH.size, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                passed = array.array("i")
                passed.frombytes(payload[: len(payload) - len(payload) % passed.itemsize])
                descriptors.extend(passed)
    (length,) = _LENGTH.unpack(data + _exactly(connection, _LENGTH.size - len(data)))
    if length > 1 << 16:
        raise OSError(f"a message of {length} bytes at the meeting")
    return msgspec.msgpack.decode(_exactly(connection, length), type=type_)


def _exactly(connection: socket.socket, size: int) -> bytes:
    """The next `size` bytes, all of them within the connection's time-out; OSError."""
    limit_s = connection.gettimeout() or HELLO_TIMEOUT_S
    deadline = time.monotonic() + limit_s
    data = b""
    while len(data) < size:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        more = connection.recv(size - len(data))
        if not more:
            raise OSError("the connection ended at the meeting")
        data += more
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(data)} of {size} bytes came within {limit_s:g} s at the meeting")
    connection.settimeout(limit_s)
    return data
