"""Draws tokens from logits, each row by its own parameters.

A draw is argmax(log p + Gumbel noise), and the noise is a pure function of (seed, choice, position, vocabulary id): no
generator state exists, so a row draws the same token alone, in a batch, resumed, migrated, on a CPU or on a GPU.
Order is total everywhere (higher logit first, then lower id), so that top-k and top-p cut the same set each time.
Temperature comes first, then top-k, top-p of what is left, and min-p, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.api import SamplingParams

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# How far top-p without top-k looks, in steps; the whole vocabulary is sorted only for a row that is flatter still.
_NUCLEUS = (512, 8192)


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    """One token for each row of logits [rows, vocab] -> int64 [rows], on the device of the logits.

    `positions[i]` is the position that the token drawn for row i will have in its sequence.
    """
    drawn = logits.argmax(dim=-1)
    plain = [row for row, p in enumerate(params) if p.temperature > 0 and p.top_k <= 0 and p.top_p >= 1]
    top_k = [row for row, p in enumerate(params) if p.temperature > 0 and p.top_k > 0]
    top_p = [row for row, p in enumerate(params) if p.temperature > 0 and p.top_k <= 0 and p.top_p < 1]
    vocab = logits.shape[1]
    if plain:
        scaled, keys = _prepare(logits, params, positions, plain)
        noisy = scaled + gumbel(keys, torch.arange(vocab, device=logits.device).unsqueeze(0))
        drawn[plain] = _above_min_p(noisy, scaled, [params[row] for row in plain]).argmax(dim=-1)
    if top_k:
        scaled, keys = _prepare(logits, params, positions, top_k)
        width = min(vocab, max(params[row].top_k for row in top_k))
        drawn[top_k] = _draw_cut(*leading(scaled, width), keys, None, [params[row] for row in top_k])
    if top_p:
        scaled, keys = _prepare(logits, params, positions, top_p)
        drawn[top_p] = _draw_nucleus(scaled, keys, [params[row] for row in top_p])
    return drawn


def _prepare(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], rows: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of `rows` below their maximum, over temperature, in fp64 [n, vocab]; and the rows' noise keys [n, 1].

    fp64, since fp32 sums over a large vocabulary depend on how the device adds; the maximum first, so that no
    temperature overflows.
    """
    chosen = logits[rows].double()
    scaled = (chosen - chosen.amax(dim=-1, keepdim=True)) / _column(
        [params[row].temperature for row in rows], chosen
    )
    keys = [noise_key(params[row].seed, params[row].choice, positions[row]) for row in rows]
    return scaled, torch.from_numpy(signed_words(keys)).to(logits.device).unsqueeze(1)


def leading(scaled: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` best of each row in total order: values and ids, [n, width]."""
    if width == scaled.shape[1]:
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
        return values, ids
    values, ids = scaled.topk(width, dim=-1)
    # topk leaves open which of equal values it returns, and in which order. Where the last value also occurs beyond the
    # cut, the lowest ids of it must be taken: count what lies above it, and sort.
    edge = values[:, -1:]
    if bool(((scaled == edge).sum(dim=-1) != (values == edge).sum(dim=-1)).any()):
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
        return values[:, :width], ids[:, :width]
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _draw_nucleus(scaled: torch.Tensor, keys: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Draws with top-p alone. How far a row looks depends on that row only, or its company could change its sums."""
    vocab = scaled.shape[1]
    drawn = torch.empty(len(scaled), dtype=torch.int64, device=scaled.device)
    total = scaled.exp().sum(dim=-1)
    wanted = _column([p.top_p for p in params], scaled)[:, 0] * total
    open_rows = list(range(len(scaled)))
    for width in (*(width for width in _NUCLEUS if width < vocab), vocab):
        values, ids = leading(scaled[open_rows], width)
        reached = values.exp().sum(dim=-1) >= wanted[open_rows]
        flags = [True] * len(open_rows) if width == vocab else reached.tolist()
        done = [place for place, flag in enumerate(flags) if flag]
        if done:
            rows = [open_rows[place] for place in done]
            drawn[rows] = _draw_cut(
                values[done], ids[done], keys[rows], total[rows], [params[row] for row in rows]
            )
        open_rows = [row for row, flag in zip(open_rows, flags, strict=True) if not flag]
        if not open_rows:
            break
    return drawn


def _draw_cut(
    values: torch.Tensor,
    ids: torch.Tensor,
    keys: torch.Tensor,
    total: torch.Tensor | None,
    params: Sequence[SamplingParams],
) -> torch.Tensor:
    """Draws from the leading candidates [n, width]: top-k first, then top-p of what is left (`total` mass, or all)."""
    width = values.shape[1]
    limit = _column([float(p.top_k if p.top_k > 0 else width) for p in params], values)
    cut = torch.arange(width, device=values.device).unsqueeze(0) >= limit
    weights = values.exp().masked_fill_(cut, 0)
    before = weights.cumsum(dim=-1) - weights
    mass = weights.sum(dim=-1, keepdim=True) if total is None else total.unsqueeze(1)
    top_p = _column([p.top_p for p in params], values)
    beyond = (before >= top_p * mass) & (top_p < 1)
    beyond[:, 0] = False  # the best token always stays
    noisy = (values + gumbel(keys, ids)).masked_fill_(cut | beyond, -torch.inf)
    noisy = _above_min_p(noisy, values, params)
    return ids.gather(1, noisy.argmax(dim=-1, keepdim=True)).squeeze(1)


def _above_min_p(noisy: torch.Tensor, scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Drops candidates below min_p of the likeliest one, whose `scaled` logit is 0: log(p / p_max) is what it is."""
    if not any(p.min_p > 0 for p in params):
        return noisy
    least = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], scaled)
    return noisy.masked_fill_(scaled < least, -torch.inf)


def _column(numbers: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).unsqueeze(1)


# --- counter-based noise (SplitMix64: Steele, Lea, Flood, OOPSLA 2014) ---------------------------------------------


def noise_key(seed: int, choice: int, position: int) -> int:
    """The start of the noise stream of one draw, 64 bits; any ints, negative ones and those over 64 bits wrap."""
    return noise_stream(noise_stream(seed, choice) + position)


def noise_stream(*words: int) -> int:
    """`noise_key` but for its last word, which is added to the result of those before it."""
    key = 0
    for word in words:
        key = (key + word + _GOLDEN) & _MASK
        key = ((key ^ (key >> 30)) * _MIX_1) & _MASK
        key = ((key ^ (key >> 27)) * _MIX_2) & _MASK
        key ^= key >> 31
    return key


def signed_words(words: Sequence[int]) -> npt.NDArray[np.int64]:
    """Unsigned words of 64 bits as the int64 that have the same bits."""
    return np.array(words, dtype=np.uint64).view(np.int64)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift_xor(bits: torch.Tensor, count: int) -> torch.Tensor:
    """bits ^ (bits >>> count): torch shifts int64 with the sign, so the sign's copies are masked off."""
    return bits ^ ((bits >> count) & ((1 << (64 - count)) - 1))


def uniform(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """fp64 strictly between 0 and 1: element ids of the streams `keys` (int64, broadcast against each other)."""
    bits = keys + (ids + 1) * _signed(_GOLDEN)
    bits = _shift_xor(bits, 30) * _signed(_MIX_1)
    bits = _shift_xor(bits, 27) * _signed(_MIX_2)
    bits = _shift_xor(bits, 31)
    # 52 bits and a half: with 53 the half would round the largest up to 1.
    return (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52


def gumbel(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, fp64, shaped as keys and ids broadcast."""
    return -torch.log(-torch.log(uniform(keys, ids)))
