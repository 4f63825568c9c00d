"""Prompts for the requests of a trace, such that shared prefixes repeat token for token. Pure.

The token at a place is a function of (salt, block id, place in the block), or of (salt, request, place) where no block
says what is there. So nothing is stored, the same trace gives the same prompts, and another salt gives prompts of the
same lengths and sharing of which no server has anything cached. `TokenPrompts` gives ids, `WordPrompts` gives text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.traces import Trace, TraceRequest

FIRST_ID = 100  # below are special tokens, in most vocabularies
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

# Short and common: one token each, with the space before it, in most vocabularies.
_COMMON = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were her all she there would their we him been has when who will more no if out so said what
up its about into than them can only other new some could time these two may then do first any my now such
like our over man me even most made after also did many before must through back years where much your way
well down should because each just those people how too little state good very make world still own see men
work long get here between both life being under never day same another know while last might us great old
year off
"""
WORDS = tuple(_COMMON.split())


@dataclass(frozen=True, slots=True)
class TokenPrompts:
    """Token ids in [first_id, end_id), exactly as many as the trace says."""

    trace: Trace
    end_id: int
    first_id: int = FIRST_ID
    salt: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.first_id < self.end_id:
            raise ValueError(f"token ids from {self.first_id} up to {self.end_id} are none")

    def build(self, request: TraceRequest) -> list[int]:
        """The prompt of one request of the trace."""
        noise = _noise(self.salt, self.trace, request, 1.0, request.input_tokens)
        ids: list[int] = (self.first_id + noise % np.uint64(self.end_id - self.first_id)).tolist()
        return ids


@dataclass(frozen=True, slots=True)
class WordPrompts:
    """Text that a server tokenizes to about the length that the trace says.

    `tokens_per_word` and `extra_tokens` (begin of text, chat template) are measured at the server, see `fit_words`.
    """

    trace: Trace
    tokens_per_word: float = 1.0
    extra_tokens: float = 0.0
    salt: str = ""

    def __post_init__(self) -> None:
        if not self.tokens_per_word > 0:
            raise ValueError(f"a word must have more than 0 tokens, not {self.tokens_per_word}")

    def build(self, request: TraceRequest) -> str:
        words = max(1, round((request.input_tokens - self.extra_tokens) / self.tokens_per_word))
        return words_of(_noise(self.salt, self.trace, request, self.tokens_per_word, words))


def fit_words(few: tuple[int, int], many: tuple[int, int]) -> tuple[float, float]:
    """(tokens a word, extra tokens) from two prompts, each (words, tokens that the server counted)."""
    slope = (many[1] - few[1]) / (many[0] - few[0])
    if slope <= 0:
        raise ValueError(
            f"{few[0]} words were counted as {few[1]} tokens and {many[0]} words as {many[1]}: prompts cannot be "
            "made to a length by this server's usage figures"
        )
    return slope, few[1] - slope * few[0]


def sample_words(count: int, salt: str) -> str:
    """A text of so many words, for measuring tokens a word."""
    return words_of(_stream(f"{salt}/sample", count))


def words_of(noise: NDArray[np.uint64]) -> str:
    return " ".join([WORDS[index] for index in (noise % np.uint64(len(WORDS))).tolist()])


def _noise(
    salt: str, trace: Trace, request: TraceRequest, tokens_each: float, units: int
) -> NDArray[np.uint64]:
    """A number for each unit (a token, or a word of `tokens_each`) of the prompt: [units], uint64."""
    parts, start = [], 0
    for block, edge in zip(
        request.blocks, trace.edges(request), strict=False
    ):  # scaled down, some edges coincide
        end = min(units, round(edge / tokens_each))
        if end > start:
            parts.append(_stream(f"{salt}/block/{block}", end - start))
            start = end
    if units > start:
        parts.append(_stream(f"{salt}/request/{request.number}", units - start))
    return np.concatenate(parts)


def _stream(name: str, count: int) -> NDArray[np.uint64]:
    """The first `count` numbers of a stream that its name determines: splitmix64 from a hash of the name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    base = np.uint64(int.from_bytes(digest, "little"))
    with np.errstate(over="ignore"):
        z = base + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
