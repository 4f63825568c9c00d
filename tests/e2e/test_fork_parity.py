"""n > 1 through real processes: one hand-off, and every choice is what a single request would have answered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conftest import Reference
from tests.support.workers import DecodeClient, open_pair

pytestmark = [pytest.mark.e2e, pytest.mark.nixl]

N = 4
HOW: dict[str, Any] = {"temperature": 0.9, "seed": 8, "tokens": 24, "stop_token_ids": [7, 70]}


async def _singles(client: DecodeClient, prompt: list[int]) -> list[list[int]]:
    answers = await asyncio.gather(*(client.ask(prompt, **HOW, choice=choice) for choice in range(N)))
    return [answer.ids for answer in answers]


async def test_remote_choices_are_single_requests(reference: Reference) -> None:
    prompts = [reference.prompts[at] for at in (0, 1, 4, 8, 11, 12, 15)]
    options: dict[str, Any] = {"chunk_tokens": 64, "block_size": 16}
    async with open_pair(reference.folder, prefill=options, decode={**options, "slots": 6}) as pair:
        client = pair.client
        forked = await asyncio.gather(*(client.ask(p, prefill="prefill-0", n=N, **HOW) for p in prompts))
        for prompt, answer in zip(prompts, forked, strict=True):
            assert answer.trace.remote_tokens == len(prompt) - 1  # once, not n times
            assert len(answer.reasons) == N
            assert answer.choices == await _singles(client, prompt)
        status = await client.at_rest()
        assert status.counters["handoffs_failed"] == 0
        assert status.counters["forks"] == N * (len(prompts) - 1)  # one token has no trunk
        again = await client.ask(prompts[4], n=N, **HOW)
        assert again.choices == forked[4].choices and again.trace.prefilled == "cached"
        key = await client.submit(prompts[-1], prefill="prefill-0", n=N, temperature=1.0, tokens=2000)
        await client.tokens(key, 3)
        await client.cancel(key)
        assert (await client.answer(key)).end is not None
        await client.at_rest()
    async with open_pair(reference.folder, prefill=options, decode=options) as pair:
        local = await pair.client.ask(prompts[4], n=N, **HOW)
        assert local.choices == forked[4].choices and local.trace.prefilled == "local"
