"""A model whose KV can be checked: the KV of a position is a hash of all tokens up to it, and so is what is drawn.

A worker of several ranks has a pool in each, with the kv heads of that rank; each head has words of its own. Each
request's answer is a pure function of its prompt, however it travelled, and a step that reads KV which is unwritten,
stale, foreign or misplaced is caught on the spot.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from zlib import crc32

import numpy as np
import numpy.typing as npt

from engine.api import EndReason, SamplingParams
from engine.plan import StepPlan, StepResult
from engine.sequence import Sequence

VOCABULARY = 40
KV_BYTES = 8  # one int64 for each token and head: one layer, k and v of one float32 each
UNWRITTEN = -1
_REMEMBERED = 256
_MASK = (1 << 62) - 1

Kv = npt.NDArray[np.int64]
ONE_HEAD = (range(1),)


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


def of_heads(kv: Kv, heads: range) -> Kv:
    """[tokens] -> [tokens, heads]: no two heads have the same word, so that a misplaced one shows."""
    return kv[:, None] ^ (np.arange(heads.start, heads.stop, dtype=np.int64) * 0x1F3D5B79A8C6E5)


class _Known:
    """The KV of sequences that run, so that each token is hashed once and not in every step."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Sequence, list[int]]] = {}  # by id of the sequence, which is kept alive

    def kv(self, sequence: Sequence, end: int) -> Kv:
        """Of its first `end` tokens."""
        found = self._of.get(id(sequence))
        if found is None:
            if len(self._of) >= _REMEMBERED:
                self._of.clear()
            found = self._of[id(sequence)] = sequence, []
        known = found[1]
        if len(known) < end:
            kv_of(sequence.tokens[:end], sequence.salt, known)
        return np.array(known[:end], dtype=np.int64)


class Model:
    """The KV pools of one worker's ranks, [blocks, block_size, the rank's kv heads], and the runner over them."""

    def __init__(self, blocks: int, block_size: int, heads: Many[range] = ONE_HEAD) -> None:
        self.block_size = block_size
        self.heads = heads
        self._known = _Known()
        self.pools: list[Kv] = [
            np.full((blocks, block_size, len(mine)), UNWRITTEN, dtype=np.int64) for mine in heads
        ]

    def run(self, plan: StepPlan, sequences: list[Sequence]) -> StepResult:
        """Computes a step; raises WrongKv when what it would read is not what `sequences` demand."""
        sampled = []
        for source, target in plan.copies:
            for pool in self.pools:
                pool[target] = pool[source]
        for row, sequence in zip(plan.rows, sequences, strict=True):
            end = row.start + len(row.tokens)
            if row.tokens != sequence.tokens[row.start : end]:
                raise WrongKv(f"{sequence.request}: the row has other tokens than its sequence")
            kv = self._known.kv(sequence, end)
            ids = row.block_table.ids
            if len(ids) * self.block_size < end:
                raise WrongKv(f"{sequence.request}: {len(ids)} blocks for {end} tokens")
            at = np.arange(end)
            blocks, offsets = ids[at // self.block_size], at % self.block_size
            for rank, pool in enumerate(self.pools):
                right = of_heads(kv, self.heads[rank])
                found = pool[blocks[: row.start], offsets[: row.start]]
                wrong = np.flatnonzero((found != right[: row.start]).any(axis=1))
                if len(wrong):
                    where = f"position {wrong[0]} of {row.start}, rank {rank}"
                    raise WrongKv(f"{sequence.request}: KV of {where}, is not its own")
                pool[blocks[row.start :], offsets[row.start :]] = right[row.start :]
            sampled.append(draw(int(kv[-1]), row.sampling, end) if row.sampling else -1)
        return StepResult(sampled)

    def gather(
        self,
        blocks: list[int],
        blocks_start: int,
        first: int,
        tokens: int,
        rank: int = 0,
        heads: range = range(1),
    ) -> Kv:
        """[heads, tokens] out of the rank's pool, as in a piece."""
        begin, local = first - blocks_start, self.heads[rank].start
        pool = self.pools[rank][blocks, :, heads.start - local : heads.stop - local]
        return pool.reshape(-1, len(heads))[begin : begin + tokens].T.copy()

    def scatter(
        self, blocks: list[int], blocks_start: int, first: int, payload: Kv, rank: int = 0, head: int = 0
    ) -> None:
        """The other way: `payload` begins with this head."""
        heads, tokens = payload.shape
        at = np.arange(first - blocks_start, first - blocks_start + tokens)
        ids, local = np.array(blocks)[at // self.block_size], head - self.heads[rank].start
        self.pools[rank][ids, at % self.block_size, local : local + heads] = payload.T
