"""Mends Triton's interpreter (TRITON_INTERPRET=1) where it computes otherwise than a GPU does.

It keeps bf16 as raw uint16: `tl.dot` multiplies the bits, and a cast from fp32 cuts them off instead of rounding to the
nearest. The BLAS behind its `tl.dot` may add a row's products in another order in another place of a matrix. Before
Triton 3.9 its fma rounds twice. With this the kernels round as hardware does, so that tests may compare bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def mend() -> None:
    """Patches the interpreter of this process; once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_baton_mended", False):
        return
    builder._baton_mended = True
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def factor(handle: Any) -> npt.NDArray[np.float32]:
        data = _widened(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data
        return np.ascontiguousarray(data, np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        product = np.einsum("ij,jk->ik", factor(a), factor(b))  # no BLAS: each element by the same loop
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = [handle.data.astype(np.float64) for handle in (x, y, z)]  # products of fp32 are exact in fp64
        return interpreter.TensorHandle((wide[0] * wide[1] + wide[2]).astype(z.data.dtype), z.dtype.scalar)

    def mended_cast(original: Any) -> Any:
        def cast_impl(self: Any, source: Any, target: Any, *rest: Any) -> Any:
            kinds = source.dtype.scalar, target.scalar
            if kinds == (tl.bfloat16, tl.float32):
                return interpreter.TensorHandle(_widened(source.data), tl.float32)
            if kinds == (tl.float32, tl.bfloat16):
                return interpreter.TensorHandle(_rounded(source.data), tl.bfloat16)
            return original(self, source, target, *rest)

        return cast_impl

    builder.create_dot = create_dot
    builder.create_fma = create_fma
    builder.cast_impl = mended_cast(cast)
    builder.create_fp_to_fp = mended_cast(convert)


def _widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """To the nearest, ties to even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
