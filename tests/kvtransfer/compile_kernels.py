"""Compiles the kernels of the transfer for GPUs that need not be there: `python -m tests.kvtransfer.compile_kernels`.

In a process of its own: one with TRITON_INTERPRET compiles nothing. Prints a line for each; says nothing about speed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtransfer.kernels import move
from kvtransfer.layout import DTYPES
from kvtransfer.plan import Piece, wire_bytes

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
CASES = [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "int8"), ("float16", "fp8_e4m3")]


def launch_of(kernel: Any, stored: str, wire: str) -> move.Launch:
    """As of a model with 8 kv heads of 128, blocks of 16."""
    layers = list(torch.zeros((2, 2, 4, 16, 8, 128), dtype=DTYPES[stored]))
    size = wire_bytes(wire, 2, 128, 8, 40)
    piece = Piece(0, 0, 8, 0, 40, 0, size, range(8))
    (launch,) = move.launches(kernel, layers, [0, 1, 2], 3, piece, wire, torch.zeros(size, dtype=torch.uint8))
    return launch


def compile_for(launch: move.Launch, arch: int) -> Any:
    signature, constants = {}, {}
    options = {"num_warps": launch.constants["num_warps"]}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif value is not None and value != 1:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[(index,)] = launch.constants.get(name, value)
    return triton.compile(
        ASTSource(launch.kernel, signature, constants), target=GPUTarget("cuda", arch, 32), options=options
    )


def main() -> None:
    for stored, wire in CASES:
        for kernel in (move._gather, move._scatter):
            launch = launch_of(kernel, stored, wire)
            for arch in (80, 90, 100):
                made = compile_for(launch, arch)
                name = kernel.fn.__name__.strip("_")
                print(f"{name} {stored} as {wire} sm_{arch}: {len(made.asm['cubin'])} bytes", flush=True)


if __name__ == "__main__":
    main()
