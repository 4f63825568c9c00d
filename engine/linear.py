"""A linear layer that keeps its matrix in the layout that the machine multiplies fastest.

On a CPU oneDNN packs the matrix once. Measured on one thread against torch's linear, weights from memory: 1.0 to 2.9
times as fast at 1 to 8 rows, 1.2 to 1.7 at 16 and 32, 1.05 to 1.25 above. Elsewhere it is torch's linear.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_ROWS = (
    32  # oneDNN picks the layout for this many rows; the choice for one row is slow for more, not conversely
)


class Linear:
    """y = x W^T + b. Made with a plain matrix [out, in], to be filled; `pack()` when it is final."""

    __slots__ = ("_packed", "bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._packed: Any = None

    def pack(self) -> None:
        """Gives up the plain matrix for the packed one, which nobody else can read, where there is such a thing."""
        if _packable(self.weight):
            reorder = torch.ops.mkldnn._reorder_linear_weight.default
            self.weight = reorder(self.weight, _ROWS)
            self._packed = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, out]."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        rows = len(x)
        padded = padded_rows(rows)
        if padded != rows:
            x = F.pad(x, (0, 0, 0, padded - rows))
        y: torch.Tensor = self._packed(x, self.weight, self.bias, "none", [], "")
        return y if padded == rows else y[:rows]


def padded_rows(rows: int) -> int:
    """The number of rows that is multiplied for `rows`: one of eight to each power of two, so at most an eighth more
    beyond sixteen rows.

    oneDNN compiles code for each number of rows that it meets and keeps it, half a megabyte each, measured: a server
    that has met every chunk length would hold hundreds of megabytes.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def _packable(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32
