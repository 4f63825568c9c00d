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
    blocks: list[int] | None = None


@dataclass(slots=True)
class Handoff:
    """An open hand-off. `seeds[i]` commits the digest of `chunks[i]` to the whole prefix before its end."""

    handoff_id: int
    peer: str
    epoch: int
    sequence: Sequence
    plan: Plan
    chunks: list[Chunk]
    seeds: list[int]
    began: float
    deadline: float
    credited: int = 0  # leading chunks for which a lease was granted
    verified: int = 0  # leading chunks whose KV is in the sequence's blocks
    landing: dict[int, Landing] = field(default_factory=dict)
    ready: dict[int, list[int]] = field(default_factory=dict)  # verified, but an earlier chunk is missing
    size_bytes: int = 0
    done: Done | None = None  # came before the last copy was verified

    @property
    def complete(self) -> bool:
        return self.verified == len(self.chunks)

    @property
    def outstanding(self) -> int:
        """Chunks credited and neither verified nor in order yet."""
        return self.credited - self.verified

    def expected(self, chunk: int) -> tuple[int, int]:
        """How many pieces a chunk is written in, and their bytes together."""
        pieces = self.plan.pieces(chunk, self.chunks[chunk].tokens)
        return len(pieces.size_bytes), int(pieces.size_bytes.sum())

    def chunk_blocks(self, ledger: BlockLedger, chunk: int) -> int:
        """Blocks that a chunk needs; chunks begin on block boundaries."""
        return ledger.blocks_for(self.chunks[chunk].tokens)

    def remaining_blocks(self, ledger: BlockLedger) -> int:
        """Blocks still to be taken until the prompt is complete."""
        have = sum(len(blocks) for blocks in self.ready.values())
        have += sum(len(landing.blocks) for landing in self.landing.values() if landing.blocks)
        last = self.chunks[-1]
        return ledger.blocks_for(last.first_token + last.tokens) - len(self.sequence.block_table) - have

    def accept(self, ledger: BlockLedger, chunk: int) -> None:
        """The chunk's copy was verified: its blocks join the sequence as soon as all before it have."""
        landing = self.landing.pop(chunk)
        assert landing.blocks is not None
        ledger.landed(landing.blocks)
        self.ready[chunk] = landing.blocks
        self.size_bytes += landing.done.size_bytes
        while self.verified in self.ready:
            self.sequence.block_table.extend(self.ready.pop(self.verified))
            self.sequence.advance(ledger, self.chunks[self.verified].tokens)
            self.verified += 1
