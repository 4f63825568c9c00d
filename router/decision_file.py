"""Decisions in a file, and back: what `router.decision_log` names and `baton replay` reads.

    frame: length (4 bytes, little endian) | MessagePack of Workers, Pairs or Entry; arrays are compressed bytes

Workers and hand-off costs are written when they change and at the begin of each file, entries refer to the latest. A
file that has reached its size becomes NAME.1, in the place of the one before. Writing is done by a thread; when that
cannot keep up, records are dropped and counted, and no request waits.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from router.decisions import Outcome, Record
from router.policy import Ask, Decision
from router.view import COLUMNS, Floats, Pool, View, pool_of

log = logging.getLogger("baton.router")

VERSION = 1
WAITING = 256  # records that wait for the thread, at most
MAX_FRAME = 1 << 28
_LENGTH = struct.Struct("<I")


class Workers(msgspec.Struct, frozen=True, tag=True):
    """The columns and the workers that the arrays of the entries that follow are of."""

    version: int
    columns: tuple[str, ...]
    decode: tuple[str, ...]
    prefill: tuple[str, ...]


class Pairs(msgspec.Struct, frozen=True, tag=True):
    costs: bytes  # float64 [2, decode, prefill]


class PoolArrays(msgspec.Struct, frozen=True):
    usable: bytes  # bool [workers]
    below: bytes  # int32 [workers, bins + 1]
    numbers: bytes  # float64 [columns, workers]


class Entry(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    ask: dict[str, Any]
    cached: tuple[bytes, bytes]  # int64 [decode], [prefill]; empty: nothing is known
    decode: PoolArrays
    prefill: PoolArrays
    view: dict[str, Any]  # what is no array
    now: float
    at: float
    policy: str
    digest: str
    decision: dict[str, Any]
    outcome: Outcome | None = None


Frame = Workers | Pairs | Entry
_ASK = tuple(name for name in Ask.__dataclass_fields__ if not name.endswith("_cached"))
_VIEW = ("version", "local_spread", "remote_spread", "step_spread", "decided", "last_remote")
_DECISION = tuple(Decision.__dataclass_fields__)


class DecisionFileError(ValueError):
    """The file is none, or is damaged; says where."""


class FrameEncoder:
    """Frames of one file, in order."""

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._workers: Workers | None = None
        self._pairs: Floats | None = None

    def frames(self, record: Record) -> bytes:
        """The record, after what it refers to and the file has not."""
        view = record.view
        found: list[Frame] = []
        workers = Workers(VERSION, COLUMNS, view.decode.ids, view.prefill.ids)
        if workers != self._workers:
            self._workers, self._pairs = workers, None
            found.append(workers)
        if self._pairs is not view.pairs:
            self._pairs = view.pairs
            found.append(Pairs(_packed(view.pairs)))
        found.append(_entry(record))
        encoded = [self._encode(frame) for frame in found]
        return b"".join(_LENGTH.pack(len(one)) + one for one in encoded)


def _entry(record: Record) -> Entry:
    ask, view, decision = record.ask, record.view, record.decision
    return Entry(
        ask={name: getattr(ask, name) for name in _ASK},
        cached=(_packed(ask.decode_cached), _packed(ask.prefill_cached)),
        decode=_pool(view.decode),
        prefill=_pool(view.prefill),
        view={name: getattr(view, name) for name in _VIEW},
        now=record.now,
        at=record.at,
        policy=record.policy,
        digest=record.view_digest,
        decision={name: getattr(decision, name) for name in _DECISION},
        outcome=record.outcome,
    )


def _pool(pool: Pool) -> PoolArrays:
    return PoolArrays(_packed(pool.usable), _packed(pool.below.astype(np.int32)), _packed(pool.numbers))


def _packed(array: npt.NDArray[Any]) -> bytes:
    return zlib.compress(array.tobytes(), 1)


def read(path: Path) -> Iterator[Record]:
    """The records of a file, oldest first. Raises DecisionFileError; an unfinished last frame is the end."""
    decoder = msgspec.msgpack.Decoder(Frame)
    workers: Workers | None = None
    pairs: Floats | None = None
    with path.open("rb") as file:
        while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(head)
            where = f"{path}, byte {file.tell() - len(head)}"
            if length > MAX_FRAME:
                raise DecisionFileError(f"{where}: no decision log, or damaged (a frame of {length} bytes)")
            body = file.read(length)
            if len(body) < length:
                return
            try:
                frame = decoder.decode(body)
                if isinstance(frame, Workers):
                    workers, pairs = frame, None
                    if frame.columns != COLUMNS or frame.version != VERSION:
                        raise DecisionFileError(f"{where}: written by another release of Baton")
                elif workers is None:
                    raise DecisionFileError(f"{where}: the names of the workers are missing before it")
                elif isinstance(frame, Pairs):
                    shape = (2, len(workers.decode), len(workers.prefill))
                    pairs = _unpacked(frame.costs, np.float64).reshape(shape)
                elif pairs is None:
                    raise DecisionFileError(f"{where}: the costs of hand-offs are missing before it")
                else:
                    yield _record(frame, workers, pairs)
            except (msgspec.DecodeError, zlib.error) as error:
                raise DecisionFileError(f"{where}: no decision log, or damaged ({error})") from None


def _record(entry: Entry, workers: Workers, pairs: Floats) -> Record:
    decode_cached, prefill_cached = (_unpacked(one, np.int64) for one in entry.cached)
    view: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.view.items()
    }
    return Record(
        Ask(**entry.ask, decode_cached=decode_cached, prefill_cached=prefill_cached),
        View(
            decode=_unpacked_pool(entry.decode, workers.decode),
            prefill=_unpacked_pool(entry.prefill, workers.prefill),
            pairs=pairs,
            **view,
        ),
        entry.now,
        entry.at,
        entry.policy,
        Decision(**entry.decision),
        entry.outcome,
    )


def _unpacked_pool(arrays: PoolArrays, ids: tuple[str, ...]) -> Pool:
    count = len(ids)
    below = _unpacked(arrays.below, np.int32).astype(np.float64)
    return pool_of(
        ids,
        _unpacked(arrays.usable, np.bool_),
        below.reshape(count, -1) if count else below.reshape(0, 1),
        _unpacked(arrays.numbers, np.float64).reshape(len(COLUMNS), count),
    )


def _unpacked(packed: bytes, kind: Any) -> Any:
    return np.frombuffer(zlib.decompress(packed), dtype=kind)


class DecisionFile:
    """The file that is written, and its thread. `dropped` counts what the thread could not keep up with."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Raises OSError where the file cannot be opened."""
        self.path = path
        self.dropped = 0
        self._max_bytes = max_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._fresh()
        self._encoder = FrameEncoder()
        self._waiting: queue.Queue[Record | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="decision log", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Never waits."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes what waits, for at most so long."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _fresh(self) -> BinaryIO:
        """A new file; the one that was there becomes NAME.1."""
        if self.path.exists() and self.path.stat().st_size:
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        return self.path.open("wb")

    def _run(self) -> None:
        try:
            while (record := self._waiting.get()) is not None:
                self._file.write(self._encoder.frames(record))
                self._file.flush()
                if self._file.tell() >= self._max_bytes:
                    self._file.close()
                    self._file = self._fresh()
                    self._encoder = FrameEncoder()
        except OSError as error:
            log.error("the decision log %s cannot be written any more: %s", self.path, error)
        finally:
            self._file.close()
