"""The prefix index against a naive one, a set for each worker: any order, loss and repetition of what workers say.

The workers are made by hand: each has a cache that changes, numbers its batches and can be asked for a snapshot. What
they say lies in a mailbox, out of which it is delivered, again, late, or never.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.prefix_index import FORGET_S, SETTLE_S, Expected, PrefixIndex
from router.prompt_hints import HintChain, PromptHints

# Prompts that share beginnings of many lengths, and one of another salt.
TOKENS = [
    [1] * 16,
    [1] * 12 + [2] * 8,
    [1] * 8 + [2] * 8,
    [1] * 7,
    [1] * 6 + [3, 3, 4, 4, 5, 5],
    [1] * 4 + [2] * 3,
    [2] * 16,
    [2] * 4 + [1] * 5,
    [1],
    [],
]
PROMPTS = [(tokens, "") for tokens in TOKENS] + [(TOKENS[0], "salt")]
SIZES = {"d0": 2, "d1": 4, "p0": 2, "p1": 4}
BATCH = 3  # hints in one piece of a snapshot


def chains(block_size: int) -> Iterator[list[int]]:
    for tokens, salt in PROMPTS:
        chain = HintChain(tokens, salt, block_size)
        yield [chain[at] for at in range(chain.blocks)]


BLOCKS = {size: sorted({hint for chain in chains(size) for hint in chain}) for size in (2, 4)}


@dataclass
class Events:
    incarnation: str
    seq: int
    added: list[int]
    evicted: list[int]
    cleared: bool


@dataclass
class Piece:
    incarnation: str
    seq: int
    piece: int
    pieces: int
    hints: list[int]


@dataclass
class Source:
    """A worker: what it has, and what it said."""

    incarnation: str = "life 0"
    cache: set[int] = field(default_factory=set)
    seq: int = 0
    mailbox: list[Events | Piece] = field(default_factory=list)

    def say(self, added: set[int], evicted: set[int], cleared: bool) -> None:
        self.cache = (set() if cleared else self.cache - evicted) | added
        self.seq += 1
        self.mailbox.append(Events(self.incarnation, self.seq, sorted(added), sorted(evicted), cleared))

    def say_all(self) -> None:
        hints = sorted(self.cache)
        parts = [hints[at : at + BATCH] for at in range(0, len(hints), BATCH)] or [[]]
        for number, part in enumerate(parts):
            self.mailbox.append(Piece(self.incarnation, self.seq, number, len(parts), part))


@dataclass
class Naive:
    """What the index is to know of one worker, in the simplest words."""

    incarnation: str = "life 0"
    has: set[int] = field(default_factory=set)
    known: bool = False  # its block size
    seq: int | None = None  # of the last batch when nothing is missing
    reading: tuple[int, int] | None = None  # seq of a snapshot, its next piece

    def hear(self, message: Events | Piece) -> None:
        if message.incarnation != self.incarnation:
            return
        if isinstance(message, Events):
            if self.seq is None or message.seq <= self.seq:
                return
            if message.seq != self.seq + 1:
                self.seq = None
                return
            self.seq = message.seq
            self.has = (set() if message.cleared else self.has - set(message.evicted)) | set(message.added)
            return
        if self.seq is not None and message.seq <= self.seq:
            return
        if message.piece == 0:
            self.has, self.seq, self.known = set(), None, True
            self.reading = (message.seq, 0)
        elif self.reading is None or self.reading[0] != message.seq or message.piece > self.reading[1]:
            self.reading = None
            return
        if message.piece < self.reading[1]:
            return
        self.has |= set(message.hints)
        self.reading = (message.seq, message.piece + 1)
        if message.piece + 1 == message.pieces:
            self.seq, self.reading = message.seq, None


class IndexMachine(RuleBasedStateMachine):
    limit = 1_000_000

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(self.limit)
        self.index.touched_above = 0
        self.now = 100.0
        self.sources: dict[str, Source] = {}
        self.naive: dict[str, Naive] = {}
        self.order: tuple[list[str], list[str]] = ([], [])
        # (worker, its naive self, expected, hints that it will have, when that ends)
        self.expected: list[tuple[str, Naive, Expected, set[int], float]] = []
        self.lives = 0

    @initialize()
    def begin(self) -> None:
        self.set_workers(["d0", "d1"], ["p0", "p1"], set())

    @rule(
        decode=st.permutations(["d0", "d1"]),
        prefill=st.permutations(["p0", "p1"]),
        gone=st.sets(st.sampled_from(sorted(SIZES)), max_size=2),
        reborn=st.sets(st.sampled_from(sorted(SIZES)), max_size=2),
    )
    def members_change(self, decode: list[str], prefill: list[str], gone: set[str], reborn: set[str]) -> None:
        present = [[name for name in names if name not in gone] for names in (decode, prefill)]
        self.set_workers(present[0], present[1], reborn)

    def set_workers(self, decode: list[str], prefill: list[str], reborn: set[str]) -> None:
        for name in SIZES:
            if name not in decode + prefill:
                self.naive.pop(name, None)
                self.sources.pop(name, None)
            elif name in reborn or name not in self.naive:
                self.lives += 1
                source = self.sources.get(name, Source())  # what its last life said may still come
                self.sources[name] = Source(f"life {self.lives}", mailbox=source.mailbox)
                self.naive[name] = Naive(f"life {self.lives}")
        self.order = (decode, prefill)
        self.index.set_workers(
            *([(name, self.naive[name].incarnation) for name in part] for part in self.order)
        )

    @rule(data=st.data(), cleared=st.booleans())
    def cache_changes(self, data: st.DataObject, cleared: bool) -> None:
        if self.sources:
            name = data.draw(st.sampled_from(sorted(self.sources)))
            source = self.sources[name]
            changed = data.draw(st.sets(st.sampled_from(BLOCKS[SIZES[name]]), max_size=8))
            if cleared:
                source.say(changed, set(), True)
            else:
                source.say(changed - source.cache, changed & source.cache, False)

    @rule(data=st.data())
    def a_whole_prompt(self, data: st.DataObject) -> None:
        if self.sources:
            name = data.draw(st.sampled_from(sorted(self.sources)))
            source = self.sources[name]
            source.say(
                set(data.draw(st.sampled_from(list(chains(SIZES[name]))))) - source.cache, set(), False
            )

    @rule(data=st.data())
    def snapshot(self, data: st.DataObject) -> None:
        if self.sources:
            self.sources[data.draw(st.sampled_from(sorted(self.sources)))].say_all()

    @rule(
        data=st.data(), count=st.integers(1, 6), fate=st.sampled_from(["all", "all", "again", "late", "lost"])
    )
    def deliver(self, data: st.DataObject, count: int, fate: str) -> None:
        """The first messages of a mailbox; or one from anywhere in it, which stays there or is gone."""
        waiting = sorted(name for name, source in self.sources.items() if source.mailbox)
        if not waiting:
            return
        name = data.draw(st.sampled_from(waiting))
        mailbox = self.sources[name].mailbox
        if fate == "all":
            for message in mailbox[:count]:
                self.tell(name, message)
            del mailbox[:count]
            return
        at = data.draw(st.integers(0, len(mailbox) - 1))
        if fate != "lost":
            self.tell(name, mailbox[at])
        if fate != "again":
            del mailbox[at]

    def tell(self, name: str, message: Events | Piece) -> None:
        m = message
        if isinstance(m, Events):
            self.index.events(name, m.incarnation, m.seq, m.added, m.evicted, m.cleared)
        else:
            self.index.snapshot(name, m.incarnation, m.seq, SIZES[name], m.piece, m.pieces, m.hints)
        self.naive[name].hear(message)

    @rule()
    @precondition(lambda self: self.sources)
    def all_is_told(self) -> None:
        """One more batch shows what was missed. Whoever missed it asks: then the index has what the workers have."""
        for name, source in self.sources.items():
            source.say(set(), set(), False)
            for message in source.mailbox:
                self.tell(name, message)
            source.mailbox.clear()
            if not self.index.synced(name):
                source.say_all()
                for message in source.mailbox:
                    self.tell(name, message)
                source.mailbox.clear()
            assert self.index.synced(name)
            assert self.naive[name].has == source.cache

    # ---- placements ----------------------------------------------------------------------------------------------

    @rule(data=st.data(), prompt=st.sampled_from(PROMPTS))
    def place(self, data: st.DataObject, prompt: tuple[list[int], str]) -> None:
        if not self.naive:
            return
        name = data.draw(st.sampled_from(sorted(self.naive)))
        hints = PromptHints(*prompt)
        decode, prefill = self.index.match(hints, self.now)
        names = self.order[0] + self.order[1]
        cached = int([*decode, *prefill][names.index(name)])
        expected = self.index.expect(hints, name, cached, self.now)
        chain = hints.chain(SIZES[name])
        rest = {chain[at] for at in range(cached // SIZES[name], chain.blocks)}
        assert (expected is not None) == (self.naive[name].known and bool(rest))
        if expected is not None:
            self.expected.append((name, self.naive[name], expected, rest, self.now + FORGET_S))

    @rule(data=st.data())
    @precondition(lambda self: self.expected)
    def settle(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.expected) - 1))
        name, life, expected, rest, until = self.expected.pop(at)
        self.index.settle(expected, self.now)
        if until > self.now and expected.chain is not None:
            self.expected.append((name, life, expected, rest, self.now + SETTLE_S))

    @rule(data=st.data())
    @precondition(lambda self: self.expected)
    def forget(self, data: st.DataObject) -> None:
        *_, expected, _, _ = self.expected.pop(data.draw(st.integers(0, len(self.expected) - 1)))
        self.index.forget(expected)
        self.index.forget(expected)

    @rule(passes=st.sampled_from([0.1, SETTLE_S, 5.0, FORGET_S]))
    def time_passes(self, passes: float) -> None:
        self.now += passes
        self.expected = [one for one in self.expected if one[4] > self.now]

    # ---- what must hold --------------------------------------------------------------------------------------------

    def naively(self, name: str, prompt: tuple[list[int], str]) -> int:
        """Leading tokens that the worker has or will have."""
        naive, size = self.naive[name], SIZES[name]
        if not naive.known:
            return 0
        has = naive.has.union(
            *(rest for at, life, _, rest, _ in self.expected if at == name and life is naive)
        )
        chain = HintChain(*prompt, size)
        return size * next((at for at in range(chain.blocks) if chain[at] not in has), chain.blocks)

    def compare(self, found: int, expected: int) -> None:
        assert found == expected

    @invariant()
    def it_finds_what_the_naive_one_finds(self) -> None:
        for prompt in PROMPTS:
            found = self.index.match(PromptHints(*prompt), self.now)
            for names, tokens in zip(self.order, found, strict=True):
                assert len(tokens) == len(names)
                for name, count in zip(names, tokens, strict=True):
                    self.compare(int(count), self.naively(name, prompt))

    @invariant()
    def its_books_add_up(self) -> None:
        index = self.index
        workers = index._workers
        assert index.entries == sum(len(worker.hints) for worker in workers.values()) <= index.limit
        assert sum(mask.bit_count() for mask in index._masks.values()) == index.entries
        for worker in workers.values():
            assert all(index._masks[hint] & worker.bit for hint in worker.hints)
        sizes = {name: self.naive[name].known and SIZES[name] for name in workers}
        for size in {0, *SIZES.values()}:
            mask = sum(worker.bit for name, worker in workers.items() if size and sizes[name] == size)
            assert index._by_naming.get((size, ""), 0) == mask
        assert all(one.chain is not None for waiting in index._expected.values() for one in waiting)
        assert all(index._expected.values())


class BoundedMachine(IndexMachine):
    """With little room it knows less than it was told, and never more."""

    limit = 9

    def compare(self, found: int, expected: int) -> None:
        assert found <= expected


IndexMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
BoundedMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestIndex = IndexMachine.TestCase
TestBoundedIndex = BoundedMachine.TestCase


def full(limit: int = 1_000_000, workers: int = 1, block_size: int = 4) -> PrefixIndex:
    """Decode workers d0, d1 ... that have said that they have nothing."""
    index = PrefixIndex(limit)
    index.set_workers([(f"d{at}", "life") for at in range(workers)], [])
    for at in range(workers):
        index.snapshot(f"d{at}", "life", 0, block_size, 0, 1, [])
    return index


def hints_of(tokens: list[int], block_size: int = 4) -> list[int]:
    chain = HintChain(tokens, "", block_size)
    return [chain[at] for at in range(chain.blocks)]


def test_a_prompt_is_hashed_as_far_as_somebody_has_it() -> None:
    index = full()
    tokens = list(range(400))
    index.events("d0", "life", 1, hints_of(tokens[:80]), [], False)
    prompt = PromptHints(tokens)
    assert index.match(prompt, 0.0)[0].tolist() == [80]
    assert 21 <= len(prompt.chain(4).known) <= 26
    assert index.match(PromptHints(tokens[50:]), 0.0)[0].tolist() == [0]
    index.match(PromptHints(tokens, "salt"), 0.0)
    assert (index.lookups, index.hits) == (3, 1)


@pytest.mark.parametrize("workers", [3, 9, 200])
def test_many_workers_each_with_a_part(workers: int) -> None:
    index = full(workers=workers)
    tokens = list(range(4 * workers))
    hints = hints_of(tokens)
    for at in range(workers):
        index.events(f"d{at}", "life", 1, hints[:at], [], False)
    assert index.match(PromptHints(tokens), 0.0)[0].tolist() == [4 * at for at in range(workers)]
    for at in range(workers):
        index.events(f"d{at}", "life", 2, hints[at:], [], False)
    assert index.match(PromptHints(tokens), 0.0)[0].tolist() == [len(tokens)] * workers


def test_what_is_used_stays_when_there_is_too_much() -> None:
    """And of what nobody used, the ends go before the beginnings."""
    index = full(limit=100)
    used, other = list(range(160)), list(range(1000, 1160))
    index.events("d0", "life", 1, hints_of(used), [], False)
    index.events("d0", "life", 2, hints_of(other), [], False)
    seq = 2
    for start in range(2000, 12000, 200):
        seq += 1
        assert index.match(PromptHints(used), 0.0)[0].tolist() == [160]
        index.events("d0", "life", seq, hints_of(list(range(start, start + 40))), [], False)
        assert index.entries <= 100
    assert index.match(PromptHints(other), 0.0)[0].tolist() == [0]
    assert index.dropped == 40 + 40 + 50 * 10 - 100
    index = full(limit=100)
    index.events("d0", "life", 1, hints_of(other), [], False)
    index.events("d0", "life", 2, hints_of(list(range(2000, 2280))), [], False)
    assert index.match(PromptHints(other), 0.0)[0].tolist() == [4 * 30]


def test_a_burst_of_one_prefix_follows_its_first() -> None:
    """Before any worker has said anything: tokens are compared, nothing more is hashed than where prompts part."""
    index = full(workers=2, block_size=16)
    system = list(range(4000))
    prompts = [PromptHints(system + [50_000 + at] * 300) for at in range(40)]
    for at, prompt in enumerate(prompts):
        found = index.match(prompt, 0.0)[0].tolist()
        assert found == ([0, 4000] if at else [0, 0])
        assert index.expect(prompt, "d1", found[1], 0.0) is not None
    assert len(prompts[0].chain(16).known) <= 1
    assert len(prompts[5].chain(16).known) <= 4000 // 16 + 32
    assert index.match(PromptHints(system + [50_007] * 300), 0.0)[0].tolist() == [0, 4288]


def test_a_new_life_of_a_worker_has_nothing_and_is_expected_to_have_nothing() -> None:
    index = full(workers=2)
    tokens = list(range(100))
    prompt = PromptHints(tokens)
    index.events("d0", "life", 1, hints_of(tokens[:40]), [], False)
    assert index.expect(prompt, "d0", 40, 0.0) is not None
    assert index.match(prompt, 0.0)[0].tolist() == [100, 0]
    index.set_workers([("d1", "life"), ("d0", "next")], [])
    index.snapshot("d0", "next", 0, 4, 0, 1, [])
    index.events("d0", "life", 2, hints_of(tokens), [], False)
    assert index.match(prompt, 0.0)[0].tolist() == [0, 0]
    assert index.entries == 0


def test_a_snapshot_whose_piece_is_lost_is_of_no_use_and_one_that_comes_twice_is() -> None:
    index = PrefixIndex(1000)
    index.set_workers([("d0", "life")], [])
    hints = hints_of(list(range(36)))

    def say(seq: int, *pieces: int) -> None:
        for piece in pieces:
            index.snapshot("d0", "life", seq, 4, piece, 3, hints[3 * piece : 3 * piece + 3])

    say(7, 0, 1, 0, 1, 1, 2)
    assert index.synced("d0") and (index.entries, index.gaps, index.resyncs) == (9, 0, 1)
    index.events("d0", "life", 9, [], [], False)
    say(9, 0, 2, 1, 2)
    assert not index.synced("d0") and (index.entries, index.resyncs) == (3, 1)
    say(10, 0, 1)
    say(11, 2)
    assert not index.synced("d0") and index.resyncs == 1
    say(11, 0, 1, 2)
    assert index.synced("d0") and (index.entries, index.resyncs) == (9, 2)
    index.events("d0", "life", 12, [], hints[:1], False)
    assert index.entries == 8


def test_what_was_expected_and_never_came_is_forgotten() -> None:
    index = full()
    kept = []
    for at in range(10):
        expected = index.expect(PromptHints([at] * 8), "d0", 0, float(at))
        assert expected is not None
        kept.append(expected)
    index.settle(kept[0], 10.0)
    index.settle(kept[1], 10.2)
    assert index.expect(PromptHints([99] * 8), "d0", 0, 10.1 + SETTLE_S) is not None
    assert [one.chain is None for one in kept] == [True] + [False] * 9
    assert index.expect(PromptHints([98] * 8), "d0", 0, 5.0 + FORGET_S) is not None
    assert [one.chain is None for one in kept] == [True] * 6 + [False] * 4
    assert len(index._expected) == 4 + 2


def test_workers_that_take_narrowed_kv_name_it_otherwise() -> None:
    """One exact worker and two that are told of int8; each is found by the names that it says."""
    index = full(workers=3)
    tokens = list(range(12))
    exact, narrowed = (hints_of(tokens), [chain_of(tokens, "int8")[at] for at in range(3)])
    assert not set(exact) & set(narrowed)
    index.snapshot("d0", "life", 1, 4, 0, 1, exact)
    index.snapshot("d1", "life", 1, 4, 0, 1, narrowed, "int8")
    index.snapshot("d2", "life", 1, 4, 0, 1, exact, "int8")  # names that are not its own mean nothing
    decode, _ = index.match(PromptHints(tokens), 0.0)
    assert decode.tolist() == [12, 12, 0]
    index.expect(PromptHints(tokens), "d2", 0, 0.0)
    assert index.match(PromptHints(tokens), 1.0)[0].tolist() == [12, 12, 12]
    index.set_workers([("d0", "life")], [])
    assert index._by_naming == {(4, ""): 1}


def chain_of(tokens: list[int], wire_dtype: str) -> HintChain:
    return PromptHints(tokens).chain(4, wire_dtype)
