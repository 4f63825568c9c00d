"""Who owns each KV block and each landing slot: the only file in which ownership changes.

    blocks:  free -> held -> cached (full, hashed, nobody holds it) -> held again, or evicted -> free
             free -> landing (a hand-off's chunk is being copied in) -> held, or back to free
    slots:   free -> leased -> free, or quarantined (bytes of a lost writer may still arrive) -> free

Invariants, checked by `check()` when idle, at shutdown and after every test: free + cached + held + landing = total;
free + leased + quarantined = total; no block in two states. Every call costs what it moves, never what is idle.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from enum import IntEnum

from engine.api import LedgerCounts
from engine.journal import CacheJournal
from engine.lifecycle import Lifecycle


class LedgerError(AssertionError):
    """An ownership rule was broken: a defect of Baton, never a matter of load."""


class BlockState(IntEnum):
    FREE = 0
    CACHED = 1
    HELD = 2
    LANDING = 3


BLOCKS = Lifecycle(
    "block",
    {
        BlockState.FREE: {BlockState.HELD, BlockState.LANDING},
        BlockState.HELD: {BlockState.FREE, BlockState.CACHED},
        BlockState.CACHED: {BlockState.FREE, BlockState.HELD},
        BlockState.LANDING: {BlockState.FREE, BlockState.HELD},
    },
)


class BlockLedger:
    """Ownership of `total` KV blocks of `block_size` tokens, and the prefix cache over them."""

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"a ledger needs blocks: total={total}, block_size={block_size}")
        self.total = total
        self.block_size = block_size
        self._state = [BlockState.FREE] * total
        self._holders = [0] * total
        self._hash: list[bytes | None] = [None] * total
        self._free = list(range(total - 1, -1, -1))
        self._by_hash: dict[bytes, int] = {}
        # Least recently used first. OrderedDict, since popping the front of a plain dict scans its tombstones.
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._landing = 0
        self.evictions = 0
        self.journal = CacheJournal()  # of what `match` finds

    # ---- counts ------------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that can be taken now: free ones and cached ones that would be evicted."""
        return len(self._free) + len(self._evictable)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._evictable)

    @property
    def landing(self) -> int:
        return self._landing

    @property
    def held(self) -> int:
        return self.total - self.available - self._landing

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    # ---- prefix cache ------------------------------------------------------------------------------------------

    def match(self, hashes: list[bytes]) -> int:
        """How many leading hashes are cached or held by someone now."""
        for count, name in enumerate(hashes):
            if name not in self._by_hash:
                return count
        return len(hashes)

    def idle_among(self, hashes: list[bytes]) -> int:
        """How many of the matching blocks nobody holds: they count as available until they are shared."""
        return sum(self._holders[self._by_hash[name]] == 0 for name in hashes)

    def share(self, hashes: list[bytes]) -> list[int]:
        """Takes a hold on the blocks of `hashes`, all of which must match."""
        blocks = [self._by_hash[name] for name in hashes]
        idle = 0
        for block in blocks:
            if self._holders[block] == 0:
                del self._evictable[block]
                self._state[block] = BlockState.HELD
                idle += 1
            self._holders[block] += 1
        BLOCKS.move(BlockState.CACHED, BlockState.HELD, idle)
        return blocks

    def hold(self, blocks: list[int]) -> None:
        """One more holder for each of these held blocks (a fork); each holder releases for itself."""
        for block in blocks:
            if self._state[block] is not BlockState.HELD:
                raise LedgerError(f"block {block} to be held once more is {self._state[block].name}")
        for block in blocks:
            self._holders[block] += 1

    def publish(self, block: int, name: bytes) -> None:
        """Offers a held, full, verified block to later requests. A second block of the same content stays private."""
        if self._state[block] is not BlockState.HELD:
            raise LedgerError(f"published block {block} is {self._state[block].name}")
        if self._hash[block] is None and name not in self._by_hash:
            self._hash[block] = name
            self._by_hash[name] = block
            self.journal.add(name)

    def clear_cache(self) -> None:
        """Forgets every cached block; held ones are freed, not cached, when they are released."""
        BLOCKS.move(BlockState.CACHED, BlockState.FREE, len(self._evictable))
        while self._evictable:
            block, _ = self._evictable.popitem(last=False)
            self._state[block] = BlockState.FREE
            self._free.append(block)
        for name, block in self._by_hash.items():
            assert self._hash[block] == name
            self._hash[block] = None
        self._by_hash.clear()
        self.journal.clear()

    # ---- taking and giving back ----------------------------------------------------------------------------------

    def take(self, count: int) -> list[int] | None:
        """`count` private blocks, held; None (and nothing taken) when there are not that many."""
        return self._take(count, BlockState.HELD)

    def take_landing(self, count: int) -> list[int] | None:
        """`count` blocks for a chunk that has landed; nobody may read them until `landed`."""
        blocks = self._take(count, BlockState.LANDING)
        if blocks is not None:
            self._landing += count
        return blocks

    def landed(self, blocks: list[int]) -> None:
        """The chunk was copied in and verified: its blocks are held from now on."""
        self._leave_landing(blocks, BlockState.HELD)
        for block in blocks:
            self._holders[block] = 1

    def refuse_landing(self, blocks: list[int]) -> None:
        """The chunk was refused or given up: its blocks are free again."""
        self._leave_landing(blocks, BlockState.FREE)
        self._free.extend(blocks)

    def release(self, blocks: list[int]) -> None:
        """Lets go of held blocks: the last holder leaves a published block cached, another one free.

        The tail goes first, so that a prefix outlives what was built on it.
        """
        freed = cached = 0
        for block in reversed(blocks):
            if self._state[block] is not BlockState.HELD or self._holders[block] < 1:
                raise LedgerError(f"released block {block} is {self._state[block].name}")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._hash[block] is None:
                    self._state[block] = BlockState.FREE
                    self._free.append(block)
                    freed += 1
                else:
                    self._state[block] = BlockState.CACHED
                    self._evictable[block] = None
                    cached += 1
        BLOCKS.move(BlockState.HELD, BlockState.FREE, freed)
        BLOCKS.move(BlockState.HELD, BlockState.CACHED, cached)

    def _take(self, count: int, state: BlockState) -> list[int] | None:
        if count > self.available:
            return None
        while len(self._free) < count:
            self._evict()
        blocks = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        holders = 1 if state is BlockState.HELD else 0
        for block in blocks:
            if self._state[block] is not BlockState.FREE:
                raise LedgerError(f"block {block} was handed out while {self._state[block].name}")
            self._state[block] = state
            self._holders[block] = holders
        BLOCKS.move(BlockState.FREE, state, count)
        return blocks

    def _evict(self) -> None:
        block, _ = self._evictable.popitem(last=False)
        name = self._hash[block]
        assert name is not None
        del self._by_hash[name]
        self.journal.evict(name)
        self._hash[block] = None
        self._state[block] = BlockState.FREE
        self._free.append(block)
        BLOCKS.move(BlockState.CACHED, BlockState.FREE)
        self.evictions += 1

    def _leave_landing(self, blocks: list[int], state: BlockState) -> None:
        for block in blocks:
            if self._state[block] is not BlockState.LANDING:
                raise LedgerError(f"landing block {block} is {self._state[block].name}")
            self._state[block] = state
        BLOCKS.move(BlockState.LANDING, state, len(blocks))
        self._landing -= len(blocks)

    # ---- checks ------------------------------------------------------------------------------------------------

    def check(self, *, at_rest: bool = False) -> None:
        """Raises LedgerError when the books do not add up; `at_rest`: also when anything is held or landing."""
        tally = {state: self._state.count(state) for state in BlockState}
        self._check_each()
        if len(set(self._free)) != len(self._free) or len(self._free) != tally[BlockState.FREE]:
            raise LedgerError(f"{len(self._free)} blocks on the free list, {tally[BlockState.FREE]} free")
        if self._landing != tally[BlockState.LANDING]:
            raise LedgerError(f"{self._landing} blocks counted landing, {tally[BlockState.LANDING]} are")
        if at_rest and (tally[BlockState.HELD] or tally[BlockState.LANDING]):
            raise LedgerError(
                f"at rest, but {tally[BlockState.HELD]} held and {tally[BlockState.LANDING]} landing"
            )

    def check_owners(self, held: Iterable[list[int]], landing: Iterable[list[int]]) -> None:
        """Raises LedgerError unless those who say that they hold blocks, or copy into them, are all that the books
        know of: so a block has two owners only where it is shared, and none is kept by nobody."""
        holders = [0] * self.total
        for blocks in held:
            for block in blocks:
                holders[block] += 1
        if holders != self._holders:
            block = next(b for b in range(self.total) if holders[b] != self._holders[b])
            raise LedgerError(
                f"block {block} has {holders[block]} owners, the books say {self._holders[block]}"
            )
        arriving = [block for blocks in landing for block in blocks]
        if len(arriving) != self._landing or len(set(arriving)) != self._landing:
            raise LedgerError(f"chunks land in blocks {sorted(arriving)}, the books say {self._landing}")
        for block in arriving:
            if self._state[block] is not BlockState.LANDING:
                raise LedgerError(f"a chunk lands in block {block}, which is {self._state[block].name}")

    def _check_each(self) -> None:
        """What must hold of every single block. It scans them all, so what costs is outside the loop."""
        held, cached, evictable, by_hash = BlockState.HELD, BlockState.CACHED, self._evictable, self._by_hash
        for block, (state, holders, name) in enumerate(
            zip(self._state, self._holders, self._hash, strict=True)
        ):
            if (state is held) != (holders > 0):
                raise LedgerError(f"block {block} is {state.name} with {holders} holders")
            if (state is cached) != (block in evictable):
                raise LedgerError(f"block {block} is {state.name}, evictable: {block in evictable}")
            if name is not None:
                if by_hash.get(name) != block:
                    raise LedgerError(f"block {block} carries a hash that names another block")
                if state is not held and state is not cached:
                    raise LedgerError(f"block {block} is {state.name} and carries a hash")


class SlotState(IntEnum):
    FREE = 0
    LEASED = 1
    QUARANTINED = 2


SLOTS = Lifecycle(
    "slot",
    {
        SlotState.FREE: {SlotState.LEASED},
        SlotState.LEASED: {SlotState.FREE, SlotState.QUARANTINED},
        SlotState.QUARANTINED: {SlotState.FREE},
    },
)


class SlotLedger:
    """Ownership of the landing slots of one rank, the only memory that a peer may write."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._state = [SlotState.FREE] * total
        self._free = list(range(total - 1, -1, -1))
        self._quarantined = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def quarantined(self) -> int:
        return self._quarantined

    @property
    def leased(self) -> int:
        return self.total - self.free - self._quarantined

    def lease(self) -> int | None:
        """A free slot, leased from now on; None when there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._move(slot, SlotState.FREE, SlotState.LEASED)
        return slot

    def free_slot(self, slot: int) -> None:
        """The leased slot's chunk was copied out after its write had settled."""
        self._move(slot, SlotState.LEASED, SlotState.FREE)
        self._free.append(slot)

    def quarantine(self, slot: int) -> None:
        """The leased slot's writer was given up while bytes may be in flight."""
        self._move(slot, SlotState.LEASED, SlotState.QUARANTINED)
        self._quarantined += 1

    def end_quarantine(self, slot: int) -> None:
        """It is certain that no byte for this slot can still arrive."""
        self._move(slot, SlotState.QUARANTINED, SlotState.FREE)
        self._quarantined -= 1
        self._free.append(slot)

    def _move(self, slot: int, before: SlotState, after: SlotState) -> None:
        if self._state[slot] is not before:
            raise LedgerError(f"slot {slot} is {self._state[slot].name}, not {before.name}")
        self._state[slot] = SLOTS.move(before, after)

    def check(self, *, at_rest: bool = False) -> None:
        """Raises LedgerError when the books do not add up; `at_rest`: also when a slot is leased."""
        tally = {state: self._state.count(state) for state in SlotState}
        if tally[SlotState.FREE] != len(set(self._free)) or len(set(self._free)) != len(self._free):
            raise LedgerError(f"{len(self._free)} slots on the free list, {tally[SlotState.FREE]} free")
        if tally[SlotState.QUARANTINED] != self._quarantined:
            raise LedgerError(
                f"{self._quarantined} slots counted quarantined, {tally[SlotState.QUARANTINED]} are"
            )
        if at_rest and tally[SlotState.LEASED]:
            raise LedgerError(f"at rest, but {tally[SlotState.LEASED]} slots are leased")


def counts(blocks: BlockLedger, slots: SlotLedger | None = None) -> LedgerCounts:
    """The ledger as operators see it."""
    return LedgerCounts(
        blocks_free=blocks.free,
        blocks_cached=blocks.cached,
        blocks_held=blocks.held,
        blocks_landing=blocks.landing,
        blocks_total=blocks.total,
        slots_free=slots.free if slots else 0,
        slots_leased=slots.leased if slots else 0,
        slots_quarantined=slots.quarantined if slots else 0,
        slots_total=slots.total if slots else 0,
    )
