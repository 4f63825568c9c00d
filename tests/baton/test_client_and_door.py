"""The client and the router's real gRPC door: what one says, the other understands."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton import AsyncClient, InvalidRequest, NoRoom, Retry, Unavailable, rpc
from baton.v1 import inference_pb2 as api
from router.dispatch_api import RefusalKind, Refused
from router.grpc_door import add_public_services
from router.text import TextCodec
from tests.router.echo import MODEL, EchoDispatcher, make_generation

TEXT = "the quick brown 🙂 fox"


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[AsyncClient, EchoDispatcher, TextCodec]]:
    dispatcher = EchoDispatcher()
    generation, codec = make_generation(folder, dispatcher)
    server = rpc.server("secret")
    add_public_services(server, generation, lambda: api.StatusResponse(router="router-7"))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncClient(f"127.0.0.1:{port}", retry=Retry(calls=3, first_s=0.01)) as client:
        yield client, dispatcher, codec
    await server.stop(None)


async def test_an_answer(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, dispatcher, codec):
        answer = await client.generate(TEXT, temperature=0.0, request_id="r1")
        assert (answer.text, answer.token_ids, answer.reason) == (TEXT, codec.encode(TEXT), "stop")
        assert (answer.usage.cached_tokens, answer.trace.decode_worker) == (3, "decode-0")
        assert answer.request_id == dispatcher.prompts[0].request_id == "r1"
        sampled = await client.generate(codec.encode(TEXT), max_tokens=3)
        assert sampled.token_ids == codec.encode(TEXT)[:3]
        assert dispatcher.prompts[1].sampling.seed == sampled.seed
        assert [model.name for model in await client.models()] == [MODEL]
        assert (await client.status()).router == "router-7"
        assert await client.health()
        dispatcher.ready = False
        assert not await client.health()


async def test_choices_logprobs_and_the_prompt(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, _, codec):
        ids = codec.encode(TEXT)
        answer = await client.generate(TEXT, n=2, logprobs=2, prompt_logprobs=0, echo=True)
        assert [choice.token_ids for choice in answer.choices] == [ids, ids[1:]]
        assert answer.logprobs is not None and answer.prompt is not None
        assert [one.token_id for one in answer.logprobs] == ids
        assert answer.logprobs[0].logprob == pytest.approx(-ids[0] / 1000)
        assert [token_id for token_id, _ in answer.logprobs[0].top] == [ids[0], ids[0] + 1]
        assert (answer.prompt.token_ids, answer.prompt.text) == (ids, TEXT)
        assert answer.prompt.logprobs is not None
        assert [one.token_id for one in answer.prompt.logprobs] == ids[1:]


async def test_a_stop_string_held_back_text_and_all(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, _, _codec):
        answer = await client.generate(TEXT, stop="brown 🙂")
        assert (answer.text, answer.reason) == ("the quick ", "stop")


async def test_refusals(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, dispatcher, _):
        with pytest.raises(InvalidRequest) as invalid:
            await client.generate(TEXT, top_p=2.0)
        assert invalid.value.param == "top_p"
        with pytest.raises(InvalidRequest):
            await client.generate(TEXT, model="another")
        dispatcher.refusal = Refused(RefusalKind.NO_ROOM, "full", retry_after_s=0.02)
        with pytest.raises(NoRoom) as full:
            await client.generate(TEXT)
        assert full.value.retry_after_s == 0.02 and len(dispatcher.prompts) == 3


async def test_a_worker_lost_in_the_middle(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, dispatcher, codec):
        dispatcher.refusal = Refused(RefusalKind.UNAVAILABLE, "decode-0 was lost", retry_after_s=0.01)
        dispatcher.refuse_at = 2
        async with client.stream(TEXT) as stream:
            first = await anext(stream)
            dispatcher.refuse_at = 4  # the second call gets further, the third to the end
            ids = list(first.token_ids)
            async for delta in stream:
                ids += delta.token_ids
                if len(ids) > 3:
                    dispatcher.refusal = None
        assert ids == stream.completion.token_ids == codec.encode(TEXT)
        assert stream.completion.text == TEXT
        dispatcher.refusal = Refused(RefusalKind.UNAVAILABLE, "decode-0 was lost")
        with pytest.raises(Unavailable):
            await client.generate(TEXT)
