"""The contract between the scheduler and the runner: what one step computes, and what came of it.

The scheduler writes a `StepPlan`, the runner turns it into tensors and gives back a `StepResult`. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.api import Logprobs, SamplingParams


class BlockTable:
    """The ids of a sequence's KV blocks, in order: a growing int32 array, so that the runner never converts lists.

    It only grows, until it is cleared and starts anew: `lives` counts that, so that who has seen a part of it knows.
    """

    __slots__ = ("__weakref__", "_ids", "_length", "lives")

    def __init__(self) -> None:
        self._ids: npt.NDArray[np.int32] = np.empty(16, dtype=np.int32)
        self._length = 0
        self.lives = 0

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """A view of the block ids, shape [blocks]."""
        return self._ids[: self._length]

    def extend(self, blocks: list[int]) -> None:
        end = self._length + len(blocks)
        if end > len(self._ids):
            grown = np.empty(max(end, 2 * len(self._ids)), dtype=np.int32)
            grown[: self._length] = self.ids
            self._ids = grown
        self._ids[self._length : end] = blocks
        self._length = end

    def clear(self) -> list[int]:
        """Empties the table and returns what it held."""
        blocks: list[int] = self.ids.tolist()
        self._length = 0
        self.lives += 1
        return blocks


@dataclass(slots=True)
class Row:
    """One sequence's part of a step: compute `tokens` at positions start .. start+len(tokens)-1.

    Their KV goes into the blocks of `block_table`, where the KV of positions 0 .. start-1 already is. With `sampling`
    set, one token is drawn from the logits after the last of them; its position is start+len(tokens).

    `history` is the sequence's own list of all tokens up to there, for penalties: not a copy, not to be changed.
    With `targets`, the log-probability of each of them is wanted, the first after tokens[scored_from], and so on.
    """

    start: int
    tokens: list[int]
    block_table: BlockTable
    sampling: SamplingParams | None
    history: list[int] = field(default_factory=list)
    prompt_length: int = 0
    targets: list[int] = field(default_factory=list)
    scored_from: int = 0
    top: int = 0  # likeliest tokens beside each target


@dataclass(slots=True)
class StepPlan:
    """One step; usually rows of a single token (decodes) come first, but nothing may rely on it.

    Before the rows, the KV of block `source` is copied into block `target` for each of `copies`.
    """

    step: int
    rows: list[Row] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source, target)

    @property
    def token_count(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(slots=True)
class StepResult:
    """`sampled[i]` is the token drawn for `rows[i]`, or -1 where the row samples nothing.

    `logprobs[i]` and `scores[i]` are those of the drawn token and of the targets, for the rows that ask.
    """

    sampled: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    scores: dict[int, Logprobs] = field(default_factory=dict)
