"""The shared-memory ring between a worker's shell and a rank process: msgspec messages as MessagePack, one way each.

A byte ring in a memfd for each direction, and an eventfd that wakes the reader. One process writes (several of its
threads may), one reads. Writing never blocks: what does not fit waits in the writer, up to a bound, and moves on at
the next flush. The eventfd's system calls order the memory accesses of the two sides on every CPU.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections import deque
from typing import Any

import msgspec

CAPACITY = 1 << 22
PENDING_LIMIT = 256 << 20
_HEADER = 64  # head (bytes written) at 0, tail (bytes read) at 8; the data follows
_U64 = struct.Struct("<Q")
_LENGTH = struct.Struct("<I")


class RingFull(RuntimeError):
    """The reader has not read for so long that the writer's bound was reached: it hangs."""


class RingFds(msgspec.Struct, frozen=True):
    """The descriptors of one ring, as a child process inherits them."""

    memory: int
    event: int


def create() -> RingFds:
    """A new empty ring. Whoever creates it closes the descriptors in the end."""
    memory = os.memfd_create("baton-ring", os.MFD_CLOEXEC)
    os.ftruncate(memory, _HEADER + CAPACITY)
    return RingFds(memory, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))


class RingWriter:
    """The writing end. Thread-safe."""

    def __init__(self, fds: RingFds) -> None:
        self._fds = fds
        self._map = mmap.mmap(fds.memory, _HEADER + CAPACITY)
        self._encoder = msgspec.msgpack.Encoder()
        self._pending: deque[memoryview] = deque()
        self._pending_bytes = 0
        self._head = 0
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Queues a message and writes what fits. Raises RingFull when the reader hangs."""
        data = self._encoder.encode(message)
        with self._lock:
            self._pending.append(memoryview(_LENGTH.pack(len(data)) + data))
            self._pending_bytes += len(data) + _LENGTH.size
            if self._pending_bytes > PENDING_LIMIT:
                raise RingFull(f"{self._pending_bytes} bytes wait for a reader that does not read")
            self._flush()

    def flush(self) -> bool:
        """Writes what fits now; True when nothing is left waiting."""
        with self._lock:
            self._flush()
            return not self._pending

    def _flush(self) -> None:
        moved = False
        while self._pending:
            (tail,) = _U64.unpack_from(self._map, 8)
            room = CAPACITY - (self._head - tail)
            if not room:
                break
            data = self._pending.popleft()
            part = data[:room]
            self._write(part)
            moved = True
            self._pending_bytes -= len(part)
            if len(part) < len(data):
                self._pending.appendleft(data[len(part) :])
        if moved:
            _U64.pack_into(self._map, 0, self._head)
            os.eventfd_write(self._fds.event, 1)

    def _write(self, data: memoryview) -> None:
        at = self._head % CAPACITY
        first = min(len(data), CAPACITY - at)
        self._map[_HEADER + at : _HEADER + at + first] = data[:first]
        if first < len(data):
            self._map[_HEADER : _HEADER + len(data) - first] = data[first:]
        self._head += len(data)


class RingReader:
    """The reading end; decodes messages of one type (a union of tagged structs)."""

    def __init__(self, fds: RingFds, type_: Any) -> None:
        self._fds = fds
        self._map = mmap.mmap(fds.memory, _HEADER + CAPACITY)
        self._decoder = msgspec.msgpack.Decoder(type_)
        self._buffer = bytearray()
        self._tail = 0

    def fileno(self) -> int:
        """Readable when there may be messages."""
        return self._fds.event

    def read(self) -> list[Any]:
        """All whole messages that have arrived; never blocks."""
        try:
            os.eventfd_read(self._fds.event)
        except BlockingIOError:
            return []
        (head,) = _U64.unpack_from(self._map, 0)
        while self._tail < head:
            at = self._tail % CAPACITY
            count = min(head - self._tail, CAPACITY - at)
            self._buffer += self._map[_HEADER + at : _HEADER + at + count]
            self._tail += count
        _U64.pack_into(self._map, 8, self._tail)
        messages = []
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if len(self._buffer) - at - _LENGTH.size < length:
                break
            at += _LENGTH.size
            messages.append(self._decoder.decode(memoryview(self._buffer)[at : at + length]))
            at += length
        del self._buffer[:at]
        return messages
