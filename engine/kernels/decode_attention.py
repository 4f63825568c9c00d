"""Attention of decode rows (one query each) over the paged cache, with long contexts cut into splits.

A split is SPLIT consecutive positions, cut at multiples of SPLIT, whoever else is in the batch: so a row's result is
the same to the last bit in any company. A fixed number of programs walks the units (part, kv head), a part being one
split of one row; so one captured CUDA graph serves all lengths. A second kernel merges each row's parts in order.

    row 0, 600 tokens   |  split 0  |  split 1  | sp.2 |        parts 0 1 2     firsts [0, 3, 4, 6]
    row 1,  40 tokens   |s|                                     part  3         rows   [0 0 0 1 2 2]
    row 2, window 300   . . . . [ split 1 | split 2 |           parts 4 5       program p: units p, p+P, p+2P, ..

Slots that a row never wrote, or that are older than its window, are not loaded: they may hold NaN. Table entries beyond
a row's length are not read. A row of length 0 (padding of a graph's batch) has no parts and gets zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from engine.kernels.launch import LOG2_E, NO_WINDOW, Launch, Tables, check, check_contiguous, power_of_two

SPLIT = 256  # positions; part of the result's bits, so a constant
_MERGED = 16  # parts that the merge loads at once; likewise

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Parts:
    """Which splits of which rows are computed; on the device, at addresses that stay.

    rows int32 [capacity]: the row of each part. firsts int32 [rows + 1]: the first part of each row, and the number of
    all parts; entries of `rows` from there on are not read.
    """

    rows: torch.Tensor
    firsts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Partials:
    """What the parts came to: sums [capacity, q_heads, dim] of weighted values, and for each the level that its weights
    are relative to (its highest score, scaled, in powers of two) and their sum, [capacity, q_heads]. All fp32."""

    values: torch.Tensor
    levels: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def empty(cls, capacity: int, q_heads: int, dim: int, device: torch.device | str) -> Partials:
        values = torch.empty(capacity, q_heads, dim, dtype=torch.float32, device=device)
        levels = torch.empty(capacity, q_heads, dtype=torch.float32, device=device)
        return cls(values, levels, torch.empty_like(levels))


def parts_of(lengths: Int32Array, window: int = 0) -> tuple[Int32Array, Int32Array]:
    """`Parts.rows` and `Parts.firsts` of rows with these lengths, on the host; `window` 0 is none."""
    oldest = np.maximum(lengths - window, 0) // SPLIT if window else np.zeros_like(lengths)
    counts = np.where(lengths > 0, -(-lengths // SPLIT) - oldest, 0)
    firsts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(counts, out=firsts[1:])
    return np.repeat(np.arange(len(lengths), dtype=np.int32), counts), firsts


def capacity_of(rows: int, tokens: int) -> int:
    """Parts that `rows` rows of together at most `tokens` cached tokens can have, with any window."""
    return rows + tokens // SPLIT + rows  # a window's ends may each cut a split


def decode_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: Tables,
    lengths: torch.Tensor,
    parts: Parts,
    partials: Partials,
    out: torch.Tensor,
    *,
    window: int = 0,
    scale: float | None = None,
    programs: int = 512,
) -> torch.Tensor:
    """Attention of q [rows, q_heads, dim] over one layer's cache [2, blocks, block_size, kv_heads, dim], into `out`.

    lengths int32 [rows]: row r attends to its positions 0 .. lengths[r]-1, of which the last is its own, or to the last
    `window` of them (0: all). `parts` must be that of the same lengths and window.
    `scale` is dim ** -0.5 by default. `programs` are launched; the result does not depend on how many.
    """
    split, merge = decode_launches(
        q,
        cache,
        tables,
        lengths,
        parts,
        partials,
        out,
        window=window,
        scale=scale,
        programs=programs,
    )
    split()
    merge()
    return out


def decode_attention_reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: Tables,
    lengths: torch.Tensor,
    parts: Parts,
    partials: Partials,
    out: torch.Tensor,
    *,
    window: int = 0,
    scale: float | None = None,
    programs: int = 512,
) -> torch.Tensor:
    """The same by the definition, in fp64, a row at a time; uses neither parts nor partials."""
    block_size, kv_heads, dim = cache.shape[2:]
    for row, length in enumerate(lengths.tolist()):
        first = max(0, length - window) if window else 0
        positions = torch.arange(first, length, device=q.device)
        blocks = tables.blocks[tables.starts[row] + positions // block_size].long()
        seen = cache[:, blocks, positions % block_size].double()  # [2, positions, kv_heads, dim]
        queries = q[row].double().view(kv_heads, -1, dim)
        scores = torch.einsum("kgd,pkd->kgp", queries, seen[0]) * (dim**-0.5 if scale is None else scale)
        values = torch.einsum("kgp,pkd->kgd", scores.softmax(-1), seen[1])
        out[row] = values.reshape(q.shape[1], dim).to(out.dtype)
    return out


def decode_launches(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: Tables,
    lengths: torch.Tensor,
    parts: Parts,
    partials: Partials,
    out: torch.Tensor,
    *,
    window: int,
    scale: float | None,
    programs: int,
) -> tuple[Launch, Launch]:
    """The two launches of `decode_attention`."""
    rows, q_heads, dim = q.shape
    block_size, kv_heads = cache.shape[2:4]
    check(cache.shape[4] == dim, f"queries of {dim} against a cache of {cache.shape[4]}")
    check(q_heads % kv_heads == 0, f"{q_heads} query heads over {kv_heads} kv heads")
    check(len(parts.firsts) == rows + 1, f"{rows} rows, parts of {len(parts.firsts) - 1}")
    check(
        len(parts.rows) <= len(partials.values), f"{len(parts.rows)} parts, room for {len(partials.values)}"
    )
    check_contiguous(q=q, cache=cache, blocks=tables.blocks, out=out)
    scale2 = (dim**-0.5 if scale is None else scale) * LOG2_E
    shape = {"HEADS": q_heads, "DIM": dim, "DIM_PADDED": power_of_two(dim)}
    group = q_heads // kv_heads
    split = Launch(
        _attend_splits,
        (programs,),
        {
            "q": q,
            "keys": cache[0],
            "values": cache[1],
            "tables": tables.blocks,
            "table_starts": tables.starts,
            "lengths": lengths,
            "part_rows": parts.rows,
            "part_firsts": parts.firsts,
            "part_values": partials.values,
            "part_levels": partials.levels,
            "part_weights": partials.weights,
            "rows": rows,
            "window": window or NO_WINDOW,
            "scale2": scale2,
            "q_row": q.stride(0),
            "q_head": q.stride(1),
            "kv_block": cache.stride(1),
            "kv_slot": cache.stride(2),
            "kv_head": cache.stride(3),
        },
        {
            **shape,
            "GROUP": group,
            "GROUP_PADDED": max(16, power_of_two(group)),  # the least that a matrix unit multiplies
            "BLOCK_SIZE": block_size,
            "SPLIT": SPLIT,
            **_tiling(dim, cache.dtype),
        },
    )
    merge = Launch(
        _merge_parts,
        (rows, q_heads),
        {
            "part_values": partials.values,
            "part_levels": partials.levels,
            "part_weights": partials.weights,
            "part_firsts": parts.firsts,
            "out": out,
            "out_row": out.stride(0),
            "out_head": out.stride(1),
        },
        {**shape, "PARTS": _MERGED, "num_warps": 4},
    )
    return split, merge


def _tiling(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Positions of one tile, and how far loads run ahead: a row's bytes decide, not the batch."""
    row_bytes = power_of_two(dim) * dtype.itemsize
    return {"TILE": 64 if row_bytes <= 256 else 32, "num_warps": 4, "num_stages": 3}


@triton.jit
def _attend_splits(
    q,
    keys,
    values,
    tables,
    table_starts,
    lengths,
    part_rows,
    part_firsts,
    part_values,
    part_levels,
    part_weights,
    rows,
    window,
    scale2,
    q_row,
    q_head,
    kv_block,
    kv_slot,
    kv_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    KV_HEADS: tl.constexpr = HEADS // GROUP
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    offsets = tl.arange(0, TILE)
    own = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
    units = tl.load(part_firsts + rows) * KV_HEADS
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        part = unit // KV_HEADS
        kv = unit % KV_HEADS
        row = tl.load(part_rows + part)
        length = tl.load(lengths + row)
        table = tables + tl.load(table_starts + row)
        oldest = tl.maximum(length - window, 0)
        begin = (oldest // SPLIT + part - tl.load(part_firsts + row)) * SPLIT
        end = tl.minimum(begin + SPLIT, length)
        begin = tl.maximum(begin, oldest)
        query = tl.load(
            q + row.to(tl.int64) * q_row + (kv * GROUP + heads)[:, None] * q_head + dims[None, :], own, 0.0
        )
        level = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        weight = tl.zeros([GROUP_PADDED], tl.float32)
        value = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
        for first in range(begin, end, TILE):
            positions = first + offsets
            seen = positions < end
            block = tl.load(table + positions // BLOCK_SIZE, seen, 0).to(tl.int64)
            places = block * kv_block + (positions % BLOCK_SIZE) * kv_slot + kv * kv_head
            loaded = seen[:, None] & (dims < DIM)[None, :]
            k = tl.load(keys + places[:, None] + dims[None, :], loaded, 0.0)
            v = tl.load(values + places[:, None] + dims[None, :], loaded, 0.0)
            scores = tl.dot(query, tl.trans(k), input_precision="ieee")
            scores = tl.where(seen[None, :], scores, float("-inf"))
            # Each tile has a position that is seen, so the new level is finite.
            raised = tl.maximum(level, tl.max(scores, 1) * scale2)
            decay = tl.exp2(level - raised)
            weights = tl.exp2(tl.fma(scores, scale2, -raised[:, None]))
            weight = weight * decay + tl.sum(weights, 1)
            value = tl.dot(weights.to(v.dtype), v, value * decay[:, None], input_precision="ieee")
            level = raised
        places = part.to(tl.int64) * HEADS + kv * GROUP + heads
        tl.store(part_values + places[:, None] * DIM + dims[None, :], value, own)
        tl.store(part_levels + places, level, heads < GROUP)
        tl.store(part_weights + places, weight, heads < GROUP)


@triton.jit
def _merge_parts(
    part_values,
    part_levels,
    part_weights,
    part_firsts,
    out,
    out_row,
    out_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    dims = tl.arange(0, DIM_PADDED)
    last = tl.load(part_firsts + row + 1)
    level = float("-inf")
    weight = 0.0
    value = tl.zeros([DIM_PADDED], tl.float32)
    for first in range(tl.load(part_firsts + row), last, PARTS):
        parts = first + tl.arange(0, PARTS)
        known = parts < last
        places = parts.to(tl.int64) * HEADS + head
        levels = tl.load(part_levels + places, known, float("-inf"))
        weights = tl.load(part_weights + places, known, 0.0)
        mask = known[:, None] & (dims < DIM)[None, :]
        values = tl.load(part_values + places[:, None] * DIM + dims[None, :], mask, 0.0)
        raised = tl.maximum(level, tl.max(levels, 0))
        decay = tl.exp2(level - raised)
        shares = tl.exp2(levels - raised)
        weight = weight * decay + tl.sum(weights * shares, 0)
        value = value * decay + tl.sum(values * shares[:, None], 0)
        level = raised
    merged = tl.where(weight > 0, value / tl.where(weight > 0, weight, 1.0), 0.0)
    place = out + row.to(tl.int64) * out_row + head * out_head
    tl.store(place + dims, merged.to(out.dtype.element_ty), dims < DIM)
