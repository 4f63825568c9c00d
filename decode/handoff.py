"""One hand-off as the decode worker sees it: which chunks it expects, which have come, what their copies became. Pure.

The receiver derives everything itself (chunk grid, pieces, digest seeds, block counts) from the plan and the prompt;
from the sender it takes only the digests of what it wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.ledger import BlockLedger
from engine.sequence import Sequence
from kvtransfer.chunks import Chunk
from kvtransfer.messages import ChunkDone, Done
from kvtransfer.plan import Plan


@dataclass(slots=True)
class Landing:
    """A chunk whose write has settled: waits in its slot for blocks, or is being copied into them."""

    done: ChunkDone
    slot: int
    copying: bool = False


@dataclass(slots=True)
class Arriving:
    """A token range of which some chunk has been given the range's blocks, and not all are verified."""

    blocks: list[int]
    copying: int = 0  # chunks that the mover copies into the blocks now
    verified: int = 0  # chunks


@dataclass(slots=True)
class Handoff:
    """An open hand-off. `chunks` is the grid, `groups` of each token range. `seeds[i]` commits the digests of range i
    to the whole prefix before its end. Blocks are those of a range: taken when the first of its chunks has landed, and
    believed when the last is verified."""

    handoff_id: int
    peer: str
    epoch: int
    sequence: Sequence
    plan: Plan
    chunks: list[Chunk]
    groups: int
    seeds: list[int]
    began: float
    deadline: float
    credited: int = 0  # leading chunks for which a lease was granted
    copied: int = 0  # chunks that are verified in blocks
    verified: int = 0  # leading ranges whose KV is in the sequence's blocks
    landing: dict[int, Landing] = field(default_factory=dict)  # by chunk
    arriving: dict[int, Arriving] = field(default_factory=dict)  # by range
    ready: dict[int, list[int]] = field(
        default_factory=dict
    )  # by range: verified, but an earlier one is missing
    size_bytes: int = 0
    done: Done | None = None  # came before the last copy was verified

    @property
    def complete(self) -> bool:
        return self.copied == len(self.chunks)

    @property
    def outstanding(self) -> int:
        """Chunks credited and not verified yet."""
        return self.credited - self.copied

    @property
    def verified_tokens(self) -> int:
        """Of the leading ranges."""
        return sum(chunk.tokens for chunk in self.chunks[: self.verified * self.groups : self.groups])

    def range_of(self, chunk: int) -> int:
        return chunk // self.groups

    def expected(self, chunk: int) -> tuple[int, int]:
        """How many pieces a chunk is written in, and their bytes together."""
        _, tokens, layers = self.chunks[chunk]
        pieces = self.plan.pieces(chunk, tokens, len(layers))
        return len(pieces.size_bytes), int(pieces.size_bytes.sum())

    def range_blocks(self, ledger: BlockLedger, index: int) -> int:
        """Blocks that a token range needs; ranges begin on block boundaries."""
        return ledger.blocks_for(self.chunks[index * self.groups].tokens)

    def promised_blocks(self, ledger: BlockLedger) -> int:
        """Blocks that the credited chunks will take and have not taken yet."""
        credited = range(self.verified, self.range_of(self.credited + self.groups - 1))
        return sum(
            self.range_blocks(ledger, index)
            for index in credited
            if index not in self.arriving and index not in self.ready
        )

    def remaining_blocks(self, ledger: BlockLedger) -> int:
        """Blocks still to be taken until the prompt is complete."""
        have = sum(len(blocks) for blocks in self.ready.values())
        have += sum(len(arriving.blocks) for arriving in self.arriving.values())
        last = self.chunks[-1]
        return ledger.blocks_for(last.first_token + last.tokens) - len(self.sequence.block_table) - have

    def accept(self, ledger: BlockLedger, chunk: int) -> None:
        """The chunk's copy was verified: with the last of its range, the range's blocks join the sequence as soon as
        all before them have."""
        landing, index = self.landing.pop(chunk), self.range_of(chunk)
        self.size_bytes += landing.done.size_bytes
        self.copied += 1
        arriving = self.arriving[index]
        arriving.verified += 1
        if arriving.verified < self.groups:
            return
        ledger.landed(arriving.blocks)
        self.ready[index] = self.arriving.pop(index).blocks
        while self.verified in self.ready:
            self.sequence.block_table.extend(self.ready.pop(self.verified))
            self.sequence.advance(ledger, self.chunks[self.verified * self.groups].tokens)
            self.verified += 1
