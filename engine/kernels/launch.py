"""One launch of a kernel as a value: what to run over which grid, with which arguments.

Every kernel's file makes its launches with a pure function and runs them in another; `ahead` compiles the very launches
that the engine would run, so that what is checked without a GPU is what runs on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Kernels count in int32 but for addresses; a window of so many tokens is none.
NO_WINDOW = (1 << 31) - 1
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tables:
    """The block tables of some sequences, one behind the other: `blocks` int32 [all of them], and where each begins in
    it, `starts` int32 [rows]. So a step copies no more than is used, to an address that stays."""

    blocks: torch.Tensor
    starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """`kernel` over `grid`; `arguments` by name, compile-time constants and options (num_warps) among `constants`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]

    def __call__(self) -> None:
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.constants)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`: tiles of a kernel have no other sizes."""
    return 1 << max(0, number - 1).bit_length()


def check(condition: bool, message: str) -> None:
    """ValueError unless `condition`: kernels read whatever is at an address, so shapes are looked at before."""
    if not condition:
        raise ValueError(message)


def check_contiguous(**tensors: torch.Tensor) -> None:
    """ValueError that names the tensor whose last dimension is not contiguous."""
    for name, tensor in tensors.items():
        check(
            tensor.stride(-1) == 1, f"{name}: stride {tensor.stride()}, its last dimension must be contiguous"
        )
