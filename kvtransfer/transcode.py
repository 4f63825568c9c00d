"""KV as 8-bit codes with one fp32 scale for each head and group of tokens: how it crosses when that is configured.

The layout calls it, layer by layer; the kernels of `kvtransfer.kernels` do the same on a GPU, bit for bit. Each group
of SCALE_TOKENS tokens (counted from the piece's first) has the scale largest magnitude / largest code, so the largest
value is exact but for rounding, and an all-zero group stays zero. What it loses was measured: docs/kv-dtypes.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvtransfer.plan import SCALE_TOKENS

LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0}


def groups(tokens: int) -> int:
    """Scales of so many tokens of one head."""
    return -(-tokens // SCALE_TOKENS)


def encode(values: torch.Tensor, wire_dtype: str, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantises values [heads, 2, tokens, dim] into codes (uint8, same shape) and scales [heads, 2, groups] (fp32).

    A group with a value that is not finite decodes to values none of which is finite.
    """
    heads, kv, tokens, dim = values.shape
    padded = F.pad(values.float(), (0, 0, 0, -tokens % SCALE_TOKENS))
    grouped = padded.view(heads, kv, -1, SCALE_TOKENS, dim)
    scale = grouped.abs().amax(dim=(3, 4)) / LARGEST[wire_dtype]
    scales.copy_(scale)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = (grouped / divisor[..., None, None]).view(heads, kv, -1, dim)[:, :, :tokens]
    if wire_dtype == "int8":
        codes.copy_(scaled.round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8))
    else:
        codes.copy_(scaled.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def decode(codes: torch.Tensor, scales: torch.Tensor, wire_dtype: str) -> torch.Tensor:
    """The values [heads, 2, tokens, dim] (fp32) of codes (uint8) and scales [heads, 2, groups]."""
    tokens = codes.shape[2]
    coded = codes.contiguous().view(torch.int8 if wire_dtype == "int8" else torch.float8_e4m3fn).float()
    each = scales.repeat_interleave(SCALE_TOKENS, dim=2)[:, :, :tokens]
    return coded.mul_(each[..., None])
