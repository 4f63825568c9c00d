"""Every family and way of stretching RoPE through two real processes, the KV handed off."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support import families
from tests.support.models import transformers_greedy
from tests.support.workers import open_pair

pytestmark = [pytest.mark.e2e, pytest.mark.nixl]


@pytest.mark.parametrize("family", families.FAMILIES)
async def test_remote_alone_and_together_then_cached(family: str, tmp_path: Path) -> None:
    """The window is 64 tokens and a chunk too: most chunks are outside of it by the time that decoding begins.

    The last request goes on from a prompt and its answer: its prefix comes from what was handed off and decoded.
    """
    folder = families.make_model(tmp_path / "model", family)
    prompts = families.prompts([30, 64, 65, 129, 400, 700])
    answers = transformers_greedy(folder, prompts)
    options = {"chunk_tokens": 64, "max_batch_tokens": 128}
    async with open_pair(folder, prefill=options, decode={**options, "slots": 6}) as pair:
        client = pair.client
        alone = await client.ask(prompts[-1], prefill="prefill-0")
        assert alone.ids == answers[-1]
        assert (alone.trace.prefilled, alone.trace.remote_tokens) == ("remote", len(prompts[-1]) - 1)
        together = await asyncio.gather(*(client.ask(prompt, prefill="prefill-0") for prompt in prompts))
        assert [answer.ids for answer in together] == answers
        assert [answer.trace.remote_tokens for answer in together[:-1]] == [len(p) - 1 for p in prompts[:-1]]
        longer = prompts[-1] + answers[-1][:40]
        resumed = await client.ask(longer, prefill="prefill-0", tokens=24)
        assert resumed.ids == answers[-1][40:]
        assert resumed.trace.cached_tokens >= len(prompts[-1])
        status = await client.at_rest()
        assert (status.counters["digest_refused"], status.counters["handoffs_failed"]) == (0, 0)
