"""Transport between processes of one host: landing memory is a memfd that peers map through /proc/<pid>/fd.

Nothing to install, about twice NIXL's speed there; the default in tests. A write is a plain copy and settles inside
the call, so nothing is ever in flight once the writing process has ended. Peers must run as the same user (the kernel
asks for ptrace permission) and in the same pid namespace.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import msgspec
import numpy as np

from kvtransfer import processes
from kvtransfer.processes import ProcessIdentity
from kvtransfer.rows import checked
from kvtransfer.transport import Region, Rows, Settled, TransportError


class _Description(msgspec.Struct, frozen=True, tag="shm", kw_only=True):
    incarnation: str
    process: ProcessIdentity
    fd: int
    inode: int
    landing_bytes: int


class ShmTransport:
    """See `kvtransfer.transport.Transport`. The landing region is allocated here: it must be shareable."""

    name = "shm"
    devices = "memory"
    warning = ""

    def __init__(self, incarnation: str, staging: Region, landing_bytes: int) -> None:
        """Raises TransportError when the kernel gives no shared memory."""
        self.staging = staging
        self.landing: Region = np.zeros(0, dtype=np.uint8)
        self._fd = -1
        inode = 0
        if landing_bytes:
            try:
                self._fd, self.landing = _allocate(incarnation, landing_bytes)
            except OSError as error:
                raise TransportError(f"no shared memory of {landing_bytes} bytes: {error}") from error
            inode = os.fstat(self._fd).st_ino
        self._about = _Description(
            incarnation=incarnation,
            process=processes.this_process(),
            fd=self._fd,
            inode=inode,
            landing_bytes=landing_bytes,
        )
        self._peers: dict[str, tuple[_Description, Region]] = {}
        self._settled: list[Settled] = []
        self._next_ticket = 1

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(self._about)

    def connect(self, peer: str, description: bytes) -> None:
        try:
            about = msgspec.msgpack.decode(description, type=_Description)
        except msgspec.DecodeError as error:
            raise TransportError(f"{peer}: no description of a shm endpoint: {error}") from error
        if about == self._about:
            raise TransportError(f"{peer}: that is this endpoint itself")
        ended = processes.dead(about.process)
        if ended is None:
            raise TransportError(f"{peer} is on another host or in another container; shm cannot reach it")
        if ended:
            raise TransportError(f"{peer}: its process {about.process.pid} has ended")
        self._peers[peer] = (about, _map(peer, about))

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def write(self, peer: str, rows: Rows) -> int:
        if peer not in self._peers:
            raise TransportError(f"{peer} is not connected")
        about, target = self._peers[peer]
        checked(rows, self.staging.nbytes, target.nbytes)
        # The mapping outlives its owner, so that writing to a dead peer would seem to work.
        error = f"process {about.process.pid} has ended" if processes.dead(about.process) else ""
        if not error:
            for source, landing, length in rows.tolist():
                np.copyto(target[landing : landing + length], self.staging[source : source + length])
        ticket = self._next_ticket
        self._next_ticket += 1
        self._settled.append(Settled(ticket, error))
        return ticket

    def poll(self) -> list[Settled]:
        settled, self._settled = self._settled, []
        return settled

    def gone(self, peer: str) -> bool:
        known = self._peers.get(peer)
        return known is not None and processes.dead(known[0].process) is True

    def close(self) -> None:
        """Ends the endpoint; peers that have mapped its landing memory keep that alive, unseen by this process."""
        self._peers.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _allocate(incarnation: str, size: int) -> tuple[int, Region]:
    fd = os.memfd_create(f"baton-landing-{incarnation}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # A peer that could shrink it could kill this process with SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        region = np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8)
        region[:] = 0
    except OSError:
        os.close(fd)
        raise
    return fd, region


def _map(peer: str, about: _Description) -> Region:
    """The peer's landing memory, mapped here; unmapped when the last reference to it goes."""
    if not about.landing_bytes:
        return np.zeros(0, dtype=np.uint8)
    path = f"/proc/{about.process.pid}/fd/{about.fd}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TransportError(f"{peer}: its landing memory cannot be opened: {error}") from error
    try:
        status = os.fstat(fd)
        if status.st_ino != about.inode or status.st_size < about.landing_bytes:
            raise TransportError(f"{peer}: {path} is not the landing memory that it described")
        return np.frombuffer(mmap.mmap(fd, about.landing_bytes), dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise TransportError(f"{peer}: its landing memory cannot be mapped: {error}") from error
    finally:
        os.close(fd)
