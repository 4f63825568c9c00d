"""What a worker's prefix cache has, as its shell tells it to routers: KV events as they come, and snapshots.

The shell keeps a copy of its own, so that a router that connects late or missed something never asks the engine. The
copy is bounded by the pool. A router that reads too slowly loses its queue of events and gets a snapshot instead, so
what waits for it is bounded too, and nothing here ever waits for a router.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable

from baton.v1 import worker_pb2 as pb
from engine.api import KvEvents
from engine.prefix import HINT_BYTES

PIECE_BLOCKS = 1 << 14  # of a snapshot in one message: 128 KiB, which tokens of other requests wait behind
QUEUE_BLOCKS = 1 << 16  # of events that wait for one router


class KvFeed:
    """The copy, and who is told of its changes."""

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._block_size = 0
        self._wire_dtype = ""
        self._seq = 0
        # In the order in which they came: the head of a prefix before what is built on it.
        self._hints: dict[int, None] = {}
        self._subscriptions: set[KvSubscription] = set()

    def open(self, block_size: int, wire_dtype: str = "") -> None:
        """The engine is ready, with blocks of so many tokens, named as `engine.prefix.salted` says for `wire_dtype`."""
        self._block_size = block_size
        self._wire_dtype = wire_dtype

    def apply(self, events: KvEvents) -> None:
        """The engine's next batch: the copy follows, and all subscriptions are told."""
        if events.seq != self._seq + 1:
            raise AssertionError(f"batch {events.seq} of KV events after {self._seq}: the ring loses nothing")
        self._seq = events.seq
        if events.cleared:
            self._hints.clear()
        for hint in _hints(events.evicted):
            self._hints.pop(hint, None)  # two names of one hint: gone with the first
        self._hints.update(dict.fromkeys(_hints(events.added)))
        message = pb.KvEvents(
            incarnation=self._incarnation,
            seq=events.seq,
            added=events.added,
            evicted=events.evicted,
            cleared=events.cleared,
        )
        for subscription in self._subscriptions:
            subscription.offer(message)

    def snapshot(self) -> deque[pb.KvSnapshot]:
        """All that the cache has now, in pieces; at least one."""
        packed = struct.pack(f"<{len(self._hints)}Q", *self._hints)
        width = PIECE_BLOCKS * HINT_BYTES
        pieces = [packed[at : at + width] for at in range(0, len(packed), width)] or [b""]
        return deque(
            pb.KvSnapshot(
                incarnation=self._incarnation,
                seq=self._seq,
                block_size=self._block_size,
                wire_dtype=self._wire_dtype,
                piece=number,
                pieces=len(pieces),
                hashes=hashes,
            )
            for number, hashes in enumerate(pieces)
        )

    def subscribe(self, wake: Callable[[], None]) -> KvSubscription:
        """For one session, until `KvSubscription.close`; `wake` is called when it has something to say."""
        subscription = KvSubscription(self, wake)
        self._subscriptions.add(subscription)
        return subscription

    def drop(self, subscription: KvSubscription) -> None:
        self._subscriptions.discard(subscription)


class KvSubscription:
    """What one router is still to be told: a snapshot first, then events."""

    def __init__(self, feed: KvFeed, wake: Callable[[], None]) -> None:
        self._feed = feed
        self._wake = wake
        self._due = True  # a snapshot, taken when the router can take it
        self._pieces: deque[pb.KvSnapshot] = deque()
        self._events: list[pb.KvEvents] = []
        self._queued = 0  # blocks named in `_events`

    @property
    def pending(self) -> bool:
        return self._due or bool(self._pieces) or bool(self._events)

    def restart(self) -> None:
        """Begins anew, with a snapshot."""
        self._due = True
        self._pieces.clear()
        self._events.clear()
        self._queued = 0
        self._wake()

    def offer(self, message: pb.KvEvents) -> None:
        """One more batch for this router."""
        if self._due:
            return  # the snapshot will have it
        self._queued += (len(message.added) + len(message.evicted)) // HINT_BYTES
        if self._queued > QUEUE_BLOCKS:
            self.restart()
            return
        self._events.append(message)
        self._wake()

    def fill(self, message: pb.FromWorker) -> None:
        """Puts what comes next into a message to the router: a piece of a snapshot, or all events."""
        if self._due:
            self._due = False
            self._pieces = self._feed.snapshot()
        if self._pieces:
            message.kv_snapshot.CopyFrom(self._pieces.popleft())
        else:
            message.kv_events.extend(self._events)
            self._events.clear()
            self._queued = 0

    def close(self) -> None:
        self._feed.drop(self)


def _hints(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // HINT_BYTES}Q", packed)
