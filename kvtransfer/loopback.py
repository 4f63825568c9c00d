"""Transport between endpoints of one process, with seeded faults: for tests and the simulator. Numpy only.

Time is virtual: a fabric's clock moves one tick with each `poll` of any of its endpoints, or by `advance`. It keeps the
unpleasant habits of real transports: bytes are read from staging when they travel, not when the write is posted; they
land in pieces and in any order, some after the write has failed or its sender has died; a hung peer never fails.
"""

from __future__ import annotations

import heapq
import random
import threading
from dataclasses import dataclass, field

import msgspec
import numpy as np

from kvtransfer.rows import checked
from kvtransfer.transport import Region, Rows, Settled, TransportError


@dataclass(frozen=True, kw_only=True)
class LoopbackFaults:
    """Probabilities are per write, delays in ticks (least, most).

    lose: some of its bytes never land and it settles only when its peer is dead. fail: settles with an error, though
    bytes may land before or after that. duplicate: its bytes land once more, later. corrupt: one bit is flipped.
    """

    delay: tuple[int, int] = (0, 0)
    late: tuple[int, int] = (1, 20)
    reorder: bool = False
    lose: float = 0.0
    fail: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0


@dataclass(slots=True)
class _Write:
    ticket: int
    source: LoopbackTransport
    target: LoopbackTransport
    rows: Rows
    left: int  # pieces that have not landed
    sent: list[Region | None]  # what each piece carried, once it has travelled
    flip: tuple[int, int, int] | None = None  # piece, byte, bit
    fail_after: int | None = None  # pieces
    settled: bool = False


@dataclass(order=True, slots=True)
class _Landing:
    """Piece `row` of a write arrives at tick `due`."""

    due: int
    order: int
    write: _Write = field(compare=False)
    row: int = field(compare=False)
    again: bool = field(compare=False, default=False)


class LoopbackFabric:
    """The medium that its endpoints share. All its methods, and all verbs of its endpoints, may be called from any
    thread; runs are the same for the same seed only when one thread makes all calls."""

    def __init__(self, seed: int = 0, faults: LoopbackFaults | None = None) -> None:
        self.faults = faults or LoopbackFaults()
        self.now = 0
        self.lock = threading.RLock()
        self._random = random.Random(seed)
        self._endpoints: dict[str, LoopbackTransport] = {}
        self._dead: set[str] = set()
        self._hung: set[str] = set()
        self._landings: list[_Landing] = []
        self._held_up: list[_Landing] = []
        self._writes: list[_Write] = []
        self._orders = 0

    def open(self, incarnation: str, *, staging_bytes: int, landing_bytes: int) -> LoopbackTransport:
        """A new endpoint; ValueError when there was one of this name."""
        with self.lock:
            if incarnation in self._endpoints:
                raise ValueError(f"there is an endpoint {incarnation!r} already")
            endpoint = LoopbackTransport(
                self, incarnation, np.zeros(staging_bytes, np.uint8), np.zeros(landing_bytes, np.uint8)
            )
            self._endpoints[incarnation] = endpoint
            return endpoint

    def kill(self, incarnation: str) -> None:
        """Its process ends now. What it had sent may still land; writes to it settle with an error."""
        with self.lock:
            self._dead.add(incarnation)
            self._hung.discard(incarnation)
            for write in self._writes:
                if write.target.incarnation == incarnation:
                    self._settle(write, f"{incarnation} is gone")
                elif write.source.incarnation == incarnation:
                    self._leave_in_the_air(write)
            self._requeue()

    def hang(self, incarnation: str) -> None:
        """It stops: nothing from it or to it moves, and it is not gone."""
        with self.lock:
            self._hung.add(incarnation)

    def resume(self, incarnation: str) -> None:
        with self.lock:
            self._hung.discard(incarnation)
            self._requeue()

    def advance(self, ticks: int = 1) -> None:
        """Lets time pass: what is due lands, in order of its time."""
        with self.lock:
            self.now += ticks
            while self._landings and self._landings[0].due <= self.now:
                landing = heapq.heappop(self._landings)
                if {landing.write.source.incarnation, landing.write.target.incarnation} & self._hung:
                    self._held_up.append(landing)
                else:
                    self._land(landing)

    # ---- for endpoints, which hold the lock ----------------------------------------------------------------------

    def reachable(self, incarnation: str) -> LoopbackTransport | None:
        return None if incarnation in self._dead else self._endpoints.get(incarnation)

    def gone(self, incarnation: str, receiver: LoopbackTransport) -> bool:
        coming = any(
            landing.write.source.incarnation == incarnation and landing.write.target is receiver
            for landing in [*self._landings, *self._held_up]
        )
        return incarnation in self._dead and not coming

    def post(self, write: _Write) -> None:
        rng, faults, pieces = self._random, self.faults, len(write.rows)
        lost = rng.random() < faults.lose
        if rng.random() < faults.fail:
            write.fail_after = rng.randrange(pieces)
        if rng.random() < faults.corrupt:
            row = rng.randrange(pieces)
            write.flip = (row, rng.randrange(int(write.rows[row, 2])), rng.randrange(8))
        again = rng.random() < faults.duplicate
        missing = set(rng.sample(range(pieces), rng.randint(1, pieces))) if lost else set()
        due = self.now + rng.randint(*faults.delay)
        for row in range(pieces):
            at = self.now + rng.randint(*faults.delay) if faults.reorder else due
            if row not in missing:
                self._schedule(write, row, at)
            if again and row not in missing:
                self._schedule(write, row, at + max(1, rng.randint(*faults.late)), again=True)
        self._writes.append(write)
        self.advance(0)

    def _schedule(self, write: _Write, row: int, due: int, again: bool = False) -> None:
        self._orders += 1
        heapq.heappush(self._landings, _Landing(due, self._orders, write, row, again))

    def _land(self, landing: _Landing) -> None:
        write, row = landing.write, landing.row
        if write.target.incarnation in self._dead:
            return
        source, at, length = (int(value) for value in write.rows[row])
        data = write.sent[row]
        if data is None:
            if write.source.incarnation in self._dead:
                return  # it died before it had read these
            data = write.source.staging[source : source + length].copy()
            if write.flip is not None and write.flip[0] == row:
                data[write.flip[1]] ^= 1 << write.flip[2]
            write.sent[row] = data
        if write.fail_after == write.left - 1 and not write.settled:
            write.fail_after = None
            self._settle(write, "the transfer failed")
            # The error is out, these bytes are not in yet.
            return self._schedule(write, row, self.now + max(1, self._random.randint(*self.faults.late)))
        write.target.landing[at : at + length] = data
        if not landing.again:
            write.left -= 1
            if not write.left:
                self._settle(write, "")

    def _settle(self, write: _Write, error: str) -> None:
        if not write.settled:
            write.settled = True
            write.source.settled.append(Settled(write.ticket, error))
            # Whatever lands from now on was sent before: staging may be reused.
            for row, (source, _, length) in enumerate(write.rows.tolist()):
                if write.sent[row] is None:
                    write.sent[row] = write.source.staging[source : source + length].copy()
        self._writes = [other for other in self._writes if not other.settled]

    def _leave_in_the_air(self, write: _Write) -> None:
        """The sender dies: about half of what had not landed was on its way already and lands yet."""
        for row, (source, _, length) in enumerate(write.rows.tolist()):
            if write.sent[row] is None and self._random.random() < 0.5:
                write.sent[row] = write.source.staging[source : source + length].copy()

    def _requeue(self) -> None:
        for landing in self._held_up:
            heapq.heappush(self._landings, landing)
        self._held_up = []
        self.advance(0)


class LoopbackTransport:
    """See `kvtransfer.transport.Transport`; made by `LoopbackFabric.open`."""

    name = "loopback"
    devices = "none"
    warning = ""

    def __init__(self, fabric: LoopbackFabric, incarnation: str, staging: Region, landing: Region) -> None:
        self.incarnation = incarnation
        self.staging = staging
        self.landing = landing
        self.settled: list[Settled] = []
        self._fabric = fabric
        self._peers: dict[str, LoopbackTransport] = {}
        self._next_ticket = 1

    def describe(self) -> bytes:
        return msgspec.msgpack.encode({"loopback": self.incarnation})

    def connect(self, peer: str, description: bytes) -> None:
        try:
            incarnation = msgspec.msgpack.decode(description, type=dict[str, str])["loopback"]
        except (msgspec.DecodeError, KeyError) as error:
            raise TransportError(f"{peer}: no description of a loopback endpoint: {error}") from error
        with self._fabric.lock:
            endpoint = self._fabric.reachable(incarnation)
        if endpoint is None or endpoint is self:
            raise TransportError(f"{peer} cannot be reached: no other live endpoint {incarnation!r} here")
        self._peers[peer] = endpoint

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def write(self, peer: str, rows: Rows) -> int:
        target = self._peers.get(peer)
        if target is None:
            raise TransportError(f"{peer} is not connected")
        checked(rows, self.staging.nbytes, target.landing.nbytes)
        with self._fabric.lock:
            if self._fabric.reachable(target.incarnation) is None:
                raise TransportError(f"cannot write to {peer}: it is gone")
            ticket = self._next_ticket
            self._next_ticket += 1
            self._fabric.post(_Write(ticket, self, target, rows.copy(), len(rows), [None] * len(rows)))
        return ticket

    def poll(self) -> list[Settled]:
        with self._fabric.lock:
            self._fabric.advance()
            settled, self.settled = self.settled, []
        return settled

    def gone(self, peer: str) -> bool:
        known = self._peers.get(peer)
        with self._fabric.lock:
            return known is not None and self._fabric.gone(known.incarnation, self)

    def close(self) -> None:
        self._peers.clear()
