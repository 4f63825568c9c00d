"""Attention of a mixed batch over the paged cache, in plain torch: the reference, and the way of the CPU.

`AttentionPlan.build` turns one step's rows into index tensors once; `PagedAttention` uses them in every layer. Decode
rows (one query token) of similar length are computed together: whole blocks are gathered with one index_select and the
query heads that share a kv head are folded into the query axis (`enable_gqa` is 6 times slower in bf16 on a CPU).
A prefill row is computed alone, in tiles of queries, each against just the context that it may see. In a layer with a
sliding window both read only the blocks that reach into the window.

    tokens of a step:   [ decode rows, sorted by length | prefill row | prefill row | ... ]
    a group's gather:   row 0  [k k k k k k k . | p p p p]      . stale slot of the last block: zeroed and masked
                        row 1  [w k k k k k k k | k k . .]      p padding (the row's own first block): masked
                                                                w before the window: masked

A stale slot may hold anything, NaN too, once its block has belonged to somebody else; 0 * NaN is NaN, so a mask alone
would not keep it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Decode rows first .. last-1; each one's gathered blocks are padded to the longest of the group."""

    first: int
    last: int
    low: int  # gathered slots low .. high-1 are attended to, by all rows or but for `mask`
    high: int
    blocks: torch.Tensor  # [rows * blocks each], int32
    mask: torch.Tensor | None  # [rows, 1, 1, high - low], 0 or -inf; None when all rows see all of it
    stale: torch.Tensor | None  # gathered slots that this row never wrote, int64


@dataclass(slots=True)
class PrefillSpan:
    """Tokens first .. last-1 are positions start .. of one sequence."""

    first: int
    last: int
    start: int
    base: int = 0  # position of the first slot of `blocks`
    blocks: torch.Tensor | None = (
        None  # [blocks], int32; None when start is 0: all it sees is in the step itself
    )


@dataclass(slots=True)
class Reads:
    """What the layers of one kind read in this step. `window` is 0 when no row has outgrown it."""

    window: int
    groups: list[DecodeGroup]
    spans: list[PrefillSpan]


@dataclass(slots=True)
class Rows:
    """The rows of one step as the planner sees them; the first `decodes` have one token each, starts ascending."""

    starts: Sequence[int]
    counts: Sequence[int]
    tables: Sequence[IntArray]
    decodes: int
    block_size: int


@dataclass(slots=True)
class AttentionPlan:
    """Where the step's tokens write (`slots` [tokens], int64), and what they read in layers of each window."""

    slots: torch.Tensor
    reads: dict[int, Reads]

    @classmethod
    def build(
        cls,
        rows: Rows,
        dtype: torch.dtype,
        device: torch.device,
        gather_tokens: int = 1 << 40,
        windows: Sequence[int] = (0,),
    ) -> AttentionPlan:
        """Plans the rows for layers of these `windows`, in tokens; 0 is the layers that have none.

        Decode rows are cut into groups of at most `gather_tokens` padded context tokens (or one row).
        """
        slots = _slots(rows, device)  # first, since it finds out whether the tables reach
        longest = max(
            (start + count for start, count in zip(rows.starts, rows.counts, strict=True)), default=0
        )
        built: dict[int, Reads] = {}
        reads = {}
        for window in windows:
            binding = window if window < longest else 0
            if binding not in built:
                groups = _groups(rows, dtype, device, gather_tokens, binding)
                built[binding] = Reads(binding, groups, _spans(rows, device, binding))
            reads[window] = built[binding]
        return cls(slots, reads)


def _slots(rows: Rows, device: torch.device) -> torch.Tensor:
    """The cache slot of each token of the step, int64."""
    size = rows.block_size
    slots = np.empty(sum(rows.counts), dtype=np.int64)
    for row in range(rows.decodes):
        start = rows.starts[row]
        slots[row] = int(rows.tables[row][start // size]) * size + start % size
    first = rows.decodes
    for row in range(rows.decodes, len(rows.counts)):
        positions = np.arange(rows.starts[row], rows.starts[row] + rows.counts[row])
        last = first + rows.counts[row]
        slots[first:last] = rows.tables[row][positions // size].astype(np.int64) * size + positions % size
        first = last
    return _tensor(slots, device)


def _spans(rows: Rows, device: torch.device, window: int) -> list[PrefillSpan]:
    size, first = rows.block_size, rows.decodes
    spans = []
    for row in range(rows.decodes, len(rows.counts)):
        start, last = rows.starts[row], first + rows.counts[row]
        if start == 0:
            spans.append(PrefillSpan(first, last, 0))
        else:
            oldest = max(0, start - window + 1) // size if window else 0
            blocks = rows.tables[row][oldest : -(-(start + rows.counts[row]) // size)].copy()
            spans.append(PrefillSpan(first, last, start, oldest * size, _tensor(blocks, device)))
        first = last
    return spans


def _groups(
    rows: Rows, dtype: torch.dtype, device: torch.device, gather_tokens: int, window: int
) -> list[DecodeGroup]:
    ends = np.asarray(rows.starts[: rows.decodes], dtype=np.int64) + 1
    begins = np.maximum(ends - window, 0) if window else np.zeros_like(ends)
    # Of a windowed row at most this much is gathered; still ascending, as the cutting wants it.
    reach = np.minimum(ends, window + rows.block_size - 1) if window else ends
    return [
        _decode_group(
            first,
            begins[first:last],
            ends[first:last],
            rows.tables[first:last],
            rows.block_size,
            dtype,
            device,
        )
        for first, last in _similar(reach, gather_tokens)
    ]


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
    begins: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    tables: Sequence[IntArray],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecodeGroup:
    """Rows from `first` on, row i attending to positions begins[i] .. ends[i]-1."""
    oldest = begins // block_size
    used = -(-ends // block_size) - oldest
    lows, highs = begins - oldest * block_size, ends - oldest * block_size  # in slots of what is gathered
    width, low, high = int(used.max()), int(lows.min()), int(highs.max())
    blocks = np.empty((len(tables), width), dtype=np.int32)
    for row, (table, skip, count) in enumerate(zip(tables, oldest.tolist(), used.tolist(), strict=True)):
        blocks[row, :count] = table[skip : skip + count]
        blocks[row, count:] = table[skip]
    mask = stale = None
    if highs.min() != high:  # where the ends agree the beginnings do: one window is as long as the other
        slots = np.arange(width * block_size)
        beyond = slots >= highs[:, None]
        hidden = (beyond | (slots < lows[:, None]))[:, None, None, low:high]
        mask = _tensor(np.where(hidden, np.float32(-math.inf), np.float32(0)), device).to(dtype)
        # Padding repeats the row's first block, which is full, and so clean, unless it is the only one.
        dirty = (slots < (used * block_size)[:, None]) | (used == 1)[:, None]
        stale = _tensor(np.flatnonzero(beyond & dirty), device)
    return DecodeGroup(
        first, first + len(tables), low, high, _tensor(blocks.reshape(-1), device), mask, stale
    )


def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


class PagedAttention:
    """Computes attention as planned. Keeps two buffers between calls: fresh memory would cost as much as the maths."""

    def __init__(self) -> None:
        self._gathered = torch.empty(0)
        self._strips: dict[int, torch.Tensor] = {}  # by window

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, reads: Reads
    ) -> torch.Tensor:
        """q [tokens, heads, dim] against one layer's cache [2, blocks, block_size, kv_heads, dim] -> like q.

        k, v [tokens, kv_heads, dim] are the step's own, already written to the cache.
        """
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in reads.groups:
            out[group.first : group.last] = self._decode(q[group.first : group.last], cache, group)
        for span in reads.spans:
            part = slice(span.first, span.last)
            if span.blocks is None:
                self._prefill(q[part], k[part], v[part], reads.window, out[part])
            else:
                known = span.start - span.base + span.last - span.first
                both = self._gather(cache, span.blocks).view(2, -1, *cache.shape[3:])
                self._prefill(q[part], both[0, :known], both[1, :known], reads.window, out[part])
        return out

    def _decode(self, q: torch.Tensor, cache: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        rows, heads, dim = q.shape
        kv_heads = cache.shape[3]
        both = self._gather(cache, group.blocks)
        if group.stale is not None:
            both.view(2, -1, kv_heads, dim).index_fill_(1, group.stale, 0)
        k, v = both.view(2, rows, -1, kv_heads, dim)[:, :, group.low : group.high].transpose(2, 3).unbind(0)
        folded = q.reshape(rows, kv_heads, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=group.mask).reshape(rows, heads, dim)

    def _prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, out: torch.Tensor
    ) -> None:
        """q [n, heads, dim], the last n positions of k, v [context, kv_heads, dim], into `out` (like q)."""
        count, heads, dim = q.shape
        context, kv_heads, _ = k.shape
        group = heads // kv_heads
        # kv heads as the batch, the query heads of each as its heads: keys are shared through a stride of 0.
        queries = q.reshape(count, kv_heads, group, dim).permute(1, 2, 0, 3)
        keys = k.transpose(0, 1).unsqueeze(1).expand(kv_heads, group, context, dim)
        values = v.transpose(0, 1).unsqueeze(1).expand(kv_heads, group, context, dim)
        target = out.view(count, kv_heads, group, dim).permute(1, 2, 0, 3)
        if not window:
            window = context
        if context == count and window >= context > _SHORT_CONTEXT:
            target.copy_(F.scaled_dot_product_attention(queries, keys, values, is_causal=True))
            return
        tile = _SHORT_TILE if min(window, context) <= _SHORT_CONTEXT else _LONG_TILE
        for first in range(0, count, tile):
            last = min(count, first + tile)
            end = context - count + last
            begin = max(0, context - count + first - window + 1)
            mask = self._causal_mask(last - first, end - begin, window if window < context else 0, q)
            part = F.scaled_dot_product_attention(
                queries[:, :, first:last], keys[:, :, begin:end], values[:, :, begin:end], attn_mask=mask
            )
            target[:, :, first:last] = part

    def _causal_mask(self, count: int, seen: int, window: int, like: torch.Tensor) -> torch.Tensor:
        """[count, seen] of 0 and -inf: the last `count` of `seen` positions look back. A slice of one wide strip.

        strip[r, c] is 0 where c <= width - tile + r, and with a window only for the last `window` of these: any pair
        (count, seen) is a cut-out that ends where its last query may see everything.
        """
        strip = self._strips.get(window)
        if strip is None or strip.dtype != like.dtype or strip.device != like.device or strip.shape[1] < seen:
            width = max(2 * _LONG_TILE, 1 << (seen - 1).bit_length())
            strip = torch.full((_LONG_TILE, width), -math.inf, dtype=like.dtype, device=like.device)
            strip.triu_(width - _LONG_TILE + 1)
            if window:
                old = torch.full_like(strip, -math.inf).tril_(width - _LONG_TILE - window)
                strip = torch.minimum(strip, old)
            self._strips[window] = strip
        return strip[_LONG_TILE - count :, strip.shape[1] - seen :]

    def _gather(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """The named blocks [2, n, block_size, kv_heads, dim] of a layer, in a buffer that the next call overwrites."""
        shape = (2, len(blocks), *cache.shape[2:])
        size = math.prod(shape)
        buffer = self._gathered
        if buffer.numel() < size or buffer.dtype != cache.dtype or buffer.device != cache.device:
            buffer = self._gathered = torch.empty(size + size // 2, dtype=cache.dtype, device=cache.device)
        return torch.index_select(cache, 1, blocks, out=buffer[:size].view(shape))
