"""Draws one token for each row of logits on the GPU, the very token that engine.sampler draws; it stays there.

The draw is argmax(log p + Gumbel noise) over what top-k, top-p and min-p leave, and no vocabulary is sorted for it. The
noisy argmax over more than top-p leaves is a proposal: when the mass before it (in the order of logits) is below top-p,
it is in the set, and so the set's argmax. Otherwise neither is anything behind it, and the next proposal is the argmax
over what stands before it. Mostly the first is right; a round that fails leaves about half of what was left. (Rejecting
by rising pivots is FlashInfer's idea, arXiv 2501.01005.) top-k needs its exact set: bisection over the logits' bits,
which only counts.

    scan     rows x parts   the largest logit of each part of the vocabulary
    propose  rows x parts   its noisy argmax and its mass, for rows without top-k
    settle   rows           the parts together; top-k, top-p where asked; the token

In fp64, as in engine.sampler. Parts are cut at multiples of a constant and added in order: a row draws the same token
in any company. NaN logits draw some token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from engine.api import SamplingParams
from engine.kernels.launch import Launch, check, check_contiguous, power_of_two
from engine.sampler import gumbel, noise_stream, signed_words

_PART = 4096  # vocabulary ids; part of the sums' bits, so a constant
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Draws:
    """How each row draws; on the device, at addresses that stay. It changes with the batch, not with each step.

    temperature, top_p, log_min_p fp64 [rows]: at most 0 is greedy, at least 1 is off, -inf is off. top_k int32 [rows]:
    at most 0 is off. streams int64 [rows]: `engine.sampler.noise_stream` of the row's seed and choice.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    top_k: torch.Tensor
    streams: torch.Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str) -> Draws:
        """Those of these parameters, one for each row."""
        fp64 = [
            [p.temperature for p in params],
            [p.top_p for p in params],
            [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params],
        ]
        columns = torch.from_numpy(np.array(fp64, dtype=np.float64)).to(device)
        # More than any vocabulary is as good as off, and fits.
        top_k = np.array([min(p.top_k, 1 << 30) for p in params], dtype=np.int32)
        streams = signed_words([noise_stream(p.seed, p.choice) for p in params])
        return cls(
            columns[0],
            columns[1],
            columns[2],
            torch.from_numpy(top_k).to(device),
            torch.from_numpy(streams).to(device),
        )


@dataclass(frozen=True, slots=True)
class Scratch:
    """What `sample` leaves between its kernels, [rows, parts] each: values to be reused by the next call."""

    maxima: torch.Tensor  # fp32, and the ids where they are
    argmaxima: torch.Tensor  # int32
    noisy: torch.Tensor  # fp64, and the ids where they are
    proposals: torch.Tensor  # int32
    masses: torch.Tensor  # fp64

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device | str) -> Scratch:
        kinds = (torch.float32, torch.int32, torch.float64, torch.int32, torch.float64)
        return cls(*(torch.empty(rows, cls.parts(vocab), dtype=kind, device=device) for kind in kinds))

    @staticmethod
    def parts(vocab: int) -> int:
        """How many parts a vocabulary is cut into."""
        return -(-vocab // _PART)


def sample(
    logits: torch.Tensor, draws: Draws, positions: torch.Tensor, scratch: Scratch, out: torch.Tensor
) -> torch.Tensor:
    """One token for each row of logits [rows, vocab] into out int64 [rows].

    positions [rows], int32 or int64: the position that the token will have in its sequence.
    """
    for launch in sample_launches(logits, draws, positions, scratch, out):
        launch()
    return out


def sample_reference(
    logits: torch.Tensor, draws: Draws, positions: torch.Tensor, scratch: Scratch, out: torch.Tensor
) -> torch.Tensor:
    """The same with a sort of the vocabulary, by the definition; uses no scratch."""
    chosen = logits.double()
    greedy = chosen.argmax(-1)
    temperature = torch.where(draws.temperature > 0, draws.temperature, 1.0).unsqueeze(1)
    scaled = (chosen - chosen.amax(-1, keepdim=True)) / temperature
    values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(values.shape[1], device=values.device)
    top_k = torch.where(draws.top_k > 0, draws.top_k, values.shape[1]).unsqueeze(1)
    weights = values.exp().masked_fill_(place >= top_k, 0)
    before = weights.cumsum(-1) - weights
    top_p = draws.top_p.unsqueeze(1)
    dropped = (top_p < 1) & (before >= top_p * weights.sum(-1, keepdim=True)) & (place > 0)
    dropped |= (place >= top_k) | (values < draws.log_min_p.unsqueeze(1))
    words = [
        stream + position for stream, position in zip(draws.streams.tolist(), positions.tolist(), strict=True)
    ]
    keys = torch.from_numpy(signed_words([noise_stream(word) for word in words])).to(ids.device)
    noisy = (values + gumbel(keys.unsqueeze(1), ids)).masked_fill_(dropped, -torch.inf)
    drawn = ids.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(1)
    return out.copy_(torch.where(draws.temperature > 0, drawn, greedy))


def sample_launches(
    logits: torch.Tensor, draws: Draws, positions: torch.Tensor, scratch: Scratch, out: torch.Tensor
) -> tuple[Launch, Launch, Launch]:
    """The launches of `sample`."""
    rows, vocab = logits.shape
    parts = Scratch.parts(vocab)
    check(vocab < 1 << 30, f"a vocabulary of {vocab}")
    check(scratch.maxima.shape[1] == parts, f"scratch for {scratch.maxima.shape[1]} parts, {parts} needed")
    check(len(scratch.maxima) >= rows, f"scratch for {len(scratch.maxima)} rows, {rows} needed")
    for name, tensor in (("temperature", draws.temperature), ("positions", positions), ("out", out)):
        check(len(tensor) >= rows, f"{name} of {len(tensor)} rows, {rows} needed")
    check_contiguous(logits=logits, positions=positions, out=out)
    source = {"logits": logits, "vocab": vocab, "logits_row": logits.stride(0)}
    maxima = {"maxima": scratch.maxima, "argmaxima": scratch.argmaxima}
    proposals = {"noisy": scratch.noisy, "proposals": scratch.proposals, "masses": scratch.masses}
    how = {
        "temperatures": draws.temperature,
        "log_min_ps": draws.log_min_p,
        "top_ks": draws.top_k,
        "streams": draws.streams,
        "positions": positions,
    }
    constants = {"PARTS": parts, "PARTS_PADDED": power_of_two(parts)}
    return (
        Launch(_scan, (rows, parts), {**source, **maxima}, {"PART": _PART, "num_warps": 8}),
        Launch(
            _propose,
            (rows, parts),
            {**source, "maxima": scratch.maxima, **proposals, **how},
            {**constants, "PART": _PART, "num_warps": 8},
        ),
        Launch(
            _settle,
            (rows,),
            {**source, **maxima, **proposals, **how, "top_ps": draws.top_p, "out": out},
            {**constants, "TILE": _PART, "num_warps": 16},
        ),
    )


# --- noise: the functions of engine.sampler -------------------------------------------------------------------------


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 30)) * _MIX_1
    bits = (bits ^ (bits >> 27)) * _MIX_2
    return bits ^ (bits >> 31)


@triton.jit
def _noise_key(stream, position):
    return _mix(stream.to(tl.uint64) + position.to(tl.uint64) + _GOLDEN)


@triton.jit
def _gumbel(key, ids):
    bits = _mix(key + (ids.to(tl.uint64) + 1) * _GOLDEN)
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2 ** -52
    return -tl.log(-tl.log(uniform))


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _order(x):
    """int32 that are ordered as the fp32 x are; both zeros are one."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _scan(logits, vocab, logits_row, maxima, argmaxima, PART: tl.constexpr):
    row = tl.program_id(0)
    part = tl.program_id(1)
    ids = part * PART + tl.arange(0, PART)
    x = tl.load(logits + row.to(tl.int64) * logits_row + ids, ids < vocab, float("-inf")).to(tl.float32)
    maximum = tl.max(x, 0)
    place = row * tl.num_programs(1) + part
    tl.store(maxima + place, maximum)
    tl.store(argmaxima + place, tl.min(tl.where((x == maximum) & (ids < vocab), ids, vocab - 1), 0))


@triton.jit
def _propose(
    logits,
    vocab,
    logits_row,
    maxima,
    noisy,
    proposals,
    masses,
    temperatures,
    log_min_ps,
    top_ks,
    streams,
    positions,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    if (temperature > 0) & ((top_k <= 0) | (top_k >= vocab)):
        parts = tl.arange(0, PARTS_PADDED)
        top = tl.max(tl.load(maxima + row * PARTS + parts, parts < PARTS, float("-inf")), 0)
        key = _noise_key(tl.load(streams + row), tl.load(positions + row))
        ids = part * PART + tl.arange(0, PART)
        x = tl.load(logits + row.to(tl.int64) * logits_row + ids, ids < vocab, float("-inf")).to(tl.float32)
        scaled = (x.to(tl.float64) - top.to(tl.float64)) / temperature
        drawn = tl.where(scaled >= tl.load(log_min_ps + row), scaled + _gumbel(key, ids), float("-inf"))
        best = tl.max(drawn, 0)
        place = row * PARTS + part
        tl.store(noisy + place, best)
        tl.store(proposals + place, tl.min(tl.where((drawn == best) & (ids < vocab), ids, vocab - 1), 0))
        tl.store(masses + place, tl.sum(tl.exp(scaled), 0))


@triton.jit
def _settle(
    logits,
    vocab,
    logits_row,
    maxima,
    argmaxima,
    noisy,
    proposals,
    masses,
    temperatures,
    log_min_ps,
    top_ks,
    streams,
    positions,
    top_ps,
    out,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    parts = tl.arange(0, PARTS_PADDED)
    known = parts < PARTS
    places = row * PARTS + parts
    x = logits + row.to(tl.int64) * logits_row
    tops = tl.load(maxima + places, known, float("-inf"))
    top = tl.max(tops, 0)
    at = tl.load(argmaxima + places, known, 0)
    token = tl.min(tl.where(known & (tops == top), at, vocab - 1), 0)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        top_k = tl.load(top_ks + row)
        top_p = tl.load(top_ps + row)
        key = _noise_key(tl.load(streams + row), tl.load(positions + row))
        if (top_k > 0) & (top_k < vocab):
            floor, last = _kth(x, vocab, top_k, _order(top), TILE)
            mass, best, token = _draw(
                x, vocab, top, temperature, key, floor, last, tl.load(log_min_ps + row), TILE
            )
        else:
            bests = tl.load(noisy + places, known, float("-inf"))
            drawn = tl.load(proposals + places, known, 0)
            token = tl.min(tl.where(known & (bests == tl.max(bests, 0)), drawn, vocab - 1), 0)
            mass = tl.sum(tl.load(masses + places, known, 0.0), 0)
        rejected = top_p < 1
        while rejected:
            floor = _order(tl.load(x + token).to(tl.float32))
            before, best, next_token = _draw(
                x, vocab, top, temperature, key, floor, token - 1, float("-inf"), TILE
            )
            # Without anything before it, it is the likeliest token, which always stays.
            rejected = (best > float("-inf")) & (before >= top_p * mass)
            token = tl.where(rejected, next_token, token)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _draw(x, vocab, top, temperature, key, floor, last, log_min_p, TILE: tl.constexpr):
    """Over the ids whose order is above `floor`, or equal to it and the id at most `last`: their mass, their largest
    noisy logit (of those not below log_min_p; -inf: none) and its id."""
    mass = tl.full([], 0.0, tl.float64)
    best = tl.full([], float("-inf"), tl.float64)
    token = vocab - 1
    for first in range(0, vocab, TILE):
        ids = first + tl.arange(0, TILE)
        values = tl.load(x + ids, ids < vocab, float("-inf")).to(tl.float32)
        order = _order(values)
        kept = (ids < vocab) & ((order > floor) | ((order == floor) & (ids <= last)))
        if tl.max(kept.to(tl.int32), 0) > 0:
            scaled = (values.to(tl.float64) - top.to(tl.float64)) / temperature
            mass += tl.sum(tl.where(kept, tl.exp(scaled), 0.0), 0)
            drawn = tl.where(kept & (scaled >= log_min_p), scaled + _gumbel(key, ids), float("-inf"))
            peak = tl.max(drawn, 0)
            if peak > best:
                best = peak
                token = tl.min(tl.where(drawn == peak, ids, vocab - 1), 0)
    return mass, best, token


@triton.jit
def _kth(x, vocab, top_k, high, TILE: tl.constexpr):
    """The order of the top_k-th largest logit, and the last id of that order that is among the top_k."""
    low = tl.full([], -2139095041, tl.int64)  # the order of -inf
    high = high.to(tl.int64)
    count = vocab
    while (low < high) & (count != top_k):
        middle = low + (high - low + 1) // 2
        reached = _count(x, vocab, middle.to(tl.int32), TILE)
        if reached >= top_k:
            low = middle
            count = reached
        else:
            high = middle - 1
    floor = low.to(tl.int32)
    last = vocab
    if count != top_k:  # of equal logits the lowest ids
        missing = top_k - (count - _count_equal(x, vocab, floor, TILE))
        for first in range(0, vocab, TILE):
            ids = first + tl.arange(0, TILE)
            values = tl.load(x + ids, ids < vocab, float("-inf")).to(tl.float32)
            equal = ((_order(values) == floor) & (ids < vocab)).to(tl.int32)
            found = tl.sum(equal, 0)
            if (missing > 0) & (missing <= found):
                last = tl.min(tl.where((equal > 0) & (tl.cumsum(equal, 0) == missing), ids, vocab), 0)
            missing -= found
    return floor, last


@triton.jit
def _count(x, vocab, floor, TILE: tl.constexpr):
    count = 0
    for first in range(0, vocab, TILE):
        ids = first + tl.arange(0, TILE)
        values = tl.load(x + ids, ids < vocab, float("-inf")).to(tl.float32)
        count += tl.sum(((_order(values) >= floor) & (ids < vocab)).to(tl.int32), 0)
    return count


@triton.jit
def _count_equal(x, vocab, floor, TILE: tl.constexpr):
    count = 0
    for first in range(0, vocab, TILE):
        ids = first + tl.arange(0, TILE)
        values = tl.load(x + ids, ids < vocab, float("-inf")).to(tl.float32)
        count += tl.sum(((_order(values) == floor) & (ids < vocab)).to(tl.int32), 0)
    return count
