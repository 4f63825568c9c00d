"""One piece between a pool on a GPU and its bytes in wire order: copied, converted, or as 8-bit codes with scales.

`kvtransfer.layout` calls `gather` and `scatter`; their twins in torch are what it does on a CPU. A program moves one
group of SCALE_TOKENS tokens of one head of k or v of one layer, so that it sees all that shares a scale.

    pool   [layer][k/v, block, offset, head, dim]   strided: layers of one allocation are one launch
    piece  scales [head, layer, k/v, group] fp32 when quantised, then values [head, layer, k/v, token, dim]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Launch, power_of_two
from kvtransfer.plan import SCALE_TOKENS, SCALED, Piece

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPY, _INT8, _FP8 = 0, 1, 2
_KIND = {"int8": _INT8, "fp8_e4m3": _FP8}


def gather(
    layers: Sequence[torch.Tensor],
    blocks: Sequence[int],
    offset: int,
    piece: Piece,
    wire_dtype: str,
    part: torch.Tensor,
) -> None:
    """Fills `part` (uint8, piece.size_bytes, on the pool's device) with the piece of the chunk whose first token is the
    one at `offset` in blocks[0]. Nothing is checked but by the caller."""
    for launch in launches(_gather, layers, blocks, offset, piece, wire_dtype, part):
        launch()


def scatter(
    layers: Sequence[torch.Tensor],
    blocks: Sequence[int],
    offset: int,
    piece: Piece,
    wire_dtype: str,
    part: torch.Tensor,
) -> None:
    """The inverse of `gather`: writes the piece in `part` into the pool, and nothing else."""
    for launch in launches(_scatter, layers, blocks, offset, piece, wire_dtype, part):
        launch()


def launches(
    kernel: Any,
    layers: Sequence[torch.Tensor],
    blocks: Sequence[int],
    offset: int,
    piece: Piece,
    wire_dtype: str,
    part: torch.Tensor,
) -> list[Launch]:
    """One launch for all layers where they lie at equal distances, else one for each."""
    first = layers[0]
    stored, dim = first.dtype, first.shape[-1]
    groups = -(-piece.tokens // SCALE_TOKENS)
    if wire_dtype in SCALED:
        scale_bytes = 4 * 2 * len(layers) * piece.heads * groups
        values, scales = part[scale_bytes:], part[:scale_bytes].view(torch.float32)
    elif _DTYPES[wire_dtype] != stored:
        values, scales = part.view(_DTYPES[wire_dtype]), part  # scales: any pointer, it is not read
    else:
        # Bits are moved, whatever they mean.
        head_bytes = dim * first.element_size()
        word = next(dtype for size, dtype in _WORDS if head_bytes % size == 0)
        layers = [layer.view(word) for layer in layers]
        values, scales, dim = part.view(word), part, layers[0].shape[-1]
    ids = torch.tensor(blocks, dtype=torch.int64, device=first.device)
    apart = _distance(layers)
    together = len(layers) if apart is not None else 1
    kv, block, token, head, _ = layers[0].stride()
    return [
        Launch(
            kernel,
            (groups, 2 * together, piece.heads),
            {
                "pool": layers[index],
                "values": values,
                "scales": scales,
                "blocks": ids,
                "layer_stride": apart or 0,
                "kv_stride": kv,
                "block_stride": block,
                "token_stride": token,
                "head_stride": head,
                "begin": offset + piece.first,
                "tokens": piece.tokens,
                "first_head": piece.head,
                "first_layer": index,
                "layers": len(layers),
                "groups": groups,
            },
            {
                "BLOCK_SIZE": layers[0].shape[2],
                "DIM": dim,
                "DIM_PADDED": power_of_two(dim),
                "GROUP": SCALE_TOKENS,
                "KIND": _KIND.get(wire_dtype, _COPY),
                "num_warps": 4,
            },
        )
        for index in range(0, len(layers), together)
    ]


def _distance(layers: Sequence[torch.Tensor]) -> int | None:
    """Elements from each layer to the next; None when they do not lie at equal distances."""
    if len(layers) == 1:
        return 0
    addresses = [layer.data_ptr() for layer in layers]
    found = {after - before for before, after in pairwise(addresses)}
    apart = found.pop()
    size = layers[0].element_size()
    return apart // size if not found and apart > 0 and apart % size == 0 else None


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _places(
    blocks, layer_stride, kv_stride, block_stride, token_stride, head_stride, begin, tokens, first_head,
    first_layer, layers, groups, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Where this program's tokens are in the pool and in the piece [GROUP, DIM_PADDED], which there are, and where
    its scale is."""
    group = tl.program_id(0)
    layer = tl.program_id(1) // 2
    kv = tl.program_id(1) % 2
    head = tl.program_id(2)
    token = group * GROUP + tl.arange(0, GROUP)
    column = tl.arange(0, DIM_PADDED)
    exists = (token < tokens)[:, None] & (column < DIM)[None, :]
    at = begin + token
    block = tl.load(blocks + at // BLOCK_SIZE, mask=token < tokens, other=0)
    pool = layer.to(tl.int64) * layer_stride + kv * kv_stride + (first_head + head) * head_stride
    pool += block * block_stride + (at % BLOCK_SIZE) * token_stride
    row = (head.to(tl.int64) * layers + first_layer + layer) * 2 + kv
    piece = (row * tokens + token) * DIM
    return pool[:, None] + column[None, :], piece[:, None] + column[None, :], exists, row * groups + group


@triton.jit
def _gather(
    pool, values, scales, blocks, layer_stride, kv_stride, block_stride, token_stride, head_stride, begin, tokens,
    first_head, first_layer, layers, groups, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    source, target, exists, scale_at = _places(
        blocks, layer_stride, kv_stride, block_stride, token_stride, head_stride, begin, tokens, first_head,
        first_layer, layers, groups, BLOCK_SIZE, DIM, DIM_PADDED, GROUP,
    )  # fmt: skip
    found = tl.load(pool + source, mask=exists, other=0)
    if KIND == 0:
        if pool.dtype.element_ty == values.dtype.element_ty:
            tl.store(values + target, found, mask=exists)
        else:
            tl.store(values + target, found.to(tl.float32).to(values.dtype.element_ty), mask=exists)
    else:
        number = found.to(tl.float32)
        # A group with anything that is not finite has no scale: all of it decodes to not-a-number.
        magnitude = tl.where(number == number, tl.abs(number), float("inf"))
        largest = tl.max(tl.max(magnitude, 1), 0)
        limit = 127.0 if KIND == 1 else 448.0
        scale = tl.where(largest < float("inf"), tl.div_rn(largest, limit), float("nan"))
        tl.store(scales + scale_at, scale)
        scaled = tl.where(scale > 0, tl.div_rn(number, tl.where(scale > 0, scale, 1.0)), 0.0)
        scaled = tl.minimum(tl.maximum(scaled, -limit), limit)
        if KIND == 1:
            # Adding 1.5 * 2^23 leaves no fraction: rounds to the nearest, ties to even.
            code = ((scaled + 12582912.0) - 12582912.0).to(tl.int32).to(tl.int8).to(tl.uint8, bitcast=True)
        else:
            code = _encode_fp8(scaled)
        tl.store(values + target, code, mask=exists)


@triton.jit
def _scatter(
    pool, values, scales, blocks, layer_stride, kv_stride, block_stride, token_stride, head_stride, begin, tokens,
    first_head, first_layer, layers, groups, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    target, source, exists, scale_at = _places(
        blocks, layer_stride, kv_stride, block_stride, token_stride, head_stride, begin, tokens, first_head,
        first_layer, layers, groups, BLOCK_SIZE, DIM, DIM_PADDED, GROUP,
    )  # fmt: skip
    found = tl.load(values + source, mask=exists, other=0)
    if KIND == 0:
        if pool.dtype.element_ty == values.dtype.element_ty:
            tl.store(pool + target, found, mask=exists)
        else:
            tl.store(pool + target, found.to(tl.float32).to(pool.dtype.element_ty), mask=exists)
    else:
        if KIND == 1:
            number = found.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            number = _decode_fp8(found)
        number *= tl.load(scales + scale_at)
        tl.store(pool + target, number.to(pool.dtype.element_ty), mask=exists)


# e4m3 in integer operations, since not every GPU that Triton compiles for converts it: 4 bits of exponent with bias 7,
# 3 of mantissa, largest 448, no infinities (OCP 8-bit Floating Point Specification, 2023).


@triton.jit
def _encode_fp8(number):
    """The codes of fp32 numbers of magnitude up to 448: to the nearest, ties to even."""
    bits = number.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 a code counts steps of 2^-9; beside 2^23 the unit is one step, and the sum is rounded to it.
    small = (tl.abs(number) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    return (sign | tl.where(tl.abs(number) < 0.015625, small, normal)).to(tl.uint8)


@triton.jit
def _decode_fp8(code):
    bits = code.to(tl.int32)
    magnitude = bits & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    return tl.where(bits >= 0x80, -number, number)
