"""Causal attention of spans (several new tokens of a sequence) over the paged cache, which already holds their own KV.

A program computes one tile: some consecutive queries of a span, for all query heads that share one kv head, so that
each key is loaded once for all of them. It walks the context in tiles cut at multiples of TILE positions, from the
oldest that any of its queries sees.

    keys    0 . . . . . . | T . . . . . . | 2T . . . . .        whole tiles need no mask,
    query a x x x x x x x | x x x x x x x | x x                 the last ones and, with a window,
    query b x x x x x x x | x x x x x x x | x x x               all of them do

A query's result follows from its own position and context alone, to the last bit: not from how its prompt was cut into
chunks, nor from the tile it fell into. (Tiles that it does not see change nothing: they add zeros, scaled by one.)
Slots after the last new token, and those older than the window, are not loaded: they may hold NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from engine.kernels.launch import LOG2_E, NO_WINDOW, Launch, Tables, check, check_contiguous, power_of_two

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Spans:
    """Spans of new tokens, and the tiles they are cut into; int32, on the device.

    starts [spans]: position of the first new token. firsts [spans + 1]: its place among all tokens, and their number.
    tiles [n, 2]: (span, place of the tile's first query in its span), those with the longest context first.
    """

    starts: torch.Tensor
    firsts: torch.Tensor
    tiles: torch.Tensor


def tile_queries(group: int, dim: int, dtype: torch.dtype) -> int:
    """Queries of one tile, for `group` query heads that share a kv head."""
    return max(1, _tiling(dim, dtype)["ROWS"] // group)


def tiles_of(starts: Int32Array, counts: Int32Array, queries: int) -> Int32Array:
    """`Spans.tiles` on the host; `queries` as `tile_queries` says."""
    pieces = -(-counts // queries)
    spans = np.repeat(np.arange(len(counts), dtype=np.int32), pieces)
    before = np.cumsum(pieces) - pieces
    places = (np.arange(len(spans), dtype=np.int32) - before[spans].astype(np.int32)) * queries
    # The longest first: the last programs to start are then the shortest, and no unit waits long for another.
    order = np.argsort(-(starts[spans] + places), kind="stable")
    return np.stack((spans[order], places[order]), axis=1).astype(np.int32)


def prefill_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: Tables,
    spans: Spans,
    out: torch.Tensor,
    *,
    window: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of q [tokens, q_heads, dim] over one layer's cache [2, blocks, block_size, kv_heads, dim], into `out`.

    The query at position p sees positions 0 .. p of its sequence, or the last `window` of
    them (0: all). `spans.tiles` must be cut by `tile_queries`. Tokens outside all spans are left as they are in `out`.
    """
    prefill_launch(q, cache, tables, spans, out, window=window, scale=scale)()
    return out


def prefill_attention_reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: Tables,
    spans: Spans,
    out: torch.Tensor,
    *,
    window: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """The same by the definition, in fp64, a span at a time; does not use the tiles."""
    block_size, kv_heads, dim = cache.shape[2:]
    firsts = spans.firsts.tolist()
    for span, start in enumerate(spans.starts.tolist()):
        part = slice(firsts[span], firsts[span + 1])
        positions = torch.arange(start + part.stop - part.start, device=q.device)
        asked = positions[start:].unsqueeze(1)
        hidden = (positions > asked) | (positions <= asked - (window or NO_WINDOW))
        blocks = tables.blocks[tables.starts[span] + positions // block_size].long()
        seen = cache[:, blocks, positions % block_size].double()
        seen.masked_fill_(hidden.all(0)[None, :, None, None], 0)  # what nobody sees may be NaN
        queries = q[part].double().unflatten(1, (kv_heads, -1))
        scores = torch.einsum("qkgd,pkd->kgqp", queries, seen[0]) * (dim**-0.5 if scale is None else scale)
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        out[part] = torch.einsum("kgqp,pkd->qkgd", weights, seen[1]).flatten(1, 2).to(out.dtype)
    return out


def prefill_launch(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: Tables,
    spans: Spans,
    out: torch.Tensor,
    *,
    window: int,
    scale: float | None,
) -> Launch:
    """The launch of `prefill_attention`."""
    _, q_heads, dim = q.shape
    block_size, kv_heads = cache.shape[2:4]
    group = q_heads // kv_heads
    tiling = _tiling(dim, cache.dtype)
    check(cache.shape[4] == dim, f"queries of {dim} against a cache of {cache.shape[4]}")
    check(q_heads % kv_heads == 0, f"{q_heads} query heads over {kv_heads} kv heads")
    check(group <= tiling["ROWS"], f"{group} query heads share a kv head: at most {tiling['ROWS']} can")
    check(len(spans.firsts) == len(spans.starts) + 1, "spans: firsts must have one entry more than starts")
    check_contiguous(q=q, cache=cache, blocks=tables.blocks, out=out, tiles=spans.tiles)
    return Launch(
        _attend_tiles,
        (len(spans.tiles), kv_heads),
        {
            "q": q,
            "keys": cache[0],
            "values": cache[1],
            "tables": tables.blocks,
            "table_starts": tables.starts,
            "tiles": spans.tiles,
            "starts": spans.starts,
            "firsts": spans.firsts,
            "out": out,
            "window": window or NO_WINDOW,
            "scale2": (dim**-0.5 if scale is None else scale) * LOG2_E,
            "q_token": q.stride(0),
            "q_head": q.stride(1),
            "out_token": out.stride(0),
            "out_head": out.stride(1),
            "kv_block": cache.stride(1),
            "kv_slot": cache.stride(2),
            "kv_head": cache.stride(3),
        },
        {
            "GROUP": group,
            "DIM": dim,
            "DIM_PADDED": power_of_two(dim),
            "BLOCK_SIZE": block_size,
            # In fp32 a second loop would need more registers than there are.
            "MASK_ALL": window > 0 or cache.dtype.itemsize > 2,
            **tiling,
        },
    )


def _tiling(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """ROWS of queries by TILE keys, and the launch's options: what fits the registers and shared memory of sm_80 on."""
    padded = power_of_two(dim)
    if dtype.itemsize > 2:
        rows = 32 if padded <= 128 else 16
        return {"ROWS": rows, "TILE": 32, "num_warps": 8, "num_stages": 2}
    rows, tile = (128, 64) if padded <= 128 else (64, 32)
    return {"ROWS": rows, "TILE": tile, "num_warps": 8, "num_stages": 2}


@triton.jit
def _attend_tiles(
    q,
    keys,
    values,
    tables,
    table_starts,
    tiles,
    starts,
    firsts,
    out,
    window,
    scale2,
    q_token,
    q_head,
    out_token,
    out_head,
    kv_block,
    kv_slot,
    kv_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASK_ALL: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUP
    span = tl.load(tiles + 2 * tl.program_id(0))
    place = tl.load(tiles + 2 * tl.program_id(0) + 1)
    kv = tl.program_id(1)
    start = tl.load(starts + span)
    token = tl.load(firsts + span)
    count = tl.load(firsts + span + 1) - token
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    query = place + rows // GROUP  # its place in the span
    head = kv * GROUP + rows % GROUP
    asked = start + query
    real = (rows < QUERIES * GROUP) & (query < count)
    mask = real[:, None] & (dims < DIM)[None, :]
    tokens = (token + query).to(tl.int64)
    queries = tl.load(q + tokens[:, None] * q_token + head[:, None] * q_head + dims[None, :], mask, 0.0)

    level = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    value = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    table = tables + tl.load(table_starts + span)
    keys += kv * kv_head
    values += kv * kv_head
    end = start + tl.minimum(place + QUERIES, count)
    if MASK_ALL:
        whole = tl.maximum(start + place - window + 1, 0) // TILE * TILE
    else:
        # Every query sees these tiles to their last position.
        whole = (start + place + 1) // TILE * TILE
        for first in range(0, whole, TILE):
            level, weight, value = _attend(
                queries, keys, values, table, first, end, asked, window, scale2, kv_block, kv_slot,
                level, weight, value, DIM, DIM_PADDED, BLOCK_SIZE, TILE, False,
            )  # fmt: skip
    for first in range(whole, end, TILE):
        level, weight, value = _attend(
            queries, keys, values, table, first, end, asked, window, scale2, kv_block, kv_slot,
            level, weight, value, DIM, DIM_PADDED, BLOCK_SIZE, TILE, True,
        )  # fmt: skip
    value = value / tl.where(weight > 0, weight, 1.0)[:, None]
    places = tokens[:, None] * out_token + head[:, None] * out_head + dims[None, :]
    tl.store(out + places, value.to(out.dtype.element_ty), mask)


@triton.jit
def _attend(
    queries, keys, values, table, first, end, asked, window, scale2, kv_block, kv_slot,
    level, weight, value,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys. `level` is the highest score so far times the scale, rounded: what weights are relative to.

    The arithmetic is the same with and without masks, to the last bit: hence the explicit fma.
    """
    dims = tl.arange(0, DIM_PADDED)
    positions = first + tl.arange(0, TILE)
    if MASKED:
        # `asked[0]` is the oldest query: nobody in the tile sees what its window has lost.
        known = (positions < end) & (positions > tl.min(asked, 0) - window)
        block = tl.load(table + positions // BLOCK_SIZE, known, 0).to(tl.int64)
        mask = known[:, None] & (dims < DIM)[None, :]
    else:
        block = tl.load(table + positions // BLOCK_SIZE).to(tl.int64)
        mask = (dims < DIM)[None, :]
    places = (block * kv_block + (positions % BLOCK_SIZE) * kv_slot)[:, None] + dims[None, :]
    if MASKED or DIM != DIM_PADDED:
        k = tl.load(keys + places, mask, 0.0)
        v = tl.load(values + places, mask, 0.0)
    else:
        k = tl.load(keys + places)
        v = tl.load(values + places)
    scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
    if MASKED:
        seen = (positions[None, :] <= asked[:, None]) & (positions[None, :] > asked[:, None] - window)
        scores = tl.where(seen & known[None, :], scores, float("-inf"))
    raised = tl.maximum(level, tl.max(scores, 1) * scale2)
    # A query whose window has not begun yet has seen nothing: its level is still -inf.
    base = tl.where(raised == float("-inf"), 0.0, raised)
    decay = tl.exp2(level - base)  # exactly 1 where nothing higher was seen
    weights = tl.exp2(tl.fma(scores, scale2, -base[:, None]))
    weight = tl.fma(weight, decay, tl.sum(weights, 1))
    value = tl.dot(weights.to(v.dtype), v, value * decay[:, None], input_precision="ieee")
    return raised, weight, value
