"""Rotary embedding of a step's queries and keys, the norms of both where a family has them, and the write of keys and
values into the cache: all between the fused projection and attention, in one pass over it.

    fused row of a token   [ q q q q | k k | v v ]      q, k: (norm,) rotate, in place
                                     |     |            k, v: copied to the token's slot of the cache
                                     +-----+--> cache

Rounds where engine.rotary and engine.model do: both products to the dtype, then their sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.launch import Launch, check, check_contiguous, power_of_two
from engine.rotary import Rotary, rotate

_HEADS = 8  # of one program


def angle_table(rotary: Rotary, positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[positions, dim]: for each position the cosines, then the sines of its dim / 2 angles, as `rotary` gives them."""
    cos, signed_sin = rotary(torch.arange(positions, device=device), dtype)
    half = cos.shape[-1] // 2
    return torch.cat((cos[:, 0, :half], signed_sin[:, 0, half:]), 1).contiguous()


def rotate_and_write(
    fused: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    angles: torch.Tensor,
    cache: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Turns fused [tokens, q_heads + 2 kv_heads, dim] in place, stores its k and v; returns the queries, a view.

    positions, slots [tokens], int32 or int64: the row of `angles` (`angle_table`), and the place in cache
    [2, blocks, block_size, kv_heads, dim], block * block_size + offset; a negative slot (padding) stores nothing.
    norms: weights [dim] of the RMS norms of queries and keys.
    """
    rope_launch(fused, positions, slots, angles, cache, norms, eps)()
    return fused[:, : fused.shape[1] - 2 * cache.shape[3]]


def rotate_and_write_reference(
    fused: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    angles: torch.Tensor,
    cache: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """The same in the steps of engine.model."""
    kv_heads, dim = cache.shape[3:]
    q_heads = fused.shape[1] - 2 * kv_heads
    turned, v = fused[:, : q_heads + kv_heads], fused[:, q_heads + kv_heads :]
    if norms is not None:
        weights = torch.cat((norms[0].expand(q_heads, -1), norms[1].expand(kv_heads, -1)))
        turned = F.rms_norm(turned, (dim,), None, eps).mul_(weights)
    cos, sin = angles[positions.long()].unsqueeze(1).chunk(2, -1)
    turned = rotate(turned, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    fused[:, : q_heads + kv_heads] = turned
    kept = slots >= 0
    flat = cache.view(2, -1, kv_heads, dim)
    flat[0, slots[kept].long()] = turned[kept, q_heads:]
    flat[1, slots[kept].long()] = v[kept]
    return fused[:, :q_heads]


def rope_launch(
    fused: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    angles: torch.Tensor,
    cache: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> Launch:
    """The launch of `rotate_and_write`."""
    tokens, heads, dim = fused.shape
    kv_heads = cache.shape[3]
    check(dim % 2 == 0 and angles.shape[1] == dim, f"heads of {dim} turned by angles of {angles.shape[1]}")
    check(cache.shape[4] == dim, f"keys of {dim} into a cache of {cache.shape[4]}")
    check(heads > 2 * kv_heads, f"{heads} fused heads hold no queries beside {kv_heads} keys and values")
    check(cache[0].is_contiguous(), "the cache must be contiguous")
    check(len(positions) == tokens == len(slots), f"{tokens} tokens, {len(positions)} positions")
    check_contiguous(fused=fused, angles=angles, cache=cache)
    q_norm, k_norm = (angles, angles) if norms is None else norms  # any pointer where it is not read
    return Launch(
        _rotate_and_write,
        (tokens, -(-heads // _HEADS)),
        {
            "fused": fused,
            "positions": positions,
            "slots": slots,
            "angles": angles,
            "keys": cache[0],
            "values": cache[1],
            "q_norm": q_norm,
            "k_norm": k_norm,
            "eps": eps,
            "fused_token": fused.stride(0),
            "fused_head": fused.stride(1),
        },
        {
            "Q_HEADS": heads - 2 * kv_heads,
            "KV_HEADS": kv_heads,
            "HALF": dim // 2,
            "HALF_PADDED": power_of_two(dim // 2),
            "HEADS": min(_HEADS, power_of_two(heads)),
            "NORM": norms is not None,
            "num_warps": 4,
        },
    )


@triton.jit
def _rotate_and_write(
    fused,
    positions,
    slots,
    angles,
    keys,
    values,
    q_norm,
    k_norm,
    eps,
    fused_token,
    fused_head,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, HALF_PADDED)
    kind = fused.dtype.element_ty
    mask = (heads < Q_HEADS + 2 * KV_HEADS)[:, None] & (pairs < HALF)[None, :]
    places = fused + token * fused_token + heads[:, None] * fused_head + pairs[None, :]
    low_raw = tl.load(places, mask, 0.0)
    high_raw = tl.load(places + HALF, mask, 0.0)
    low = low_raw.to(tl.float32)
    high = high_raw.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        known = pairs < HALF
        query = (heads < Q_HEADS)[:, None]
        q_low = tl.load(q_norm + pairs, known, 0.0).to(tl.float32)[None, :]
        k_low = tl.load(k_norm + pairs, known, 0.0).to(tl.float32)[None, :]
        q_high = tl.load(q_norm + HALF + pairs, known, 0.0).to(tl.float32)[None, :]
        k_high = tl.load(k_norm + HALF + pairs, known, 0.0).to(tl.float32)[None, :]
        low = ((low * scale).to(kind).to(tl.float32) * tl.where(query, q_low, k_low)).to(kind).to(tl.float32)
        high = (
            ((high * scale).to(kind).to(tl.float32) * tl.where(query, q_high, k_high)).to(kind).to(tl.float32)
        )
    row = angles + tl.load(positions + token).to(tl.int64) * (2 * HALF)
    cos = tl.load(row + pairs, pairs < HALF, 0.0).to(tl.float32)[None, :]
    sin = tl.load(row + HALF + pairs, pairs < HALF, 0.0).to(tl.float32)[None, :]
    new_low = ((low * cos).to(kind).to(tl.float32) - (high * sin).to(kind).to(tl.float32)).to(kind)
    new_high = ((high * cos).to(kind).to(tl.float32) + (low * sin).to(kind).to(tl.float32)).to(kind)
    turned = mask & (heads < Q_HEADS + KV_HEADS)[:, None]
    tl.store(places, new_low, turned)
    tl.store(places + HALF, new_high, turned)

    slot = tl.load(slots + token).to(tl.int64)
    first = slot * (KV_HEADS * 2 * HALF)
    key = heads - Q_HEADS
    written = turned & (key >= 0)[:, None] & (slot >= 0)
    into = keys + first + key[:, None] * (2 * HALF) + pairs[None, :]
    tl.store(into, new_low, written)
    tl.store(into + HALF, new_high, written)
    value = key - KV_HEADS
    written = mask & (value >= 0)[:, None] & (slot >= 0)
    into = values + first + value[:, None] * (2 * HALF) + pairs[None, :]
    tl.store(into, low_raw, written)
    tl.store(into + HALF, high_raw, written)
