"""Any pair of sizes: real ranks in real processes, KV from each prefill rank to each decode rank over NIXL, and the
same tokens as transformers.

Each model has three prefill and three decode workers, of 1, 2 and 4 ranks, all linked to one another: nine pairs. They
differ in their block sizes and in whether they gather before they send.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import Reference
from tests.support import families
from tests.support.models import make_llama, transformers_greedy
from tests.support.workers import DecodeClient, Worker, introduced, open_pair, start_worker

# One loop for the module, since all tests of one model share its workers.
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.nixl,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]

RANKS = (1, 2, 4)
TOKENS = 24
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 24  # of both models: with 4 ranks two of them store each head
COMMON = {"chunk_tokens": 64, "max_batch_tokens": 256}
DECODE_BLOCKS = {1: 16, 2: 8, 4: 32}
PREFILL_BLOCKS = {1: 32, 2: 16, 4: 8}
# Of the prefill workers. A piece of these models is far below 64 KiB, so "auto" gathers.
GATHER = {
    "llama": {1: "never", 2: "always", 4: "auto"},
    "qwen3": {1: "always", 2: "never", 4: "never"},
}


@dataclass
class Fleet:
    """All workers of one model, and what they must answer."""

    prompts: list[list[int]]
    answers: list[list[int]]
    decodes: dict[int, tuple[Worker, DecodeClient]]  # by ranks


def make_model(folder: Path, family: str) -> Path:
    """6 or 4 query heads over 2 kv heads: the former do not divide evenly by 4 ranks."""
    return make_llama(folder) if family == "llama" else families.make_model(folder, family)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(GATHER))
async def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    family: str = request.param
    folder = make_model(tmp_path_factory.mktemp("model"), family)
    prompts = families.prompts([2, 17, 64, 130, 333])
    answers = transformers_greedy(folder, prompts, TOKENS)
    workers: list[Worker] = []
    try:
        for role in ("prefill", "decode"):  # half of them at a time: they all load torch
            workers += await asyncio.gather(*(_start(role, folder, family, ranks) for ranks in RANKS))
        prefills, decodes = workers[: len(RANKS)], workers[len(RANKS) :]
        clients = {}
        for ranks, decode in zip(RANKS, decodes, strict=True):
            clients[ranks] = (decode, DecodeClient(decode))
            await introduced(decode, clients[ranks][1], prefills)
        yield Fleet(prompts, answers, clients)
        for _, client in clients.values():
            await client.close()
    finally:
        await asyncio.gather(*(worker.stop() for worker in workers))


def _start(role: Any, folder: Path, family: str, ranks: int) -> Any:
    own: dict[str, Any] = {"block_size": DECODE_BLOCKS[ranks], "slots": 6}
    if role == "prefill":
        own = {"block_size": PREFILL_BLOCKS[ranks], "gather": GATHER[family][ranks]}
    return start_worker(role, folder, worker_id=f"{role}-{ranks}", tensor_parallel=ranks, **COMMON, **own)


@pytest.mark.slow
@pytest.mark.parametrize(("prefill", "decode"), list(itertools.product(RANKS, RANKS)))
async def test_the_same_tokens_whatever_the_ranks(fleet: Fleet, prefill: int, decode: int) -> None:
    """Every prompt by itself in the caches of both sides (`salt`), all at once; then again, found in the cache."""
    _, client = fleet.decodes[decode]
    before = (await client.describe()).counters
    how = {"prefill": f"prefill-{prefill}", "tokens": TOKENS, "salt": f"by {prefill}"}
    answers = await asyncio.gather(*(client.ask(prompt, **how) for prompt in fleet.prompts))
    assert [answer.ids for answer in answers] == fleet.answers
    for prompt, answer in zip(fleet.prompts, answers, strict=True):
        assert (answer.trace.prefilled, answer.trace.remote_tokens) == ("remote", len(prompt) - 1)
        # Each head once for each decode rank that stores it: 4 ranks store 2 heads twice.
        stored = max(KV_HEADS, decode)
        assert answer.trace.handoff_bytes == (len(prompt) - 1) * 2 * LAYERS * stored * HEAD_DIM * 4
    again = await client.ask(fleet.prompts[-1], **how)
    assert again.ids == fleet.answers[-1]
    assert (
        again.trace.cached_tokens
        == (len(fleet.prompts[-1]) - 1) // DECODE_BLOCKS[decode] * DECODE_BLOCKS[decode]
    )
    status = await client.at_rest()
    for counter in ("digest_refused", "handoffs_failed"):
        assert status.counters[counter] == before[counter] == 0


@pytest.mark.slow
async def test_seeded_draws_do_not_depend_on_the_ranks(fleet: Fleet) -> None:
    """The same noise is laid on the same logits, however many ranks each side has."""
    how = {"temperature": 0.8, "seed": 5, "tokens": TOKENS}
    drawn = [
        (await client.ask(fleet.prompts[3], prefill="prefill-2", salt="drawn", **how)).ids
        for _, client in fleet.decodes.values()
    ]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize(
    ("ranks", "prefill", "wire_dtype", "bytes_each", "close"),
    [
        ((2, 2), {"block_size": 32}, "int8", 1 + 4 / (HEAD_DIM * 16), 0.2),
        ((1, 1), {"block_size": 8, "dtype": "bfloat16"}, "fp8_e4m3", 1 + 4 / (HEAD_DIM * 16), 0.5),
        ((1, 2), {"dtype": "bfloat16"}, "", 2.0, 0.2),
    ],
    ids=["int8", "bf16 as fp8", "bf16"],
)
async def test_kv_that_crosses_narrowed_is_close(
    reference: Reference,
    ranks: tuple[int, int],
    prefill: dict[str, Any],
    wire_dtype: str,
    bytes_each: float,
    close: float,
) -> None:
    """The receiver's pool is fp32. Fewer bytes cross, and the first token's log-probability is `close` on average.

    The model is random, with large weights: a trained one loses far less.
    """
    common = {**COMMON, "wire_dtype": wire_dtype}
    async with open_pair(
        reference.folder,
        prefill_tp=ranks[0],
        decode_tp=ranks[1],
        prefill={**common, **prefill},
        decode=common,
    ) as pair:
        how = {"tokens": 8, "logprobs": 0}
        apart = []
        for prompt in reference.prompts[10:17]:  # of 128 to 513 tokens
            exact = await pair.client.ask(prompt, salt="exact", **how)
            crossed = await pair.client.ask(prompt, prefill="prefill-0", **how)
            assert crossed.trace.remote_tokens == len(prompt) - 1
            values = (len(prompt) - 1) * 2 * LAYERS * KV_HEADS * HEAD_DIM
            # The last group of each piece may be shorter than 16 tokens.
            assert values * bytes_each <= crossed.trace.handoff_bytes <= 1.02 * values * bytes_each
            again = await pair.client.ask(prompt, **how)
            assert again.trace.cached_tokens >= len(prompt) - 17
            if crossed.ids[0] == exact.ids[0]:
                apart.append(abs(crossed.logprobs[0] - exact.logprobs[0]))
        assert len(apart) >= 5, "the first tokens differ"
        assert 0 < sum(apart) / len(apart) < close
        status = await pair.client.at_rest()
        assert (status.counters["digest_refused"], status.counters["handoffs_failed"]) == (0, 0)
