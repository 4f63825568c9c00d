"""SiLU of the gate times the up projection, from the fused projection's output.

Rounds where torch does: SiLU (computed in fp32) to the dtype, then the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.launch import Launch, check, check_contiguous

_WIDTH = 1024


def silu_mul(fused: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of fused [rows, 2 * width] (gate, then up), into out [rows, width]."""
    silu_launch(fused, out)()
    return out


def silu_mul_reference(fused: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The same in torch."""
    gate, up = fused.chunk(2, -1)
    return out.copy_(F.silu(gate).mul_(up))


def silu_launch(fused: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch of `silu_mul`."""
    rows, width = out.shape
    check(fused.shape == (rows, 2 * width), f"{tuple(fused.shape)} into {tuple(out.shape)}")
    check_contiguous(fused=fused, out=out)
    return Launch(
        _silu_mul,
        (rows, -(-width // _WIDTH)),
        {"fused": fused, "out": out, "width": width, "fused_row": fused.stride(0), "out_row": out.stride(0)},
        {"WIDTH": _WIDTH, "num_warps": 4},
    )


@triton.jit
def _silu_mul(fused, out, width, fused_row, out_row, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < width
    kind = out.dtype.element_ty
    gate = tl.load(fused + row * fused_row + columns, mask, 0.0).to(tl.float32)
    up = tl.load(fused + row * fused_row + width + columns, mask, 0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + row * out_row + columns, (silu * up).to(kind), mask)
