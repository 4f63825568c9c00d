"""A rank that dies or stops: requests survive as the design says, and the worker is whole again by itself."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.v1 import inference_pb2 as api
from tests.conftest import Reference
from tests.support.deployment import Deployment, deployed
from tests.support.workers import open_pair, start_worker

pytestmark = [pytest.mark.e2e, pytest.mark.nixl, pytest.mark.timeout(240)]

OPTIONS = {"chunk_tokens": 64}


async def test_prefill_rank_killed_under_load(reference: Reference) -> None:
    """kill -9 of rank 1 in the middle: the whole worker ends, every request has the right tokens, all comes back."""
    async with open_pair(
        reference.folder,
        prefill_tp=2,
        decode_tp=2,
        prefill={**OPTIONS, "max_batch_tokens": 32},
        decode=OPTIONS,
    ) as pair:
        client = pair.client
        keys = [await client.submit(prompt, prefill="prefill-0") for prompt in reference.prompts]
        # Some hand-offs are complete, some under way, some not begun: tokens of a remote prompt have come.
        await client.tokens(keys[12], 1)
        os.kill(pair.prefill.rank_pid(1), signal.SIGKILL)
        answers = [await client.answer(key) for key in keys]
        assert [answer.ids for answer in answers] == reference.answers
        assert any(answer.trace.fallback for answer in answers)
        await pair.prefill.ended()
        await (
            client.at_rest()
        )  # quarantined slots too: every rank probes until nothing of the dead can arrive
        again = await start_worker("prefill", reference.folder, tensor_parallel=2, **OPTIONS)
        await pair.replace_prefill(again)
        after = await client.ask([5, *reference.prompts[18]], prefill="prefill-0")
        assert after.trace.prefilled == "remote"
        await client.at_rest()


async def test_prefill_rank_frozen(reference: Reference) -> None:
    """SIGSTOP of rank 1: the deadline ends the wait with the right answer; then the others find the rank stuck."""
    async with open_pair(
        reference.folder,
        prefill_tp=2,
        prefill={**OPTIONS, "max_batch_tokens": 16, "rank_timeout_s": 3.0},
        decode={**OPTIONS, "handoff_timeout_s": 1.0},
    ) as pair:
        client = pair.client
        key = await client.submit(reference.prompts[19], prefill="prefill-0")
        await client.until(lambda status: status.ledger.slots_leased > 0)
        frozen = pair.prefill.rank_pid(1)
        os.kill(frozen, signal.SIGSTOP)
        answer = await client.answer(key)
        assert answer.ids == reference.answers[19]
        assert "not complete" in answer.trace.fallback or "lost" in answer.trace.fallback
        assert await asyncio.wait_for(pair.prefill.process.wait(), 30) == 1
        # A stopped process cannot end by itself, and while it may go on its bytes may come.
        os.kill(frozen, signal.SIGKILL)
        await pair.prefill.ended()
        await client.at_rest()


@pytest.mark.parametrize("rank", [0, 1])
async def test_decode_rank_killed_ends_the_worker(reference: Reference, rank: int) -> None:
    """A worker is whole or gone: its streams break, so that a router hears of it, and no process stays."""
    decode = await start_worker("decode", reference.folder, tensor_parallel=2)
    os.kill(decode.rank_pid(rank), signal.SIGKILL)
    await decode.ended()
    assert decode.process.returncode == 1


def _whole(workers: dict[str, api.WorkerStatus], before: dict[str, api.WorkerStatus], replaced: str) -> bool:
    """Both are there, linked, and this one has a new life."""
    return (
        {"prefill-0", "decode-0"} <= set(workers)
        and all(worker.alive for worker in workers.values())
        and workers[replaced].incarnation != before[replaced].incarnation
        and workers["prefill-0"].incarnation in workers["decode-0"].peers
    )


async def _survives(deployment: Deployment, worker_id: str, rank: int, how: signal.Signals) -> None:
    """Strikes one rank while requests run; whoever is told to try again does; then all is whole and used again."""
    prompts = [f"{worker_id}, rank {rank}, prompt {number}: " + "x" * 300 for number in range(6)]
    before = await deployment.workers()
    assert len(before[worker_id].engine_pids) == 2
    undisturbed = [(await deployment.generate(prompt, 8))[0] for prompt in prompts[:2]]
    tasks = [asyncio.create_task(_patient(deployment, prompt)) for prompt in prompts]
    await deployment.until(lambda workers: any(worker.running for worker in workers.values()))
    struck = before[worker_id].engine_pids[rank]
    os.kill(struck, how)
    answers = await asyncio.gather(*tasks)
    assert answers[:2] == undisturbed
    workers = await deployment.until(lambda workers: _whole(workers, before, worker_id))
    assert all(not Path(f"/proc/{pid}").exists() for pid in before[worker_id].engine_pids)
    assert len(workers[worker_id].engine_pids) == 2
    await deployment.at_rest()
    ids, finished = await deployment.generate("after: " + prompts[0], 8)
    assert finished.trace.prefilled == "remote" and len(ids) == 8


async def _patient(deployment: Deployment, prompt: str) -> list[int]:
    """Asks again while there is no worker to answer, as a client is told to."""
    async with asyncio.timeout(90):
        while True:
            try:
                return (await deployment.generate(prompt, 8))[0]
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                await asyncio.sleep(0.2)


STRIKES = [
    ("prefill-0", 1, signal.SIGKILL),
    ("decode-0", 1, signal.SIGKILL),
    ("prefill-0", 1, signal.SIGSTOP),
    ("decode-0", 1, signal.SIGSTOP),
]


@pytest.mark.slow
async def test_struck_ranks_are_replaced(tmp_path: Path) -> None:
    """Through the supervisor, whose plain launcher starts the ranks; one deployment takes all blows."""
    ranks: dict[str, Any] = {"prefill__tensor_parallel": 2, "decode__tensor_parallel": 2}
    settings = {
        **ranks,
        "cluster__launcher": "plain",
        "cluster__silence_s": 3.0,
        "cluster__restart_backoff_s": 0.1,
        "cluster__restart_backoff_max_s": 0.2,
        "router__policy": "always-remote",
        "kvtransfer__handoff_timeout_s": 2.0,
        "decode__block_size": 8,
    }
    async with deployed(tmp_path, **settings) as deployment:
        for worker_id, rank, how in STRIKES:
            await _survives(deployment, worker_id, rank, how)


@pytest.mark.slow
@pytest.mark.ray
async def test_a_struck_rank_is_replaced_under_ray(tmp_path: Path) -> None:
    """Each rank is an actor there; the death of one ends and restarts them all.

    The prefill ranks meet as they would on several nodes: over TCP, summing with torch.distributed.
    """
    settings = {
        "prefill__tensor_parallel": 2,
        "prefill__placement": "spread",
        "decode__tensor_parallel": 2,
        "router__policy": "always-remote",
        "cluster__restart_backoff_s": 0.1,
    }
    async with deployed(tmp_path, **settings) as deployment:
        await _survives(deployment, "decode-0", 1, signal.SIGKILL)
        await _survives(deployment, "prefill-0", 1, signal.SIGKILL)
