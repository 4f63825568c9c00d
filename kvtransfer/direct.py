"""Descriptor rows straight from the KV pool, where it lies in the registered staging region. Pure, numpy only.

The wire wants the tokens of one head together. The pool has them together as far as its layout and its block ids do:
so a piece becomes one row for each head, layer, k/v and run of tokens. Few rows when a rank stores one head and the
blocks are neighbours; one row a token when it stores several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtransfer.rows import merged
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
    if place.token_stride == place.head_bytes:
        at = np.arange(begin // size, -(-(begin + tokens) // size), dtype=np.int64) * size
        edges = np.clip(np.append(at, at[-1] + size), begin, begin + tokens)
        at, sizes = edges[:-1], np.diff(edges) * place.head_bytes
    else:
        at = np.arange(begin, begin + tokens, dtype=np.int64)
        sizes = np.full(tokens, place.head_bytes, dtype=np.int64)
    ids = np.asarray(blocks, dtype=np.int64)[at // size]
    if ids.min() < 0 or ids.max() >= place.num_blocks:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"block {wrong} is not in a pool of {place.num_blocks}")
    starts = ids * place.block_stride + at % size * place.token_stride
    first = np.flatnonzero(np.concatenate(([True], starts[1:] != starts[:-1] + sizes[:-1])))
    return Runs(starts[first], np.add.reduceat(sizes, first))


def rows(place: PoolPlace, found: Runs, heads: range, landing: int) -> Rows:
    """The rows of one piece: `heads` (the rank's own count) of the tokens in `found`, to `landing` in the peer's
    memory, in wire order."""
    base = (
        np.arange(heads.start, heads.stop, dtype=np.int64)[:, None, None] * place.head_stride
        + np.array(place.layers, dtype=np.int64)[:, None]
        + np.array([0, place.kv_stride], dtype=np.int64)
    ).reshape(-1, 1)
    result = np.empty((base.size, len(found), 3), dtype=np.uint64)
    result[:, :, 0] = base + found.starts
    result[:, :, 2] = found.sizes
    total = int(found.sizes.sum())
    before = landing + np.arange(base.size, dtype=np.int64)[:, None] * total
    result[:, :, 1] = before + (np.cumsum(found.sizes) - found.sizes)
    return merged(result.reshape(-1, 3))
