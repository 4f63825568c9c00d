"""Descriptor rows straight from the KV pool, where it lies in the registered staging region. Pure, numpy only.

The wire wants the tokens of one head together. The pool has them together as far as its layout and its block ids do:
so a piece becomes one row for each head, layer, k/v and run of tokens. Few rows when a rank stores one head and the
blocks are neighbours; one row a token when it stores several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvtransfer.transport import Rows

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PoolPlace:
    """Where a rank's pool lies in the staging region: offsets and strides in bytes, the same for each layer."""

    layers: tuple[int, ...]  # offset of each layer
    num_blocks: int
    block_size: int
    kv_stride: int
    block_stride: int
    token_stride: int
    head_stride: int
    head_bytes: int


@dataclass(frozen=True, slots=True)
class Runs:
    """Where some tokens of one head lie within k or v of a layer: `starts[i]` for `sizes[i]` bytes, in token order."""

    starts: Ints
    sizes: Ints

    def __len__(self) -> int:
        return len(self.starts)


def runs(place: PoolPlace, blocks: Sequence[int], blocks_start: int, first_token: int, tokens: int) -> Runs:
    """The runs of positions first_token .. first_token+tokens-1; arguments and errors as in `layout.gather`."""
    size = place.block_size
    if tokens <= 0 or blocks_start % size or not 0 <= blocks_start <= first_token:
        raise ValueError(
            f"no chunk: {tokens} tokens at {first_token}, blocks of {size} tokens that start at {blocks_start}"
        )
    begin = first_token - blocks_start
    if len(blocks) * size < begin + tokens:
        raise ValueError(
            f"blocks hold positions {blocks_start}..{blocks_start + len(blocks) * size}, the chunk is "
            f"{first_token}+{tokens}"
        )
    first, end = begin // size, -(-(begin + tokens) // size)
    ids = np.array(blocks[first:end], dtype=np.int64)
    if ids.min() < 0 or ids.max() >= place.num_blocks:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"block {wrong} is not in a pool of {place.num_blocks}")
    starts = ids * place.block_stride
    skipped, unused = begin - first * size, end * size - begin - tokens
    if place.token_stride == place.head_bytes:
        sizes = np.full(len(ids), size * place.head_bytes, dtype=np.int64)
        starts[0] += skipped * place.token_stride
        sizes[0] -= skipped * place.head_bytes
        sizes[-1] -= unused * place.head_bytes
    else:
        within = np.arange(size, dtype=np.int64) * place.token_stride
        starts = (starts[:, None] + within).reshape(-1)[skipped : len(ids) * size - unused]
        sizes = np.full(tokens, place.head_bytes, dtype=np.int64)
    new = np.flatnonzero(starts[1:] != starts[:-1] + sizes[:-1]) + 1
    if len(new) == len(starts) - 1:
        return Runs(starts, sizes)
    edges = np.concatenate(([0], new))
    return Runs(starts[edges], np.add.reduceat(sizes, edges))


def rows(place: PoolPlace, found: Runs, heads: range, landing: int) -> Rows:
    """The rows of one piece: `heads` (the rank's own count) of the tokens in `found`, to `landing` in the peer's
    memory, in wire order."""
    base = _bases(place, heads)
    result = np.empty((base.size, len(found), 3), dtype=np.uint64)
    np.add(base, found.starts, out=result[:, :, 0], casting="unsafe")
    result[:, :, 2] = found.sizes
    ends = np.cumsum(found.sizes)
    before = np.arange(landing, landing + base.size * int(ends[-1]), int(ends[-1]), dtype=np.int64)
    np.add(before[:, None], ends - found.sizes, out=result[:, :, 1], casting="unsafe")
    return result.reshape(-1, 3)


@lru_cache(maxsize=64)
def _bases(place: PoolPlace, heads: range) -> Ints:
    """Where each head, layer, k/v of the wire's order begins, [heads * layers * 2, 1]."""
    by_head = np.arange(heads.start, heads.stop, dtype=np.int64)[:, None, None] * place.head_stride
    by_layer = np.array(place.layers, dtype=np.int64)[:, None] + np.array(
        [0, place.kv_stride], dtype=np.int64
    )
    return (by_head + by_layer).reshape(-1, 1)
