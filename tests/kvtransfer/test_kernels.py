"""The transfer's kernels without a GPU: their tests in Triton's interpreter; compiled ahead for three kinds of GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_they_equal_their_twins_in_the_interpreter() -> None:
    output = run(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kvtransfer/kernels", TRITON_INTERPRET="1"
    )
    assert " passed" in output and "skipped" not in output


def test_they_compile_for_gpus_that_are_not_here() -> None:
    environment = {"TRITON_INTERPRET": "0"}
    output = run("-m", "tests.kvtransfer.compile_kernels", **environment)
    for arch in (80, 90, 100):
        assert output.count(f"sm_{arch}: ") == 8
