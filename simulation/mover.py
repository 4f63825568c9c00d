"""The simulated mover: the jobs of one node's role, done late, in pieces, or not at all, as a real fabric may.

A chunk is gathered when its turn comes, not when it was asked for, so a source block that was released too early is
caught; its bytes land in two pieces at times of their own, also after the lease was aborted or the writer has died.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvtransfer.digest import copy_and_digest, digest
from kvtransfer.messages import (
    ChunkDone,
    Connect,
    Connected,
    Copied,
    CopyOut,
    Disconnect,
    MoverJob,
    Probe,
    Probed,
    SendChunk,
    Sent,
)
from simulation.model import KV_BYTES, Kv
from simulation.node import Node
from simulation.world import World

JOB_S = (0.0001, 0.003)
LAND_S = (0.0002, 0.006)
LATE_S = (0.2, 2.5)
SETTLE_S = (0.0, 0.004)


@dataclass(slots=True)
class Weather:
    """How bad the fabric is, as probabilities for each write."""

    late: float = 0.0
    corrupt: float = 0.0
    fails: float = 0.0


class Fabric:
    """Which incarnations there are or were, and which bytes are under way between them."""

    def __init__(self, world: World, reachable: Callable[[Node, Node], bool]) -> None:
        self.world = world
        self.weather = Weather()
        self.nodes: dict[str, Node] = {}  # every incarnation that ever was
        self.reachable = reachable
        self.landing: Counter[tuple[str, str]] = Counter()  # (writer, receiver) -> pieces under way

    def gone(self, peer: str, receiver: str) -> bool:
        return not self.nodes[peer].alive and not self.landing[peer, receiver]


class SimulatedMover:
    """Does the jobs of `node` one after the other; writes then go their own ways."""

    verify = True  # tests switch it off to see that the other checks notice

    def __init__(self, world: World, fabric: Fabric, node: Node) -> None:
        self.world = world
        self.fabric = fabric
        self.node = node
        self._free_at = 0.0
        self._connected: set[str] = set()

    def submit(self, job: MoverJob) -> None:
        self._free_at = max(self._free_at, self.world.now) + self.world.between(*JOB_S)
        self.world.at(self._free_at, lambda: self._do(job), self.node)

    def _do(self, job: MoverJob) -> None:
        if isinstance(job, SendChunk):
            self._send(job)
        elif isinstance(job, CopyOut):
            self.node.report(Copied(job.handoff_id, job.lease_id, self._copy_out(job)))
        elif isinstance(job, Connect):
            peer = self.fabric.nodes[job.peer]
            if peer.alive and self.fabric.reachable(self.node, peer):
                self._connected.add(job.peer)
                self.node.report(Connected(job.peer))
            else:
                self.node.report(Connected(job.peer, "unreachable"))
        elif isinstance(job, Disconnect):
            self._connected.discard(job.peer)
        elif isinstance(job, Probe):
            self.node.report(Probed(job.peer, self.fabric.gone(job.peer, self.node.incarnation)))

    # ---- sending -------------------------------------------------------------------------------------------------

    def _send(self, job: SendChunk) -> None:
        world, weather = self.world, self.fabric.weather
        if job.peer not in self._connected:
            self._settled(job, b"", "not connected")
            return
        payload = self.node.model.gather(job.blocks, job.blocks_start, job.first_token, job.tokens)
        checksum = digest(payload.view(np.uint8), job.seed)
        receiver = self.fabric.nodes[job.peer]
        if not receiver.alive:
            self._settle_after(world.between(0.01, 0.2), job, b"", "the peer is gone")
            return
        late = world.chance(weather.late) or not self.fabric.reachable(self.node, receiver)
        span = LATE_S if late else LAND_S
        world.facts["late_writes"] += late
        if world.chance(weather.corrupt):
            payload = payload.copy()
            payload[world.random.randrange(len(payload))] ^= 1 << world.random.randrange(60)
            world.facts["corrupted"] += 1
        cut = world.random.randrange(len(payload) + 1)
        pieces = [(0, payload[:cut]), (cut, payload[cut:])]
        landed = 0.0
        for offset, piece in pieces:
            delay = world.between(*span)
            landed = max(landed, delay)
            self.fabric.landing[self.node.incarnation, job.peer] += 1
            world.after(delay, partial(self._land, job, receiver, offset, piece))
        error = "" if not world.chance(weather.fails) else "the fabric lost it"
        self._settle_after(landed + world.between(*SETTLE_S), job, checksum, error)

    def _land(self, job: SendChunk, receiver: Node, offset: int, piece: Kv) -> None:
        """Not an event of the writer: it may be dead by now. Nor of the receiver: it need not be running."""
        self.fabric.landing[self.node.incarnation, job.peer] -= 1
        if receiver.alive:
            receiver.watch.landed(receiver, job.lease)
            receiver.landing[job.lease.slot, offset : offset + len(piece)] = piece

    def _settle_after(self, delay: float, job: SendChunk, checksum: bytes, error: str) -> None:
        self.world.after(delay, lambda: self._settled(job, checksum, error), self.node)

    def _settled(self, job: SendChunk, checksum: bytes, error: str) -> None:
        lease, size = job.lease, job.tokens * KV_BYTES
        if not error:
            done = ChunkDone(job.handoff_id, lease.lease_id, lease.epoch, lease.chunk, size, checksum)
            self.node.send(job.peer, lease.epoch, done)
        self.node.report(Sent(job.peer, job.handoff_id, lease.lease_id, lease.chunk, size, error))

    # ---- receiving -----------------------------------------------------------------------------------------------

    def _copy_out(self, job: CopyOut) -> bool:
        copy = np.empty(job.tokens, dtype=np.int64)
        source = self.node.landing[job.slot, : job.tokens]
        found = copy_and_digest(source.view(np.uint8), copy.view(np.uint8), job.seed)
        if self.verify and (found != job.digest or job.size_bytes != job.tokens * KV_BYTES):
            return False
        self.node.model.scatter(job.blocks, job.blocks_start, job.first_token, copy)
        return True
