"""The simulated movers: the jobs of one rank, done late, in pieces, or not at all, as a real fabric may.

A chunk is gathered when its turn comes, not when it was asked for, so a source block that was released too early is
caught; each write lands in two parts at times of their own, also after the lease was aborted or the writer has died.
The ranks of a node know nothing of one another: one is late, one's write fails, one is sent wrong bytes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvtransfer.digest import copy_and_digest, digest, piece_seed
from kvtransfer.messages import (
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
from kvtransfer.plan import Plan, plan
from simulation.model import KV_BYTES, Kv
from simulation.node import Node
from simulation.world import World

JOB_S = (0.0001, 0.003)
LAND_S = (0.0002, 0.006)
LATE_S = (0.2, 2.5)
SETTLE_S = (0.0, 0.004)

Part = list[tuple[int, Kv]]  # where in the slot, in words, and what


@dataclass(slots=True)
class Weather:
    """How bad the fabric is, as probabilities for each write; `late` is one for each copy, too."""

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
        self.landing: Counter[tuple[str, str, int]] = (
            Counter()
        )  # writer, receiver, its rank -> parts under way

    def gone(self, peer: str, receiver: str, rank: int) -> bool:
        return not self.nodes[peer].alive and not self.landing[peer, receiver, rank]


@dataclass(slots=True)
class _Sending:
    """A rank's part of one chunk: its pieces, and the writes that have not settled."""

    job: SendChunk
    pieces: list[int]
    digests: list[bytes]
    size_bytes: int
    open: int
    errors: list[str]


class SimulatedMover:
    """Does the jobs of one rank of `node` one after the other; writes then go their own ways."""

    verify = True  # tests switch it off to see that the other checks notice

    def __init__(self, world: World, fabric: Fabric, node: Node, rank: int) -> None:
        self.world = world
        self.fabric = fabric
        self.node = node
        self.rank = rank
        self._free_at = 0.0
        self._plans: dict[str, Plan] = {}  # by peer
        self._connected: set[str] = set()

    def submit(self, job: MoverJob) -> None:
        self._free_at = max(self._free_at, self.world.now) + self.world.between(*JOB_S)
        if self.rank and isinstance(job, CopyOut) and self.world.chance(self.fabric.weather.late):
            self._free_at += self.world.between(*LATE_S)
            self.world.facts["late_ranks"] += 1
        self.world.at(self._free_at, lambda: self._do(job), self.node)

    def _do(self, job: MoverJob) -> None:
        put = partial(self.node.join.put, self.rank)
        if isinstance(job, SendChunk):
            self._send(job)
        elif isinstance(job, CopyOut):
            put(Copied(job.handoff_id, job.lease_id, self._copy_out(job)))
        elif isinstance(job, Connect):
            hello = job.hello
            peer = self.fabric.nodes[hello.incarnation]
            mine, theirs = self.node.hello.kv, hello.kv
            self._plans[hello.incarnation] = (
                plan(theirs, mine) if self.node.spec.decode else plan(mine, theirs)
            )
            if peer.alive and self.fabric.reachable(self.node, peer):
                self._connected.add(hello.incarnation)
                put(Connected(hello.incarnation))
            else:
                put(Connected(hello.incarnation, "unreachable"))
        elif isinstance(job, Disconnect):
            self._connected.discard(job.peer)
        elif isinstance(job, Probe):
            put(Probed(job.peer, self.fabric.gone(job.peer, self.node.incarnation, self.rank)))

    # ---- sending -------------------------------------------------------------------------------------------------

    def _send(self, job: SendChunk) -> None:
        """One write for each rank of the peer that takes something from this one; none at all is settled at once."""
        if job.peer not in self._connected:
            self._report(_Sending(job, [], [], 0, 0, ["not connected"]))
            return
        pieces = self._plans[job.peer].pieces(job.lease.chunk, job.tokens)
        mine = np.flatnonzero(pieces.source == self.rank)
        writes: defaultdict[int, Part] = defaultdict(list)
        digests = []
        for index in mine.tolist():
            heads = range(pieces.head[index], pieces.head[index] + pieces.heads[index])
            first, tokens = job.first_token + int(pieces.first[index]), int(pieces.tokens[index])
            payload = self.node.model.gather(job.blocks, job.blocks_start, first, tokens, self.rank, heads)
            seed = piece_seed(job.seed, first, tokens, range(1), heads)
            digests.append(digest(payload.reshape(-1).view(np.uint8), seed))
            writes[int(pieces.target[index])].append(
                (int(pieces.offset[index]) // KV_BYTES, payload.reshape(-1))
            )
        size = int(pieces.size_bytes[mine].sum())
        sending = _Sending(job, mine.tolist(), digests, size, len(writes), [])
        if not writes:
            self._report(sending)
        for target, part in writes.items():
            self._write(sending, target, part)

    def _write(self, sending: _Sending, target: int, part: Part) -> None:
        """Posts one write, which lands in two parts, and settles, each in its own time."""
        world, weather, job = self.world, self.fabric.weather, sending.job
        receiver = self.fabric.nodes[job.peer]
        if not receiver.alive:
            self._settle_after(world.between(0.01, 0.2), sending, "the peer is gone")
            return
        late = world.chance(weather.late) or not self.fabric.reachable(self.node, receiver)
        span = LATE_S if late else LAND_S
        world.facts["late_writes"] += late
        if world.chance(weather.corrupt):
            _, words = world.random.choice(part)
            words[world.random.randrange(len(words))] ^= 1 << world.random.randrange(60)
            world.facts["corrupted"] += 1
        landed = 0.0
        for half in _cut(part, world.random.randrange(sum(len(words) for _, words in part) + 1)):
            delay = world.between(*span)
            landed = max(landed, delay)
            self.fabric.landing[self.node.incarnation, job.peer, target] += 1
            world.after(delay, partial(self._land, job, receiver, target, half))
        error = "" if not world.chance(weather.fails) else "the fabric lost it"
        self._settle_after(landed + world.between(*SETTLE_S), sending, error)

    def _land(self, job: SendChunk, receiver: Node, target: int, part: Part) -> None:
        """Not an event of the writer: it may be dead by now. Nor of the receiver: it need not be running."""
        self.fabric.landing[self.node.incarnation, job.peer, target] -= 1
        if receiver.alive:
            receiver.watch.landed(receiver, job.lease)
            for offset, words in part:
                receiver.landing[target][job.lease.slot, offset : offset + len(words)] = words

    def _settle_after(self, delay: float, sending: _Sending, error: str) -> None:
        self.world.after(delay, lambda: self._settled(sending, error), self.node)

    def _settled(self, sending: _Sending, error: str) -> None:
        sending.open -= 1
        if error:
            sending.errors.append(error)
        if not sending.open:
            self._report(sending)

    def _report(self, sending: _Sending) -> None:
        job, lease = sending.job, sending.job.lease
        self.node.join.put(
            self.rank,
            Sent(
                job.peer,
                job.handoff_id,
                lease.lease_id,
                lease.chunk,
                0 if sending.errors else sending.size_bytes,
                "; ".join(sending.errors),
                lease.epoch,
                sending.pieces,
                sending.digests,
            ),
        )

    # ---- receiving -----------------------------------------------------------------------------------------------

    def _copy_out(self, job: CopyOut) -> bool:
        """Copies this rank's pieces, and takes them over when all are what they should be."""
        pieces = self._plans[job.peer].pieces(job.chunk, job.tokens)
        slot = self.node.landing[self.rank][job.slot]
        copies: list[tuple[int, int, Kv]] = []
        for index in np.flatnonzero(pieces.target == self.rank).tolist():
            first, tokens = job.first_token + int(pieces.first[index]), int(pieces.tokens[index])
            head, heads = int(pieces.head[index]), int(pieces.heads[index])
            copy = np.empty(heads * tokens, dtype=np.int64)
            offset = int(pieces.offset[index]) // KV_BYTES
            source = slot[offset : offset + len(copy)]
            seed = piece_seed(job.seed, first, tokens, range(1), range(head, head + heads))
            found = copy_and_digest(source.view(np.uint8), copy.view(np.uint8), seed)
            if self.verify and found != job.digests[index]:
                self.world.facts["refused_by_a_rank"] += 1
                return False
            copies.append((first, head, copy.reshape(heads, tokens)))
        for first, head, copy in copies:
            self.node.model.scatter(job.blocks, job.blocks_start, first, copy, self.rank, head)
        self.world.facts["verified_by_a_rank"] += 1
        return True


def _cut(part: Part, at: int) -> tuple[Part, Part]:
    """What lies before and behind the word `at` of all that is written."""
    before: Part = []
    behind: Part = []
    for offset, words in part:
        here = min(max(at, 0), len(words))
        before.append((offset, words[:here]))
        behind.append((offset + here, words[here:]))
        at -= len(words)
    return before, behind
