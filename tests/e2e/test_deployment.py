"""Through `baton serve` as a user runs it, under Ray, with the clients that users have."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from tests.support.deployment import Deployment, deployed

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(240)]

THRESHOLD = 120


def _prompts(count: int, seed: int) -> list[list[int]]:
    """Byte tokens; half of them at or above the policy's threshold."""
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 100) if i % 2 else rng.randrange(THRESHOLD + 1, 700) for i in range(count)]
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


def _openai(deployment: Deployment) -> openai.AsyncOpenAI:
    """Used as a context: an open connection left behind is a warning, and warnings are errors."""
    return openai.AsyncOpenAI(base_url=f"http://{deployment.http}/v1", api_key="none", max_retries=0)


async def _ask_http(
    client: openai.AsyncOpenAI, prompt: list[int], tokens: int, stream: bool
) -> tuple[list[int], Any]:
    """Through the openai package, prompts as token ids, token ids back."""
    extra = {"ignore_eos": True, "return_token_ids": True}
    common: dict[str, Any] = {"model": "baton-tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    if not stream:
        answer = await client.completions.create(**common, extra_body=extra)
        return answer.choices[0].token_ids, answer.baton
    ids: list[int] = []
    baton = None
    async for chunk in await client.completions.create(**common, stream=True, extra_body=extra):
        for choice in chunk.choices:
            ids += getattr(choice, "token_ids", None) or []
        baton = getattr(chunk, "baton", None) or baton
    return ids, baton


async def test_200_mixed_requests(tmp_path: Path) -> None:
    """Half remote, half local; over gRPC, HTTP and HTTP streaming; concurrency 16: all right, nothing stays behind."""
    prompts = _prompts(200, seed=1)
    rng = random.Random(2)
    settings = {
        "router__policy": "threshold",
        "router__local_below_tokens": THRESHOLD,
        "router__max_prefill_waiting": 64,
    }
    async with deployed(tmp_path, **settings) as deployment, _openai(deployment) as client:
        gate = asyncio.Semaphore(16)
        wheres: list[str] = []

        async def one(number: int, prompt: list[int]) -> list[int]:
            tokens = rng.randrange(1, 40)
            async with gate:
                if number % 4 < 2:
                    ids, finished = await deployment.generate(prompt, tokens)
                    wheres.append(finished.trace.prefilled)
                else:
                    ids, baton = await _ask_http(client, prompt, tokens, stream=number % 4 == 2)
                    wheres.append(baton["prefilled"])
            assert len(ids) == tokens
            return ids

        answers = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
        assert wheres.count("remote") == 100
        # The same prompts again, one way only, give the same tokens: KV that travelled is KV that was computed here.
        for number in range(0, 200, 20):
            again, _ = await deployment.generate(prompts[number] + [7], 1)
            assert len(again) == 1
            ids, _ = await deployment.generate(prompts[number], len(answers[number]))
            assert ids == answers[number]
        workers = await deployment.at_rest()
        assert workers["decode-0"].counters["digest_refused"] == 0
        assert workers["decode-0"].counters["handoffs_failed"] == 0


async def test_prefill_worker_killed_in_the_middle_of_50(tmp_path: Path) -> None:
    """kill -9: all 50 finish with the same tokens as without the kill; the worker comes back and is used."""
    prompts = [prompt for prompt in _prompts(100, seed=3) if len(prompt) > THRESHOLD]
    assert len(prompts) == 50
    # 32 tokens a step: prefill takes a while, so that the kill finds hand-offs in all stages.
    async with deployed(tmp_path, router__policy="always-remote", prefill__max_batch_tokens=32) as deployment:
        undisturbed = [await deployment.generate(prompt, 16) for prompt in prompts[:10]]
        assert all(finished.trace.prefilled == "remote" for _, finished in undisturbed)
        first = asyncio.Event()
        done = 0

        async def one(prompt: list[int]) -> tuple[list[int], Any]:
            nonlocal done
            # A prompt of its own (the first byte differs), so that no prefix is cached from the run before.
            answer = await deployment.generate([(prompt[0] + 1) % 256, *prompt[1:]], 16)
            done += 1
            if done == 5:
                first.set()
            return answer

        tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
        await asyncio.wait_for(first.wait(), 60)
        old = await deployment.kill("prefill-0")
        answers = await asyncio.gather(*tasks)
        assert any(finished.trace.fallback for _, finished in answers)
        await deployment.until(
            lambda w: (
                "prefill-0" in w
                and w["prefill-0"].incarnation != old.incarnation
                and w["prefill-0"].incarnation in w["decode-0"].peers
            )
        )
        await deployment.at_rest()
        # Without the kill: everything again, remote or cached, says the same.
        for prompt, (ids, _) in zip(prompts, answers, strict=True):
            again, _ = await deployment.generate([(prompt[0] + 1) % 256, *prompt[1:]], 16)
            assert again == ids
        _, finished = await deployment.generate([(prompts[0][0] + 2) % 256, *prompts[0][1:]], 4)
        assert finished.trace.prefilled == "remote"


async def test_decode_worker_killed(tmp_path: Path) -> None:
    """Its requests end at once with UNAVAILABLE and 503, never a hang; the next one serves."""
    settings = {"router__policy": "threshold", "router__local_below_tokens": THRESHOLD}
    async with deployed(tmp_path, **settings) as deployment, _openai(deployment) as client:
        started = asyncio.Event()

        async def over_grpc() -> grpc.StatusCode:
            request = deployment.stub.Generate(_endless())
            try:
                async for _ in request:
                    started.set()
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        async def over_http() -> int:
            try:
                await client.completions.create(
                    model="baton-tiny", prompt="x", max_tokens=3000, extra_body={"ignore_eos": True}
                )
            except openai.APIStatusError as error:
                return int(error.status_code)
            return 200

        tasks = (asyncio.create_task(over_grpc()), asyncio.create_task(over_http()))
        await asyncio.wait_for(started.wait(), 30)
        await deployment.until(lambda w: w["decode-0"].running == 2)
        old = await deployment.kill("decode-0")
        assert await asyncio.wait_for(tasks[0], 10) is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.wait_for(tasks[1], 10) == 503
        await deployment.until(
            lambda w: "decode-0" in w and w["decode-0"].alive and w["decode-0"].incarnation != old.incarnation
        )
        ids, _ = await deployment.generate("hello", 8)
        assert len(ids) == 8


async def test_limits_are_named(tmp_path: Path) -> None:
    """Over-long and malformed requests, no room: typed answers over both doors."""
    settings = {"router__max_active": 2, "cluster__launcher": "plain"}
    async with deployed(tmp_path, **settings) as deployment, _openai(deployment) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await deployment.generate([1] * 5000, 1)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "4096" in (
            refused.value.details() or ""
        )
        with pytest.raises(openai.BadRequestError, match="4096"):
            await client.completions.create(model="baton-tiny", prompt=[1] * 5000, max_tokens=1)
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="gpt-7", prompt="x")
        busy = [asyncio.create_task(deployment.generate("x", 3500)) for _ in range(2)]
        await deployment.until(lambda w: w["decode-0"].running == 2)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await deployment.generate("x", 1)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(openai.RateLimitError) as limited:
            await client.completions.create(model="baton-tiny", prompt="x")
        assert int(limited.value.response.headers["retry-after"]) >= 1
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        await deployment.at_rest()


def _endless() -> Any:
    from baton.v1 import inference_pb2 as api

    return api.GenerateRequest(
        text="x", sampling=api.SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True)
    )


@pytest.mark.parametrize("worker_id", ["decode-0", "prefill-0"])
async def test_a_hung_engine_is_replaced(tmp_path: Path, worker_id: str) -> None:
    """SIGSTOP of the engine alone: its shell answers on, pings too, but nothing computes. It must not stay that way."""
    settings = {"cluster__launcher": "plain", "cluster__silence_s": 2.0, "router__policy": "always-remote"}
    async with deployed(tmp_path, **settings) as deployment:
        before = (await deployment.workers())[worker_id]
        os.kill(before.engine_pid, signal.SIGSTOP)
        await deployment.until(
            lambda w: (
                worker_id in w
                and w[worker_id].alive
                and w[worker_id].incarnation != before.incarnation
                and w["decode-0"].alive
                and w["prefill-0"].incarnation in w["decode-0"].peers
            )
        )
        _, finished = await deployment.generate("served by the new one " * 10, 4)
        assert finished.trace.prefilled == "remote"
        assert not Path(f"/proc/{before.engine_pid}").exists()
