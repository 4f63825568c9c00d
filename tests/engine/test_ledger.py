"""The ledger against a naive model, for any order of calls; and the rules that it must refuse to break.

Its journal likewise: whoever applies the batches, whenever they are taken, has what the prefix cache has.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from engine.journal import CacheJournal
from engine.ledger import BlockLedger, LedgerError, SlotLedger, counts
from engine.prefix import HINT_BYTES, extend, names

TOTAL = 8
NAMES = [bytes([number]) * 16 for number in range(6)]


def unpacked(hints: bytes) -> set[bytes]:
    """The hints of a batch; none may be there twice."""
    found = [hints[at : at + HINT_BYTES] for at in range(0, len(hints), HINT_BYTES)]
    assert len(set(found)) == len(found)
    return set(found)


class LedgerMachine(RuleBasedStateMachine):
    """The model: who holds which block (a list of holds), what lands, which name each block carries, and in which order
    idle blocks were last used."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(TOTAL, 4)
        self.holds: list[int] = []  # one entry for each hold
        self.landing: set[int] = set()
        self.named: dict[bytes, int] = {}
        self.idle: list[int] = []  # cached, least recently used first
        self.told: set[bytes] = set()  # hints, by the batches of the journal so far
        self.batches = 0

    held = Bundle("held")
    landing_blocks = Bundle("landing_blocks")

    @property
    def free(self) -> int:
        return TOTAL - len(set(self.holds)) - len(self.landing) - len(self.idle)

    def took(self, blocks: list[int] | None, count: int) -> bool:
        """Books a take: free blocks go first, then the ones that were idle for the longest."""
        if count > self.free + len(self.idle):
            assert blocks is None
            return False
        assert blocks is not None
        assert len(set(blocks)) == count
        evicted = set(self.idle[: max(0, count - self.free)])
        assert not set(blocks) & (set(self.holds) | self.landing | set(self.idle) - evicted)
        self.idle = [block for block in self.idle if block not in evicted]
        self.named = {name: block for name, block in self.named.items() if block not in evicted}
        return True

    @rule(target=held, count=st.integers(0, 4))
    def take(self, count: int) -> object:
        blocks = self.ledger.take(count)
        if not self.took(blocks, count):
            return multiple()
        assert blocks is not None
        self.holds += blocks
        return blocks

    @rule(target=landing_blocks, count=st.integers(0, 4))
    def take_landing(self, count: int) -> object:
        blocks = self.ledger.take_landing(count)
        if not self.took(blocks, count):
            return multiple()
        assert blocks is not None
        self.landing |= set(blocks)
        return blocks

    @rule(target=held, blocks=consumes(landing_blocks))
    def landed(self, blocks: list[int]) -> list[int]:
        self.ledger.landed(blocks)
        self.landing -= set(blocks)
        self.holds += blocks
        return blocks

    @rule(blocks=consumes(landing_blocks))
    def refuse_landing(self, blocks: list[int]) -> None:
        self.ledger.refuse_landing(blocks)
        self.landing -= set(blocks)

    @rule(blocks=held, data=st.data())
    def publish(self, blocks: list[int], data: st.DataObject) -> None:
        if not blocks:
            return
        block, name = data.draw(st.sampled_from(blocks)), data.draw(st.sampled_from(NAMES))
        self.ledger.publish(block, name)
        if name not in self.named and block not in self.named.values():
            self.named[name] = block

    @rule(target=held, data=st.data(), strangers=st.lists(st.sampled_from(NAMES), max_size=2, unique=True))
    def share(self, data: st.DataObject, strangers: list[bytes]) -> list[int]:
        known = data.draw(st.permutations(sorted(self.named)))
        wanted = known + [name for name in strangers if name not in known]
        matching = self.ledger.match(wanted)
        assert matching == next((i for i, name in enumerate(wanted) if name not in self.named), len(wanted))
        names = wanted[:matching]
        blocks = [self.named[name] for name in names]
        assert self.ledger.idle_among(names) == len(set(blocks) & set(self.idle))
        assert self.ledger.share(names) == blocks
        self.idle = [block for block in self.idle if block not in blocks]
        self.holds += blocks
        return blocks

    @rule(blocks=consumes(held))
    def release(self, blocks: list[int]) -> None:
        self.ledger.release(blocks)
        for block in reversed(blocks):
            self.holds.remove(block)
            if block not in self.holds and block in self.named.values():
                self.idle.append(block)

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    def run_a_sequence(self, names: list[bytes]) -> None:
        """The usual life of blocks at once: taken, published, let go of."""
        blocks = self.take(len(names))
        if not isinstance(blocks, list):
            return
        for block, name in zip(blocks, names, strict=True):
            self.ledger.publish(block, name)
            self.named.setdefault(name, block)
        self.release(blocks)

    @rule(limit=st.integers(1, 2 * TOTAL))
    def take_batch(self, limit: int) -> None:
        before = bool(self.ledger.journal)
        events = self.ledger.journal.take(limit)
        assert (events is not None) == before
        if events is None:
            return
        self.batches += 1
        assert events.seq == self.batches
        added, evicted = unpacked(events.added), unpacked(events.evicted)
        assert len(added) + len(evicted) <= limit and not added & evicted
        if events.cleared:
            assert not evicted
            self.told.clear()
        assert evicted <= self.told and not added & self.told
        self.told = self.told - evicted | added

    @rule()
    def take_all_batches(self) -> None:
        while self.ledger.journal:
            self.take_batch(3)
        assert self.told == {name[:HINT_BYTES] for name in self.named}

    @rule()
    @precondition(lambda self: self.idle)
    def clear_cache(self) -> None:
        self.ledger.clear_cache()
        self.idle.clear()
        self.named.clear()

    @invariant()
    def books_add_up(self) -> None:
        ledger = self.ledger
        ledger.check()
        told = counts(ledger)
        assert told.blocks_held == len(set(self.holds))
        assert told.blocks_landing == len(self.landing)
        assert told.blocks_cached == len(self.idle)
        assert told.blocks_free == self.free
        assert ledger.available == self.free + len(self.idle)
        assert ledger.match(NAMES) == next(
            (i for i, name in enumerate(NAMES) if name not in self.named), len(NAMES)
        )
        if self.holds or self.landing:
            with pytest.raises(LedgerError):
                ledger.check(at_rest=True)
        else:
            ledger.check(at_rest=True)


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_a_block_is_let_go_of_once() -> None:
    ledger = BlockLedger(4, 4)
    blocks = ledger.take(2)
    assert blocks is not None
    ledger.release(blocks)
    with pytest.raises(LedgerError):
        ledger.release(blocks)


def test_landing_blocks_cannot_be_held_published_or_freed_before_they_landed() -> None:
    ledger = BlockLedger(4, 4)
    blocks = ledger.take_landing(1)
    assert blocks is not None
    with pytest.raises(LedgerError):
        ledger.release(blocks)
    with pytest.raises(LedgerError):
        ledger.publish(blocks[0], NAMES[0])
    ledger.landed(blocks)
    with pytest.raises(LedgerError):
        ledger.refuse_landing(blocks)


def test_a_prefix_outlives_what_was_built_on_it() -> None:
    ledger = BlockLedger(3, 4)
    blocks = ledger.take(3)
    assert blocks is not None
    for block, name in zip(blocks, NAMES, strict=False):
        ledger.publish(block, name)
    ledger.release(blocks)
    assert ledger.take(1) is not None
    assert ledger.match(NAMES[:3]) == 2


def test_check_sees_books_that_do_not_add_up() -> None:
    spoils: list[Callable[[BlockLedger], object]] = [
        lambda ledger: ledger._free.pop(),
        lambda ledger: ledger._free.append(ledger._free[-1]),
        lambda ledger: ledger._evictable.update({0: None}),
        lambda ledger: ledger._hash.__setitem__(3, NAMES[0]),
        lambda ledger: ledger._holders.__setitem__(0, 1),
    ]
    for spoil in spoils:
        ledger = BlockLedger(4, 4)
        spoil(ledger)
        with pytest.raises(LedgerError):
            ledger.check()


class SlotMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slots = SlotLedger(3)
        self.state: dict[int, str] = {}  # slots that are not free

    @rule()
    def lease(self) -> None:
        slot = self.slots.lease()
        assert (slot is None) == (len(self.state) == 3)
        if slot is not None:
            assert slot not in self.state
            self.state[slot] = "leased"

    @rule(data=st.data(), move=st.sampled_from(["free_slot", "quarantine", "end_quarantine"]))
    def move(self, data: st.DataObject, move: str) -> None:
        slot = data.draw(st.sampled_from(sorted(self.state) * 3 + [0, 1, 2]))
        before = "quarantined" if move == "end_quarantine" else "leased"
        if self.state.get(slot) != before:
            with pytest.raises(LedgerError):
                getattr(self.slots, move)(slot)
            return
        getattr(self.slots, move)(slot)
        if move == "quarantine":
            self.state[slot] = "quarantined"
        else:
            del self.state[slot]

    @invariant()
    def books_add_up(self) -> None:
        self.slots.check()
        states = list(self.state.values())
        assert self.slots.leased == states.count("leased")
        assert self.slots.quarantined == states.count("quarantined")
        assert self.slots.free == 3 - len(states)


SlotMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestSlots = SlotMachine.TestCase


def test_a_fork_is_one_more_holder() -> None:
    """A block is free or cached again only when every holder has released it; only held blocks can be held more."""
    ledger = BlockLedger(4, 16)
    taken = ledger.take(2)
    assert taken is not None
    ledger.publish(taken[0], b"name")
    ledger.hold(taken)
    ledger.hold(taken[:1])
    ledger.release(taken)
    ledger.release(taken)
    assert (ledger.held, ledger.free, ledger.cached) == (1, 3, 0)
    with pytest.raises(LedgerError):
        ledger.hold(taken)  # the second is free
    ledger.check()
    ledger.release(taken[:1])
    assert (ledger.held, ledger.free, ledger.cached) == (0, 3, 1)
    with pytest.raises(LedgerError):
        ledger.hold(taken[:1])  # cached: nobody holds it
    ledger.check(at_rest=True)


def test_what_comes_and_goes_between_two_batches_is_not_told() -> None:
    """So the journal is bounded by the pool, also when nobody takes its batches."""
    journal = CacheJournal()
    for _ in range(100):
        for name in NAMES:
            journal.add(name)
        for name in NAMES:
            journal.evict(name)
    assert not journal and journal.take(10) is None
    journal.add(NAMES[0])
    assert journal.take(10) is not None
    journal.evict(NAMES[0])
    journal.add(NAMES[0])
    assert not journal


def test_a_journal_of_a_full_pool_is_told_in_order() -> None:
    """Losses before gains, heads of prefixes before what is built on them, never more than asked for."""
    journal = CacheJournal()
    for name in NAMES[:3]:
        journal.add(name)
    first = journal.take(2)
    assert first is not None
    assert (first.seq, first.added, first.evicted) == (1, NAMES[0][:8] + NAMES[1][:8], b"")
    journal.evict(NAMES[0])
    second = journal.take(2)
    assert second is not None
    assert (second.seq, second.added, second.evicted) == (2, NAMES[2][:8], NAMES[0][:8])
    journal.add(NAMES[3])
    journal.clear()
    journal.add(NAMES[4])
    third = journal.take(2)
    assert third is not None
    assert (third.seq, third.cleared, third.added, third.evicted) == (3, True, NAMES[4][:8], b"")


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("length", [0, 3, 4, 31, 32, 33, 700])
def test_names_one_by_one_are_names_at_once(block_size: int, length: int) -> None:
    tokens = [7 * at % 1000 for at in range(length)]
    at_once: list[bytes] = []
    extend(at_once, tokens, block_size, "salt")
    assert list(names(tokens, block_size, "salt")) == at_once
    assert len(at_once) == length // block_size
    piecewise: list[bytes] = []
    for limit in (length // 3, length // 3 - 2, length // 2, length):
        extend(piecewise, tokens, block_size, "salt", limit)
    assert piecewise == at_once
    other: list[bytes] = []
    extend(other, tokens, block_size)
    assert not set(other) & set(at_once)
