"""The same tokens as transformers through two real processes, the KV handed off over NIXL."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import Reference
from tests.support.workers import open_pair

pytestmark = [pytest.mark.e2e, pytest.mark.nixl]


@pytest.mark.parametrize("budget", [16, 128, 2048])
async def test_remote_alone_cached_and_among_others(reference: Reference, budget: int) -> None:
    """`budget`: tokens a step on the prefill worker; chunks of 64 tokens, so that prompts are many chunks."""
    options = {"chunk_tokens": 64, "block_size": 16}
    async with open_pair(
        reference.folder, prefill={**options, "max_batch_tokens": budget}, decode={**options, "slots": 6}
    ) as pair:
        client = pair.client
        assert (await client.describe()).transport == "nixl/UCX"
        every = list(zip(reference.prompts, reference.answers, strict=True))
        for prompt, expected in every[8:14]:  # alone
            answer = await client.ask(prompt, prefill="prefill-0")
            assert answer.ids == expected
            assert answer.trace.prefilled == "remote"
            assert answer.trace.remote_tokens == len(prompt) - 1
            assert answer.trace.handoff_bytes > 0
        answers = await asyncio.gather(
            *(client.ask(p, prefill="prefill-0") for p, _ in every)
        )  # all 20 at once
        assert [answer.ids for answer in answers] == reference.answers
        again = await asyncio.gather(*(client.ask(p, prefill="prefill-0") for p, _ in every))
        assert [answer.ids for answer in again] == reference.answers
        assert all(
            answer.trace.cached_tokens == (len(p) - 1) // 16 * 16
            for answer, (p, _) in zip(again, every, strict=True)
        )
        status = await client.at_rest()
        assert status.counters["digest_refused"] == 0
        assert status.counters["handoffs_failed"] == 0


async def test_remote_into_a_small_pool(reference: Reference) -> None:
    """A decode pool that holds few prompts at once: hand-offs wait for blocks, decodes are preempted."""
    token_bytes = 2 * 3 * 2 * 24 * 4
    async with open_pair(
        reference.folder,
        prefill={"chunk_tokens": 64},
        decode={"chunk_tokens": 64, "slots": 3, "kv_cache_bytes": 120 * 16 * token_bytes},
    ) as pair:
        answers = await asyncio.gather(*(pair.client.ask(p, prefill="prefill-0") for p in reference.prompts))
        assert [answer.ids for answer in answers] == reference.answers
        status = await pair.client.at_rest()
        assert status.ledger.blocks_total == 120
        assert sum(answer.trace.remote_tokens > 0 for answer in answers) > 5


async def test_seeded_sampling_local_and_remote(reference: Reference) -> None:
    async with open_pair(reference.folder) as pair:
        prompt = reference.prompts[17]
        how = {"temperature": 0.8, "seed": 5, "tokens": 32}
        remote = await pair.client.ask(prompt, prefill="prefill-0", **how)
        cached = await pair.client.ask(prompt, **how)
        assert remote.ids == cached.ids
    async with open_pair(reference.folder) as pair:
        local = await pair.client.ask(prompt, **how)
        assert local.trace.prefilled == "local"
        assert local.ids == remote.ids
