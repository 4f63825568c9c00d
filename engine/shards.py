"""What one rank of a tensor-parallel replica holds: which heads, columns and vocabulary rows.

Pure arithmetic, asked by the weights, the KV cache, the sizing and the transfer plan, so that all of them agree
without talking. Rank r of tp owns query heads floor(r H / tp) .. floor((r + 1) H / tp) and stores the kv heads that
these touch: with more ranks than kv heads, or heads that do not divide evenly, several ranks store the same one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `tp`. Ranges are contiguous; those of all ranks together cover everything, in rank order."""

    rank: int
    tp: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.tp:
            raise ValueError(f"rank={self.rank} of tensor_parallel={self.tp}: expected 0 .. {self.tp - 1}")

    def part(self, count: int, what: str = "columns") -> range:
        """This rank's part of `count` things, each owned once: intermediate columns, vocabulary rows.

        ValueError when there are fewer of them than ranks; `what` names them there.
        """
        if self.tp > count:
            raise ValueError(f"tensor_parallel={self.tp} is more than the model's {count} {what}")
        return range(self.rank * count // self.tp, (self.rank + 1) * count // self.tp)

    def q_heads(self, q_heads: int) -> range:
        """The query heads that this rank computes, each computed by one rank. ValueError when tp > q_heads."""
        return self.part(q_heads, "query heads")

    def kv_heads(self, q_heads: int, kv_heads: int) -> range:
        """The kv heads that this rank stores: those that its query heads attend to."""
        own, group = self.q_heads(q_heads), q_heads // kv_heads
        return range(own.start // group, (own.stop - 1) // group + 1)

    def groups(self, q_heads: int, kv_heads: int) -> tuple[range, ...]:
        """For each kv head that this rank stores, the query heads of this rank that attend to it; none is empty."""
        own, group = self.q_heads(q_heads), q_heads // kv_heads
        return tuple(
            range(max(own.start, head * group), min(own.stop, (head + 1) * group))
            for head in self.kv_heads(q_heads, kv_heads)
        )


def shards(tp: int) -> tuple[Shard, ...]:
    """All ranks of a replica."""
    return tuple(Shard(rank, tp) for rank in range(tp))
