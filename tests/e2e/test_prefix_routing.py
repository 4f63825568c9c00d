"""Real workers, a real router: prompts go where their prefix is, and every router knows that by what workers say."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import msgspec
import pytest

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc
from baton.v1 import worker_pb2 as pb
from router.dispatch import WorkerDispatcher
from router.prompt_hints import PromptHints
from router.spec import RouterSpec, RouterStarted
from tests.support.deployment import TINY
from tests.support.workers import TOKEN, WAIT_TIMEOUT_S, DecodeClient, Worker, set_members, start_worker

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

POOL = 64  # blocks of 16 tokens
SPEC = RouterSpec(
    token=TOKEN,
    http="127.0.0.1:0",
    grpc="127.0.0.1:0",
    model_path=str(TINY),
    served_name="tiny",
    max_model_len=1000,
    policy="threshold",  # among equals it takes the first worker
)


@asynccontextmanager
async def router_process(workers: list[Worker]) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(SPEC) + b"\n")
        line = await asyncio.wait_for(process.stdout.readline(), WAIT_TIMEOUT_S)
        started = msgspec.json.decode(line, type=RouterStarted)
        await set_members(started.grpc, 1, workers)
        async with grpc.aio.insecure_channel(started.grpc) as channel:
            yield inference_pb2_grpc.InferenceStub(channel)
    finally:
        process.stdin.close()
        await asyncio.wait_for(process.wait(), WAIT_TIMEOUT_S)


async def knows_all(stub: inference_pb2_grpc.InferenceStub) -> api.StatusResponse:
    """Waits until the router knows of each worker exactly what that worker has in its cache, at rest."""
    async with asyncio.timeout(WAIT_TIMEOUT_S):
        while True:
            status: api.StatusResponse = await stub.Status(api.StatusRequest(), timeout=10)
            cached = sum(worker.ledger.blocks_cached for worker in status.workers)
            idle = not any(worker.running or worker.ledger.blocks_held for worker in status.workers)
            resyncs = status.prefix_index.resyncs
            if idle and resyncs == len(status.workers) and status.prefix_index.entries == cached:
                return status
            await asyncio.sleep(0.02)


async def ask(stub: inference_pb2_grpc.InferenceStub, prompt: list[int]) -> api.Trace:
    request = api.GenerateRequest(
        token_ids=api.TokenIds(ids=prompt),
        sampling=api.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True),
    )
    async for event in stub.Generate(request, timeout=WAIT_TIMEOUT_S):
        if event.HasField("finished"):
            trace: api.Trace = event.finished.trace
            return trace
    raise AssertionError("the stream ended without a terminal event")


def _member(worker: Worker) -> pb.Member:
    spec = worker.spec
    return pb.Member(
        worker_id=spec.worker_id,
        role=spec.role,
        incarnation=spec.incarnation,
        address=worker.started.address,
    )


async def test_prompts_go_where_their_prefix_is() -> None:
    first, second = await asyncio.gather(
        *(
            start_worker("decode", TINY, worker_id=f"decode-{at}", slots=0, kv_cache_bytes=POOL << 15)
            for at in range(2)
        )
    )
    workers = [first, second]
    prompts = [[at] * 300 for at in range(8)]
    try:
        async with DecodeClient(second) as other:
            # Not by this router: it can only know from the worker.
            assert (await other.ask(prompts[0], tokens=2)).trace.cached_tokens == 0
            async with router_process(workers) as stub:
                await knows_all(stub)
                trace = await ask(stub, prompts[0])
                assert (trace.decode_worker, trace.cached_tokens) == ("decode-1", 288)
                trace = await ask(stub, prompts[1])
                assert (trace.decode_worker, trace.cached_tokens) == ("decode-0", 0)
                await asyncio.gather(*(other.ask(prompt, tokens=40) for prompt in prompts[2:]))
                status = await knows_all(stub)
                evictions = {w.worker_id: w.counters.get("evictions", 0) for w in status.workers}
                assert evictions["decode-1"], "the pool was to overflow"
                assert status.prefix_index.gaps == 0
                # What was evicted there is not looked for there any more.
                trace = await ask(stub, prompts[0])
                assert trace.decode_worker == "decode-0"
            await _two_routers_and_a_new_one(workers, other, prompts)
    finally:
        await asyncio.gather(*(worker.stop() for worker in workers))


async def _two_routers_and_a_new_one(
    workers: list[Worker], other: DecodeClient, prompts: list[list[int]]
) -> None:
    """Routers that share workers come to know the same, whenever they came; a restarted one knows it again."""
    members = pb.Members(version=1, members=[_member(worker) for worker in workers])
    early, late = WorkerDispatcher(SPEC), WorkerDispatcher(SPEC)
    try:
        await early.SetMembers(members, None)
        await asyncio.gather(*(other.ask(prompt + [9] * 16, tokens=20) for prompt in prompts[5:]))
        await late.SetMembers(members, None)
        await other.ask(prompts[6] + [10] * 40, tokens=5)
        async with router_process(workers) as stub:
            status = await knows_all(stub)
            async with asyncio.timeout(WAIT_TIMEOUT_S):
                while not early.index.entries == late.index.entries == status.prefix_index.entries:
                    await asyncio.sleep(0.02)
            asked = [*prompts, prompts[6] + [10] * 40]
            found = [[index.match(PromptHints(p), 0.0)[0].tolist() for p in asked] for index in
                     (early.index, late.index)]  # fmt: skip
            assert found[0] == found[1]
            assert found[0][-1][1] >= 336
            trace = await ask(stub, prompts[6] + [10] * 40)
            assert (trace.decode_worker, trace.cached_tokens) == ("decode-1", 336)
    finally:
        await asyncio.gather(early.close(), late.close())
