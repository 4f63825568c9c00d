"""What a rank gives its mover, where the device is a GPU: without one, so with stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from worker import rank_parts
from worker.spec import WorkerSpec


def test_the_movers_thread_is_told_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not set a "cuda" without an index, which is what specs say; the tensors there have one."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(rank_parts, "Mover", lambda *_, **named: given.update(named))
    spec = WorkerSpec(role="decode", worker_id="d", incarnation="i", token="t", model_path="m", device="cuda")
    cache = SimpleNamespace(
        device=torch.device("cuda"), layers=[SimpleNamespace(device=torch.device("cuda", 0))]
    )
    parts = rank_parts.RankParts(
        spec, cast(Any, SimpleNamespace(kv_cache=cache)), cast(Any, None), cast(Any, "memory")
    )
    parts.start_mover(lambda report: None, lambda error: None)
    chosen: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    given["set_device"]()
    assert chosen == [0]
