"""The control streams between decode and prefill nodes, and who can reach whom.

A stream is ordered and belongs to one pair of incarnations and one epoch. A break cuts it: what was not delivered is
lost, both sides learn of it at times of their own, and the decode side dials again under the next epoch, which the
prefill side may hear before it has noticed the break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from kvtransfer.messages import ChunkDone, ControlMessage
from simulation.node import Node
from simulation.world import World
from worker.messages import FromPeer, PeerLost, PeerUp

DELAY_S = (0.0002, 0.004)
LEARN_S = (0.0, 0.15)
BACKOFF_S = (0.02, 0.2)


@dataclass(eq=False, slots=True)
class Stream:
    """One control stream. `open_at` holds the ends that believe in it; `cut`: nothing more gets through."""

    decode: Node
    prefill: Node
    epoch: int
    cut: bool = False
    open_at: set[Node] = field(default_factory=set)
    last: dict[str, float] = field(default_factory=dict)  # by receiver: order of delivery

    def other(self, node: Node) -> Node:
        return self.prefill if node is self.decode else self.decode


class Network:
    """Keeps a stream between each living decode node and each living prefill node."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lost_done = 0.0  # probability that a ChunkDone is lost though its stream lives
        self._streams: dict[tuple[str, str], Stream] = {}  # by incarnations: decode, prefill
        self._epochs: dict[tuple[str, str], int] = {}
        self._parted: set[tuple[str, str]] = set()  # by incarnations: decode, prefill

    def reachable(self, one: Node, other: Node) -> bool:
        parted = self._parted
        return (one.incarnation, other.incarnation) not in parted and (
            other.incarnation,
            one.incarnation,
        ) not in parted

    def streams(self) -> list[Stream]:
        return [stream for stream in self._streams.values() if not stream.cut]

    # ---- life of a stream ----------------------------------------------------------------------------------------

    def dial(self, decode: Node, prefill: Node) -> None:
        """The decode node's shell dials; it tries again until one of the two is dead."""
        if not decode.alive or not prefill.alive:
            return
        pair = (decode.incarnation, prefill.incarnation)
        epoch = self._epochs[pair] = self._epochs.get(pair, 0) + 1
        if not self.reachable(decode, prefill):
            self._redial(decode, prefill)
            return
        stream = self._streams[pair] = Stream(decode, prefill, epoch)
        self._in_order(stream, prefill, lambda: self._up(stream, prefill))

    def _up(self, stream: Stream, end: Node) -> None:
        """The other end's hello has come. The prefill side answers with its own."""
        if stream.cut:
            return  # `cut` has seen to it that the decode side dials again
        peer = stream.other(end)
        end.streams[peer.incarnation] = stream
        stream.open_at.add(end)
        end.receive(PeerUp(msgspec.structs.replace(peer.hello, epoch=stream.epoch)))
        if end is stream.prefill:
            self._in_order(stream, stream.decode, lambda: self._up(stream, stream.decode))

    def _redial(self, decode: Node, prefill: Node) -> None:
        self.world.after(self.world.between(*BACKOFF_S), lambda: self.dial(decode, prefill), decode)

    def cut(self, stream: Stream) -> None:
        """Nothing more gets through; each end that believes in the stream learns of it in its own time."""
        if stream.cut:
            return
        stream.cut = True
        if stream.decode not in stream.open_at:
            self._redial(stream.decode, stream.prefill)
        for end in (stream.decode, stream.prefill):
            if end in stream.open_at:
                self.world.after(self.world.between(*LEARN_S), partial(self._learn, stream, end), end)

    def _learn(self, stream: Stream, end: Node) -> None:
        if end not in stream.open_at:
            return
        stream.open_at.discard(end)
        peer = stream.other(end).incarnation
        if end.streams.get(peer) is stream:
            del end.streams[peer]
        end.receive(PeerLost(peer, stream.epoch))
        if end is stream.decode:
            self._redial(stream.decode, stream.prefill)

    def part(self, decode: Node, prefill: Node, seconds: float) -> None:
        """Neither control messages nor bytes get through for a while."""
        pair = (decode.incarnation, prefill.incarnation)
        self._parted.add(pair)
        self.world.after(seconds, lambda: self._parted.discard(pair))
        for stream in self.streams():
            if stream.decode is decode and stream.prefill is prefill:
                self.cut(stream)

    def died(self, node: Node) -> None:
        for stream in self.streams():
            if node in (stream.decode, stream.prefill):
                self.cut(stream)

    # ---- messages ------------------------------------------------------------------------------------------------

    def send(self, sender: Node, peer: str, epoch: int, message: ControlMessage) -> None:
        """What an engine says for a stream that is not its peer's latest is dropped, as the real shell does."""
        stream = sender.streams.get(peer)
        if stream is None or stream.epoch != epoch or stream.cut:
            return
        if isinstance(message, ChunkDone) and self.world.chance(self.lost_done):
            self.world.facts["chunk_done_lost"] += 1
            return
        to = stream.other(sender)
        event = FromPeer(sender.incarnation, epoch, message)

        def deliver() -> None:
            if to in stream.open_at and not stream.cut:
                to.receive(event)

        self._in_order(stream, to, deliver)

    def _in_order(self, stream: Stream, to: Node, action: Callable[[], None]) -> None:
        earliest = stream.last.get(to.incarnation, 0.0)
        time = stream.last[to.incarnation] = max(earliest, self.world.now + self.world.between(*DELAY_S))
        self.world.at(time, action, to)
