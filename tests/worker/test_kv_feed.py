"""The shell's copy of the prefix cache: whoever listens has what the engine has, however late or slow they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import worker.kv_feed
from baton.v1 import worker_pb2 as pb
from engine.journal import CacheJournal
from engine.prefix import HINT_BYTES
from worker.kv_feed import KvFeed, KvSubscription

NAMES = [bytes([number]) * 16 for number in range(12)]


class Listener:
    """A router: follows one subscription and keeps what it was told."""

    def __init__(self, feed: KvFeed) -> None:
        self.woken = False
        self.subscription: KvSubscription = feed.subscribe(self.wake)
        self.has: set[bytes] = set()
        self.seq = -1
        self.pieces: list[int] = []
        self.snapshots = 0

    def wake(self) -> None:
        self.woken = True

    def read(self) -> None:
        """One message."""
        message = pb.FromWorker()
        self.subscription.fill(message)
        if message.HasField("kv_snapshot"):
            assert not message.kv_events
            piece = message.kv_snapshot
            assert (piece.incarnation, piece.block_size, piece.wire_dtype) == ("life", 16, "int8")
            if piece.piece == 0:
                self.has.clear()
                self.pieces = []
            self.pieces.append(piece.piece)
            assert self.pieces == list(range(piece.piece + 1)) and piece.piece < piece.pieces
            self.has |= split(piece.hashes)
            self.seq = piece.seq
            self.snapshots += piece.piece + 1 == piece.pieces
        for events in message.kv_events:
            assert events.seq == self.seq + 1, "a batch was lost or doubled"
            self.seq = events.seq
            if events.cleared:
                self.has.clear()
            self.has -= split(events.evicted)
            self.has |= split(events.added)


def split(packed: bytes) -> set[bytes]:
    return {packed[at : at + HINT_BYTES] for at in range(0, len(packed), HINT_BYTES)}


class FeedMachine(RuleBasedStateMachine):
    """Small pieces and queues, so that snapshots have several pieces and slow listeners overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = worker.kv_feed.PIECE_BLOCKS, worker.kv_feed.QUEUE_BLOCKS
        worker.kv_feed.PIECE_BLOCKS, worker.kv_feed.QUEUE_BLOCKS = 3, 5
        self.journal = CacheJournal()
        self.cached: set[bytes] = set()
        self.told: set[bytes] = set()
        self.feed = KvFeed("life")
        self.feed.open(16, "int8")
        self.listeners: list[Listener] = []

    def teardown(self) -> None:
        worker.kv_feed.PIECE_BLOCKS, worker.kv_feed.QUEUE_BLOCKS = self.limits

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def change(self, names: set[bytes]) -> None:
        for name in sorted(names):
            (self.journal.evict if name in self.cached else self.journal.add)(name)
        self.cached ^= names

    @rule()
    def clear(self) -> None:
        self.journal.clear()
        self.cached.clear()

    @rule(limit=st.integers(1, 6))
    def tell(self, limit: int) -> None:
        for listener in self.listeners:
            listener.woken = False
        events = self.journal.take(limit)
        if events is None:
            return
        self.feed.apply(events)
        if not self.journal:
            self.told = {name[:HINT_BYTES] for name in self.cached}
            assert set(split(b"".join(piece.hashes for piece in self.feed.snapshot()))) == self.told
        assert all(listener.woken or listener.subscription.pending for listener in self.listeners)

    @rule()
    def connect(self) -> None:
        if len(self.listeners) < 3:
            self.listeners.append(Listener(self.feed))

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.listeners:
            listener = self.listeners.pop(data.draw(st.integers(0, len(self.listeners) - 1)))
            listener.subscription.close()
            listener.woken = False
            self.tell(6)
            assert not listener.woken

    @rule(data=st.data(), messages=st.integers(1, 4))
    def read(self, data: st.DataObject, messages: int) -> None:
        if self.listeners:
            listener = data.draw(st.sampled_from(self.listeners))
            for _ in range(messages):
                if listener.subscription.pending:
                    listener.read()

    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        if self.listeners:
            listener = data.draw(st.sampled_from(self.listeners))
            listener.subscription.restart()
            assert listener.woken

    @rule()
    def all_catch_up(self) -> None:
        while self.journal:
            self.tell(4)
        for listener in self.listeners:
            while listener.subscription.pending:
                listener.read()
            assert listener.snapshots
            assert listener.has == {name[:HINT_BYTES] for name in self.cached}

    @invariant()
    def what_waits_is_bounded(self) -> None:
        for listener in self.listeners:
            queued = listener.subscription._events
            assert sum(len(e.added) + len(e.evicted) for e in queued) <= 5 * HINT_BYTES


TestFeed = FeedMachine.TestCase


@given(st.integers(0, 7))
def test_a_snapshot_has_at_least_one_piece(count: int) -> None:
    feed = KvFeed("life")
    feed.open(16, "int8")
    journal = CacheJournal()
    for name in NAMES[:count]:
        journal.add(name)
    events = journal.take(count)
    if events is not None:
        feed.apply(events)
    (piece,) = feed.snapshot()
    assert (piece.piece, piece.pieces, piece.seq) == (0, 1, int(count > 0))
    assert len(piece.hashes) == count * HINT_BYTES
