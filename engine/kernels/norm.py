"""RMSNorm, alone or with the residual sum before it, a program for each row.

Rounds where engine.model does: the sum to its dtype, the normalised row (computed in fp32) to its dtype, then the
product with the weight. A row's result depends on that row only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.launch import Launch, check, check_contiguous, power_of_two

_WIDEST = 1 << 16  # of a row: a program holds it in registers


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The norm of x [rows, hidden], or of x + residual, into `out`; the sum replaces `residual`.

    x, residual and out may be rows of wider tensors; out may be x. weight [hidden]. All of one dtype.
    """
    norm_launch(x, weight, eps, out, residual)()
    return out


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The same as engine.model computes it."""
    if residual is not None:
        x = residual.add_(x)
    return out.copy_(F.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight))


def norm_launch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, residual: torch.Tensor | None
) -> Launch:
    """The launch of `rms_norm`."""
    rows, hidden = x.shape
    check(hidden <= _WIDEST, f"a row of {hidden}: at most {_WIDEST} fit")
    check(weight.shape == (hidden,), f"weight of shape {tuple(weight.shape)} for rows of {hidden}")
    check(out.shape == x.shape, f"out of shape {tuple(out.shape)} for {tuple(x.shape)}")
    total = x if residual is None else residual
    check(total.shape == x.shape, f"residual of shape {tuple(total.shape)} for {tuple(x.shape)}")
    check_contiguous(x=x, weight=weight, out=out, residual=total)
    width = power_of_two(hidden)
    return Launch(
        _normalise,
        (rows,),
        {
            "x": x,
            "residual": total,
            "weight": weight,
            "out": out,
            "eps": eps,
            "x_row": x.stride(0),
            "residual_row": total.stride(0),
            "out_row": out.stride(0),
        },
        {
            "HIDDEN": hidden,
            "WIDTH": width,
            "ADD": residual is not None,
            "num_warps": min(16, max(1, width // 512)),
        },
    )


@triton.jit
def _normalise(
    x,
    residual,
    weight,
    out,
    eps,
    x_row,
    residual_row,
    out_row,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    mask = columns < HIDDEN
    kind = out.dtype.element_ty
    values = tl.load(x + row * x_row + columns, mask, 0.0).to(tl.float32)
    if ADD:
        before = tl.load(residual + row * residual_row + columns, mask, 0.0).to(tl.float32)
        rounded = (before + values).to(kind)
        tl.store(residual + row * residual_row + columns, rounded, mask)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / HIDDEN + eps)
    normed = (values * scale).to(kind).to(tl.float32)
    scaled = normed * tl.load(weight + columns, mask, 0.0).to(tl.float32)
    tl.store(out + row * out_row + columns, scaled.to(kind), mask)
