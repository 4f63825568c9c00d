"""Fixtures for all rooms: one thread for torch, since the cores are shared, and the reference model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from tests.support import models

# No deadline for an example: a busy machine would miss it.
hypothesis.settings.register_profile("baton", deadline=None)
hypothesis.settings.load_profile("baton")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Reference:
    """A model folder, prompts, and the tokens that transformers answers with, greedily."""

    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = models.make_llama(tmp_path_factory.mktemp("llama"))
    prompts = models.prompts()
    return Reference(folder, prompts, models.transformers_greedy(folder, prompts))
