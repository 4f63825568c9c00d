"""The demo model's answers through two real processes: right, and equal whether computed here, handed off or cached."""

from __future__ import annotations

import asyncio
import random

import pytest

from benchmarks.recall_data import is_correct, make_question
from cluster.config import CHECKOUT
from router.text import TextCodec
from tests.support.workers import open_pair

DEMO = CHECKOUT / "models" / "baton-demo"

pytestmark = [pytest.mark.e2e, pytest.mark.nixl]


async def test_equal_and_right_answers_local_remote_and_cached() -> None:
    codec = TextCodec.load(DEMO)
    rng = random.Random(11)
    lengths = [128, 256, 512, 1024, 2048] * 4
    asked = []
    for number, length in enumerate(lengths):
        messages, expected = make_question(rng, length, number / len(lengths), codec)
        prompt = codec.encode(codec.render_chat(messages), add_special_tokens=False)
        asked.append((prompt, expected))
    options = {"kv_cache_bytes": 128 << 20, "dtype": "float32"}
    async with open_pair(DEMO, prefill=options, decode=options) as pair:
        how = {"tokens": 16, "stop_token_ids": list(codec.eos_ids)}

        async def every(prefill: str, salt: str) -> list[list[int]]:
            answers = await asyncio.gather(
                *(pair.client.ask(prompt, prefill=prefill, salt=salt, **how) for prompt, _ in asked)
            )
            wanted = {"prefill-0": {"remote"}, "": {"local"} if salt == "here" else {"cached"}}[prefill]
            assert {answer.trace.prefilled for answer in answers} <= wanted | {"local"}
            assert sum(answer.trace.prefilled in wanted for answer in answers) >= 18
            return [answer.ids for answer in answers]

        remote = await every("prefill-0", salt="there")
        cached = await every("", salt="there")
        local = await every("", salt="here")
    assert remote == cached == local
    right = sum(
        is_correct(codec.decode(ids), expected) for ids, (_, expected) in zip(local, asked, strict=True)
    )
    assert right >= 19
