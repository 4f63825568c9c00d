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

    A group with a value that is not finite has no scale: all of it decodes to not-a-number.
    """
    heads, kv, tokens, dim = values.shape
    padded = F.pad(values.float(), (0, 0, 0, -tokens % SCALE_TOKENS))
    grouped = padded.view(heads, kv, -1, SCALE_TOKENS, dim)
    largest = grouped.abs().amax(dim=(3, 4))
    scale = torch.where(largest < torch.inf, largest / LARGEST[wire_dtype], torch.nan)
    scales.copy_(scale)
    usable = (scale > 0)[..., None, None]
    scaled = torch.where(usable, grouped / torch.where(scale > 0, scale, 1.0)[..., None, None], 0.0)
    limit = LARGEST[wire_dtype]
    scaled = scaled.view(heads, kv, -1, dim)[:, :, :tokens].clamp_(-limit, limit)
    coded = scaled.round_().to(torch.int8) if wire_dtype == "int8" else scaled.to(torch.float8_e4m3fn)
    codes.copy_(coded.view(torch.uint8))


def decode(codes: torch.Tensor, scales: torch.Tensor, wire_dtype: str) -> torch.Tensor:
    """The values [heads, 2, tokens, dim] (fp32) of codes (uint8) and scales [heads, 2, groups]."""
    tokens = codes.shape[2]
    coded = codes.contiguous().view(torch.int8 if wire_dtype == "int8" else torch.float8_e4m3fn).float()
    each = scales.repeat_interleave(SCALE_TOKENS, dim=2)[:, :, :tokens]
    return coded.mul_(each[..., None])
