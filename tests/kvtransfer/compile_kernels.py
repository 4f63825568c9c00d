"""Compiles the kernels of the transfer for GPUs that need not be there: `python -m tests.kvtransfer.compile_kernels`.

In a process of its own: one with TRITON_INTERPRET compiles nothing. Prints a line for each; says nothing about speed.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.ahead import compile_launch
from engine.kernels.launch import Launch
from kvtransfer.kernels import move
from kvtransfer.layout import DTYPES
from kvtransfer.plan import Piece, wire_bytes

CASES = [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "int8"), ("float16", "fp8_e4m3")]


def launch_of(kernel: Any, stored: str, wire: str) -> Launch:
    """As of a model with 8 kv heads of 128, blocks of 16."""
    layers = list(torch.zeros((2, 2, 4, 16, 8, 128), dtype=DTYPES[stored]))
    size = wire_bytes(wire, 2, 128, 8, 40)
    piece = Piece(0, 0, 8, 0, 40, 0, size, range(8))
    (launch,) = move.launches(kernel, layers, [0, 1, 2], 3, piece, wire, torch.zeros(size, dtype=torch.uint8))
    return launch


def main() -> None:
    for stored, wire in CASES:
        for kernel in (move._gather, move._scatter):
            launch = launch_of(kernel, stored, wire)
            for arch in (80, 90, 100):
                made = compile_launch(launch, arch)
                print(
                    f"{made.kernel} {stored} as {wire} sm_{arch}: {made.registers} registers, "
                    f"{made.spill_bytes} bytes spilled, {made.shared_bytes} shared",
                    flush=True,
                )


if __name__ == "__main__":
    main()
