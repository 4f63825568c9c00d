"""A thousand requests of all kinds: nothing stays behind, and memory is flat."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from baton.v1 import inference_pb2 as api
from tests.support.deployment import Deployment, deployed

pytestmark = [pytest.mark.e2e, pytest.mark.nixl, pytest.mark.slow, pytest.mark.timeout(400)]

REQUESTS = 1000
CONCURRENCY = 32


def _sampling(rng: random.Random) -> dict[str, Any]:
    """Random parameters of every kind."""
    sampling: dict[str, Any] = {
        "temperature": rng.choice((0.0, 0.7, 1.3)),
        "max_tokens": rng.randrange(1, 48),
    }
    if rng.random() < 0.3:
        sampling["top_k"] = rng.randrange(1, 60)
    if rng.random() < 0.3:
        sampling["top_p"] = rng.uniform(0.2, 1.0)
    if rng.random() < 0.2:
        sampling["min_p"] = rng.uniform(0.0, 0.3)
    if rng.random() < 0.2:
        sampling["repetition_penalty"] = rng.uniform(0.8, 1.5)
    if rng.random() < 0.2:
        sampling["presence_penalty"] = rng.uniform(-1, 1)
    if rng.random() < 0.1:
        sampling["logit_bias"] = {rng.randrange(256): rng.uniform(-50, 50)}
    if rng.random() < 0.2:
        sampling["logprobs"] = rng.randrange(5)
    if rng.random() < 0.05:
        sampling["prompt_logprobs"] = rng.randrange(3)
    if rng.random() < 0.15:
        sampling["n"] = rng.randrange(2, 5)
    if rng.random() < 0.3:
        sampling["ignore_eos"] = True
    if rng.random() < 0.2:
        sampling["stop"] = [chr(rng.randrange(97, 123))]
    return sampling


async def _one(deployment: Deployment, rng: random.Random, shared: list[int]) -> str:
    """One request; its outcome."""
    prompt = shared[: rng.choice((0, 0, 64, 200))] + [
        rng.randrange(256) for _ in range(rng.randrange(1, 400))
    ]
    request = api.GenerateRequest(
        token_ids=api.TokenIds(ids=prompt),
        sampling=api.SamplingParams(**_sampling(rng)),
        priority=rng.randrange(-2, 3),
        cache_salt=rng.choice(("", "", "a")),
    )
    leave_after = rng.randrange(1, 10) if rng.random() < 0.15 else None
    call = deployment.stub.Generate(request, timeout=60)
    events = 0
    async for event in call:
        if event.HasField("finished"):
            return f"{event.finished.reason}/{event.finished.trace.prefilled or 'none'}"
        events += 1
        if events == leave_after:
            call.cancel()
            return "left"
    raise AssertionError("the stream ended without a terminal event")


async def test_a_thousand_mixed_requests(tmp_path: Path) -> None:
    """Concurrency 32, both routes, random parameters, priorities, cancels, a pool small enough to preempt."""
    rng = random.Random(5)
    shared = [rng.randrange(256) for _ in range(200)]
    settings = {
        "cluster__launcher": "plain",
        "router__policy": "threshold",
        "router__local_below_tokens": 150,
        "decode__kv_cache_gib": 0.01,
        "prefill__kv_cache_gib": 0.01,
    }
    async with deployed(tmp_path, **settings) as deployment:
        gate = asyncio.Semaphore(CONCURRENCY)
        outcomes: dict[str, int] = {}

        async def guarded() -> None:
            async with gate:
                try:
                    outcome = await _one(deployment, rng, shared)
                except grpc.aio.AioRpcError as error:
                    outcome = f"{error.code().name}: {error.details()}"
                outcomes[outcome] = outcomes.get(outcome, 0) + 1

        await asyncio.gather(*(guarded() for _ in range(REQUESTS // 2)))
        halfway = await _memory(deployment)
        await asyncio.gather(*(guarded() for _ in range(REQUESTS // 2)))
        workers = await deployment.at_rest()
        end = await _memory(deployment)
        kinds = {outcome.split("/")[0] for outcome in outcomes}
        assert kinds == {"stop", "length", "left"}, outcomes
        assert workers["decode-0"].counters["prefilled_remote"] > 100, outcomes
        assert workers["decode-0"].counters["prefilled_local"] > 100, outcomes
        assert workers["decode-0"].counters["digest_refused"] == 0
        for name, before in halfway.items():
            assert end[name] < before * 1.05 + (8 << 20), (
                f"{name} grew from {before >> 20} to {end[name] >> 20} MiB"
            )


async def _memory(deployment: Deployment) -> dict[str, int]:
    """Resident bytes of each process, at rest."""
    workers = await deployment.at_rest()
    sizes = {}
    for name, worker in workers.items():
        sizes[f"{name} shell"] = psutil.Process(worker.pid).memory_info().rss
        sizes[f"{name} engine"] = psutil.Process(worker.engine_pid).memory_info().rss
    for pid in deployment.left():
        if "router" in psutil.Process(pid).cmdline():
            sizes["router"] = psutil.Process(pid).memory_info().rss
    assert "router" in sizes
    return sizes
