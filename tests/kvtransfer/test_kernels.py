"""The transfer's kernels without a GPU: their tests in Triton's interpreter; compiled ahead for three kinds of GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def run(*arguments: str, **environment: str) -> str:
    """Standard output of a Python process; Triton decides at import whether it interprets."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="collected by themselves: there is a GPU")
def test_they_equal_their_twins_in_the_interpreter() -> None:
    output = run(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kvtransfer/kernels", TRITON_INTERPRET="1"
    )
    assert " passed" in output and "skipped" not in output


def test_they_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    output = run("-m", "tests.kvtransfer.compile_kernels", TRITON_CACHE_DIR=str(tmp_path))
    for arch in (80, 90, 100):
        assert output.count(f"sm_{arch}: ") == 8
    assert output.count(" 0 bytes spilled") == 24
