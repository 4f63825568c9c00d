"""Compiles launches for GPUs that are not there, and reads what the compiler made of them.

Called by scripts/compile_kernels.py and the tests. Arguments are specialised as Triton's own launcher does it, so that
the code is that which a GPU would run; the tensors of a launch may live anywhere, also on the "meta" device. Says
nothing about results or speed. Must run in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.launch import Launch

# What one program may have of shared memory, in bytes: CUDA C programming guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one architecture. Sizes in bytes; `registers` and `spill_bytes` are of each thread."""

    kernel: str
    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    code_bytes: int
    matrix_unit: str
    compile_s: float


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compiles for compute capability `arch` (90 is 9.0); triton's errors pass through."""
    source, options = _source(launch)
    begun = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    compile_s = time.perf_counter() - begun
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, spill_bytes = _resources(cubin)
    return Compiled(
        kernel=launch.kernel.fn.__name__.strip("_"),
        arch=arch,
        warps=compiled.metadata.num_warps,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        code_bytes=len(cubin),
        matrix_unit=next((unit for unit in ("tcgen05.mma", "wgmma", "mma.sync") if unit in ptx), "-"),
        compile_s=compile_s,
    )


def identity(launch: Launch) -> str:
    """Equal for launches that are compiled to the same code."""
    kinds = {name: _kind(value) for name, value in launch.arguments.items()}
    return repr((launch.kernel.fn.__name__, sorted(kinds.items()), sorted(launch.constants.items())))


def _source(launch: Launch) -> tuple[Any, dict[str, Any]]:
    """What Triton's launcher would compile: pointers and integers with their divisibility, ones as constants."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    options = {name: value for name, value in launch.constants.items() if name in _OPTIONS}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.arguments and launch.arguments[name] is not None:
            kind, special = _kind(launch.arguments[name])
        else:
            kind, special = "constexpr", launch.arguments.get(name, launch.constants.get(name))
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = special
        elif special:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def _kind(value: Any) -> tuple[str, Any]:
    """The type of one argument, and whether 16 divides it; or "constexpr" and the value."""
    if isinstance(value, torch.Tensor):
        offset_bytes = value.storage_offset() * value.element_size()
        return _POINTERS[value.dtype], offset_bytes % 16 == 0  # allocations begin at multiples of 16
    if isinstance(value, float):
        return "fp32", False
    if value == 1:
        return "constexpr", 1
    return ("i32" if -(1 << 31) <= value < 1 << 31 else "i64"), value % 16 == 0


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of each thread, from the header of the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, timeout=60, check=True
        )
    registers = re.search(r"REG:(\d+)", run.stdout)
    stack = re.search(r"STACK:(\d+)", run.stdout)
    local = re.search(r"LOCAL:(\d+)", run.stdout)
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump said {run.stdout!r}")
    return int(registers[1]), int(stack[1]) + int(local[1])
