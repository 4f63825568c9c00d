"""These tests run on a GPU, or in Triton's interpreter when TRITON_INTERPRET=1 was set before Triton was imported.

In a process where neither holds they are not collected: ../test_kernels.py runs them in processes of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

if INTERPRETED:
    from tests.support.triton_interpreter import mend

    mend()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
