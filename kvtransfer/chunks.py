"""How a hand-off is cut: the chunk grid, and what the digests of each chunk are seeded with.

Pure, without torch and numpy. Both workers derive the same grid and the same seeds from the same `Begin`, so neither
is ever sent. The grid begins at the hand-off's own start; only the last chunk may be shorter.

    start        start+chunk_tokens                          end
      |-- chunk 0 --|-- chunk 1 --|-- ... --|-- last (shorter) --|
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import xxhash

from kvtransfer.digest import chunk_seed

SLOT_LIMIT_BYTES = 16 << 20


class Chunk(NamedTuple):
    """The tokens first_token .. first_token+tokens-1 of a prompt."""

    first_token: int
    tokens: int


def chunk_tokens_for(
    token_bytes: int, block_sizes: Iterable[int], wanted: int, slot_limit_bytes: int = SLOT_LIMIT_BYTES
) -> int:
    """The chunk length in tokens: at most `wanted`, at most a slot, and whole blocks of every side where that fits.

    Whole blocks of both sides (a multiple of all `block_sizes`) spare partial blocks at every seam. Where not even one
    such multiple fits, whole blocks of the largest side, else whatever fits: partial blocks are slower, never wrong.
    Raises ValueError when one token does not fit into a slot or an argument is not positive.
    """
    sizes = list(block_sizes)
    if token_bytes <= 0 or wanted <= 0 or not sizes or min(sizes) <= 0:
        raise ValueError(
            f"token_bytes={token_bytes}, wanted={wanted}, block_sizes={sizes}: all must be positive"
        )
    most = min(wanted, slot_limit_bytes // token_bytes)
    if most < 1:
        raise ValueError(
            f"one token's KV ({token_bytes} bytes) does not fit into a slot of {slot_limit_bytes} bytes"
        )
    for unit in (math.lcm(*sizes), max(sizes)):
        if unit <= most:
            return most - most % unit
    return most


def chunks(start: int, end: int, chunk_tokens: int) -> list[Chunk]:
    """The grid over positions start .. end-1, in order; empty if start == end.

    Raises ValueError when 0 <= start <= end and chunk_tokens > 0 do not hold.
    """
    if not 0 <= start <= end or chunk_tokens <= 0:
        raise ValueError(f"no chunk grid over {start}..{end} in steps of {chunk_tokens}")
    return [Chunk(first, min(chunk_tokens, end - first)) for first in range(start, end, chunk_tokens)]


def seeds(tokens: Sequence[int], salt: str, start: int, chunk_tokens: int) -> list[int]:
    """The seed of every chunk of `chunks(start, len(tokens), chunk_tokens)`, in order; one pass, O(prompt).

    KV at a position depends on all tokens before it. So chunk i's seed commits to the salt and to all token ids from 0
    to the chunk's end, besides the chunk's own tokens. A piece of the chunk adds its layers and heads
    (`digest.piece_seed`): bytes of another prompt, another place or other heads never pass for a piece's, even where
    they are unharmed. `tokens` are ids of 32 bits.
    """
    grid = chunks(start, len(tokens), chunk_tokens)
    salt_bytes = salt.encode()
    chain = xxhash.xxh3_128(len(salt_bytes).to_bytes(8, "little") + salt_bytes)
    hashed = 0
    result = []
    for first, count in grid:
        chain.update(_ids_as_bytes(tokens[hashed : first + count]))
        hashed = first + count
        result.append(chunk_seed(chain.digest(), first, count))
    return result


def _ids_as_bytes(tokens: Sequence[int]) -> bytes:
    """32-bit little-endian; OverflowError for an id which does not fit."""
    ids = array("I", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()
