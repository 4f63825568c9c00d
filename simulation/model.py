"""A model whose KV can be checked: the KV of a position is a hash of all tokens up to it, and so is what is drawn.

Therefore each request's answer is a pure function of its prompt, however it travelled, and a step that reads KV which
is unwritten, stale, foreign or misplaced is caught on the spot.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
import numpy.typing as npt

from engine.api import EndReason, SamplingParams
from engine.plan import StepPlan, StepResult
from engine.sequence import Sequence

VOCABULARY = 40
KV_BYTES = 8  # one int64 for each token
UNWRITTEN = -1
_MASK = (1 << 62) - 1

Kv = npt.NDArray[np.int64]


class WrongKv(AssertionError):
    """A step would have computed from KV that is not that of its sequence."""


def mix(state: int, value: int) -> int:
    state = ((state ^ value) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & _MASK
    return (state ^ state >> 29) & _MASK


def kv_of(tokens: list[int], salt: str, known: list[int]) -> list[int]:
    """Extends `known`, the KV of the first positions, to all of `tokens`."""
    previous = known[-1] if known else mix(crc32(salt.encode()), 0)
    for token in tokens[len(known) :]:
        previous = mix(previous, token)
        known.append(previous)
    return known


def draw(kv: int, sampling: SamplingParams, position: int) -> int:
    """The token at `position`, from the KV of the one before it: the same wherever and whenever it is drawn."""
    noise = mix(mix(sampling.seed, sampling.choice), position) if sampling.temperature else 0
    return (mix(kv, noise) >> 20) % VOCABULARY


def right_answer(prompt: list[int], sampling: SamplingParams, salt: str) -> tuple[list[int], EndReason]:
    """What every worker must answer."""
    tokens, drawn, kv = list(prompt), [], list[int]()
    while True:
        token = draw(kv_of(tokens, salt, kv)[-1], sampling, len(tokens))
        tokens.append(token)
        drawn.append(token)
        if token in sampling.stop_token_ids:
            return drawn, "stop"
        if len(drawn) == sampling.max_tokens:
            return drawn, "length"


class Model:
    """The KV pool of one worker, [blocks, block_size], and the runner over it."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool: Kv = np.full((blocks, block_size), UNWRITTEN, dtype=np.int64)

    def run(self, plan: StepPlan, sequences: list[Sequence]) -> StepResult:
        """Computes a step; raises WrongKv when what it would read is not what `sequences` demand."""
        sampled = []
        for source, target in plan.copies:
            self.pool[target] = self.pool[source]
        for row, sequence in zip(plan.rows, sequences, strict=True):
            end = row.start + len(row.tokens)
            if row.tokens != sequence.tokens[row.start : end]:
                raise WrongKv(f"{sequence.request}: the row has other tokens than its sequence")
            kv = kv_of(sequence.tokens[:end], sequence.salt, [])
            ids = row.block_table.ids
            if len(ids) * self.block_size < end:
                raise WrongKv(f"{sequence.request}: {len(ids)} blocks for {end} tokens")
            found = self.pool[ids].reshape(-1)[: row.start]
            wrong = np.flatnonzero(found != np.array(kv[: row.start], dtype=np.int64))
            if len(wrong):
                raise WrongKv(f"{sequence.request}: KV of position {wrong[0]} of {row.start} is not its own")
            for position in range(row.start, end):
                self.pool[ids[position // self.block_size], position % self.block_size] = kv[position]
            sampled.append(draw(kv[-1], row.sampling, end) if row.sampling else -1)
        return StepResult(sampled)

    def gather(self, blocks: list[int], blocks_start: int, first: int, tokens: int) -> Kv:
        begin = first - blocks_start
        return self.pool[blocks].reshape(-1)[begin : begin + tokens].copy()

    def scatter(self, blocks: list[int], blocks_start: int, first: int, payload: Kv) -> None:
        for position, value in enumerate(payload, first - blocks_start):
            self.pool[blocks[position // self.block_size], position % self.block_size] = value
