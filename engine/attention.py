"""Attention of a mixed batch over the paged cache, in plain torch: the reference, and the way of the CPU.

`AttentionPlan.build` turns one step's rows into index tensors once; `PagedAttention` uses them in every layer. Decode
rows (one query token) of similar length are computed together: whole blocks are gathered with one index_select and the
query heads that share a kv head are folded into the query axis (`enable_gqa` is 6 times slower in bf16 on a CPU).
A prefill row is computed alone, in tiles of queries, each against just the context that it may see.

    tokens of a step:   [ decode rows, sorted by length | prefill row | prefill row | ... ]
    a group's gather:   row 0  [k k k k k k k . | p p p p]      . stale slot of the last block: zeroed and masked
                        row 1  [k k k k k k k k | k k . .]      p padding (the row's own first block): masked

A stale slot may hold anything, NaN too, once its block has belonged to somebody else; 0 * NaN is NaN, so a mask alone
would not keep it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

_ALIKE_TOKENS = (
    128  # contexts up to this are grouped whatever their ratio: padding is cheaper than one more call
)
_SHORT_CONTEXT, _SHORT_TILE, _LONG_TILE = (
    512,
    64,
    256,
)  # measured: small tiles skip more of a short causal triangle

GATHER_BYTES = 4 << 20  # of one decode group's keys and values on a CPU: more does not stay in its caches

IntArray = npt.NDArray[np.int32]


@dataclass(slots=True)
class DecodeGroup:
    """Decode rows first .. last-1, padded to the longest context of the group."""

    first: int
    last: int
    context: int  # of the longest row
    blocks: torch.Tensor  # [rows * blocks each], int32
    mask: torch.Tensor | None  # [rows, 1, 1, context], 0 or -inf; None when all rows are equally long
    stale: torch.Tensor | None  # gathered slots that this row never wrote, int64


@dataclass(slots=True)
class PrefillSpan:
    """Tokens first .. last-1 are positions start .. of one sequence."""

    first: int
    last: int
    start: int
    blocks: torch.Tensor | None  # [blocks], int32; None when start is 0: all it sees is in the step itself


@dataclass(slots=True)
class AttentionPlan:
    """Where the step's tokens write (`slots` [tokens], int64) and what they read."""

    slots: torch.Tensor
    groups: list[DecodeGroup] = field(default_factory=list)
    spans: list[PrefillSpan] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        starts: Sequence[int],
        counts: Sequence[int],
        tables: Sequence[IntArray],
        decodes: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        gather_tokens: int = 1 << 40,
    ) -> AttentionPlan:
        """Plans rows of `counts` tokens from position `starts` on, whose block ids are `tables`.

        The first `decodes` rows have one token each and come in ascending order of `starts`; they are cut into groups
        of at most `gather_tokens` padded context tokens (or one row).
        """
        slots = np.empty(sum(counts), dtype=np.int64)
        for row in range(decodes):
            slots[row] = int(tables[row][starts[row] // block_size]) * block_size + starts[row] % block_size
        spans, first = [], decodes
        for row in range(decodes, len(counts)):
            start, last = starts[row], first + counts[row]
            positions = np.arange(start, start + counts[row])
            slots[first:last] = tables[row][positions // block_size].astype(np.int64) * block_size
            slots[first:last] += positions % block_size
            blocks = tables[row][: -(-(start + counts[row]) // block_size)].copy() if start else None
            spans.append(PrefillSpan(first, last, start, None if blocks is None else _tensor(blocks, device)))
            first = last
        contexts = np.asarray(starts[:decodes], dtype=np.int64) + 1
        groups = [
            _decode_group(first, last, contexts[first:last], tables[first:last], block_size, dtype, device)
            for first, last in _similar(contexts, gather_tokens)
        ]
        return cls(_tensor(slots, device), groups, spans)


def _similar(contexts: npt.NDArray[np.int64], gather_tokens: int) -> list[tuple[int, int]]:
    """Cuts ascending context lengths into ranges whose longest is at most twice the shortest, or short anyway."""
    ranges: list[tuple[int, int]] = []
    last = len(contexts)
    while last:
        longest = int(contexts[last - 1])
        floor = 0 if longest <= _ALIKE_TOKENS else -(-longest // 2)
        first = max(int(np.searchsorted(contexts[:last], floor)), last - max(1, gather_tokens // longest))
        ranges.append((first, last))
        last = first
    return ranges[::-1]


def _decode_group(
    first: int,
    last: int,
    contexts: npt.NDArray[np.int64],
    tables: Sequence[IntArray],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecodeGroup:
    used = -(-contexts // block_size)
    width, longest = int(used[-1]), int(contexts[-1])
    blocks = np.empty((last - first, width), dtype=np.int32)
    for row, (table, count) in enumerate(zip(tables, used.tolist(), strict=True)):
        blocks[row, :count] = table[:count]
        blocks[row, count:] = table[0]
    mask = stale = None
    if contexts[0] != longest:
        positions = np.arange(width * block_size)
        beyond = positions >= contexts[:, None]
        added = np.where(beyond[:, None, None, :longest], np.float32(-math.inf), np.float32(0))
        mask = _tensor(added, device).to(dtype)
        # Padding repeats the row's first block, which is full, and so clean, unless it is the only one.
        dirty = (positions < (used * block_size)[:, None]) | (used == 1)[:, None]
        stale = _tensor(np.flatnonzero(beyond & dirty), device)
    return DecodeGroup(first, last, longest, _tensor(blocks.reshape(-1), device), mask, stale)


def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


class PagedAttention:
    """Computes attention as planned. Keeps two buffers between calls: fresh memory would cost as much as the maths."""

    def __init__(self) -> None:
        self._gathered = torch.empty(0)
        self._causal = torch.empty(0)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """q [tokens, heads, dim] against one layer's cache [2, blocks, block_size, kv_heads, dim] -> like q.

        k, v [tokens, kv_heads, dim] are the step's own, already written to the cache.
        """
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in plan.groups:
            out[group.first : group.last] = self._decode(q[group.first : group.last], cache, group)
        for span in plan.spans:
            part = slice(span.first, span.last)
            if span.blocks is None:
                self._prefill(q[part], k[part], v[part], 0, out[part])
            else:
                context = span.start + span.last - span.first
                both = self._gather(cache, span.blocks).view(2, -1, *cache.shape[3:])
                self._prefill(q[part], both[0, :context], both[1, :context], span.start, out[part])
        return out

    def _decode(self, q: torch.Tensor, cache: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        rows, heads, dim = q.shape
        kv_heads = cache.shape[3]
        both = self._gather(cache, group.blocks)
        if group.stale is not None:
            both.view(2, -1, kv_heads, dim).index_fill_(1, group.stale, 0)
        k, v = both.view(2, rows, -1, kv_heads, dim)[:, :, : group.context].transpose(2, 3).unbind(0)
        folded = q.reshape(rows, kv_heads, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=group.mask).reshape(rows, heads, dim)

    def _prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, out: torch.Tensor
    ) -> None:
        """q [n, heads, dim] at positions start .. against k, v [start + n, kv_heads, dim], into `out` (like q)."""
        count, heads, dim = q.shape
        context, kv_heads, _ = k.shape
        group = heads // kv_heads
        # kv heads as the batch, the query heads of each as its heads: keys are shared through a stride of 0.
        queries = q.reshape(count, kv_heads, group, dim).permute(1, 2, 0, 3)
        keys = k.transpose(0, 1).unsqueeze(1).expand(kv_heads, group, context, dim)
        values = v.transpose(0, 1).unsqueeze(1).expand(kv_heads, group, context, dim)
        target = out.view(count, kv_heads, group, dim).permute(1, 2, 0, 3)
        if start == 0 and count > _SHORT_CONTEXT:
            target.copy_(F.scaled_dot_product_attention(queries, keys, values, is_causal=True))
            return
        tile = _SHORT_TILE if context <= _SHORT_CONTEXT else _LONG_TILE
        for first in range(0, count, tile):
            last = min(count, first + tile)
            seen = start + last
            mask = self._causal_mask(last - first, seen, q)
            part = F.scaled_dot_product_attention(
                queries[:, :, first:last], keys[:, :, :seen], values[:, :, :seen], attn_mask=mask
            )
            target[:, :, first:last] = part

    def _causal_mask(self, count: int, seen: int, like: torch.Tensor) -> torch.Tensor:
        """[count, seen] of 0 and -inf: the last `count` of `seen` positions look back. A slice of one wide strip.

        strip[r, c] is 0 where c <= width - tile + r: any pair (count, seen) is a window that ends where its last query
        may see everything.
        """
        strip = self._causal
        if (
            strip.dtype != like.dtype
            or strip.device != like.device
            or strip.numel() == 0
            or strip.shape[1] < seen
        ):
            width = max(2 * _LONG_TILE, 1 << (seen - 1).bit_length())
            strip = torch.full((_LONG_TILE, width), -math.inf, dtype=like.dtype, device=like.device)
            self._causal = strip.triu_(width - _LONG_TILE + 1)
        width = self._causal.shape[1]
        rows = self._causal[_LONG_TILE - count :]
        return rows[:, width - seen :]

    def _gather(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """The named blocks [2, n, block_size, kv_heads, dim] of a layer, in a buffer that the next call overwrites."""
        shape = (2, len(blocks), *cache.shape[2:])
        size = math.prod(shape)
        buffer = self._gathered
        if buffer.numel() < size or buffer.dtype != cache.dtype or buffer.device != cache.device:
            buffer = self._gathered = torch.empty(size + size // 2, dtype=cache.dtype, device=cache.device)
        return torch.index_select(cache, 1, blocks, out=buffer[:size].view(shape))
