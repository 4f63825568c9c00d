"""Runs the tests of engine/kernels in processes of their own, and compiles the kernels for GPUs that are not there.

Triton decides at import whether it interprets, so the two cannot share a process, nor either of them this one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((Path(__file__).parent / "kernels").glob("test_*.py"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def run(*arguments: str, **environment: str) -> str:
    """Standard output of a Python process at the root of the project; fails with what it said when it fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="collected by themselves: there is a GPU")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path) -> None:
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), TRITON_INTERPRET="1")
    assert " passed" in out and "skipped" not in out


# What the hot loops are expected to become on each architecture, and how many bytes a thread of attention may spill.
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
SPILLED = {80: 128, 90: 0, 100: 0}


@pytest.mark.parametrize(("case", "arches"), [("Llama-3.1-8B", (80, 90, 100)), ("Qwen3-14B", (90,))])
def test_compiled_ahead(case: str, arches: tuple[int, ...], tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    wanted = [option for arch in arches for option in ("--arch", str(arch))]
    arguments = ("--case", case, *wanted, "--json", str(file))
    printed = run("scripts/compile_kernels.py", *arguments, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (kernel, arch) for kernel in {row["kernel"] for row in rows} for arch in arches
    }
    assert len(rows) == len(arches) * (len(printed.splitlines()) - 2) >= 9 * len(arches)
    for row in rows:
        attends = row["kernel"].startswith("attend")
        assert row["spill_bytes"] <= (SPILLED[row["arch"]] if attends else 64), row
        if row["kernel"] == "attend_tiles":
            assert row["matrix_unit"] == MATRIX_UNIT[row["arch"]]
        if row["kernel"] == "attend_splits":
            assert row["matrix_unit"] == "mma.sync"
            # Two programs fit on a multiprocessor, so that one loads while the other computes.
            assert 2 * row["registers"] * 32 * row["warps"] <= 65536 and 2 * row["shared_bytes"] <= 163 << 10
