"""The HTTP door over real sockets, mostly with the openai package: what it answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router.echo import MAX_MODEL_LEN, MODEL, VOCAB_SIZE, until
from tests.router.http_client import TEXT, Served, says

# ---- completions -------------------------------------------------------------------------------------------------


async def test_completion(served: Served) -> None:
    answer = await served.openai.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=50, extra_headers={"X-Request-Id": "r1"}
    )
    ids = served.codec.encode(TEXT)
    assert (answer.id, answer.object, answer.model) == ("cmpl-r1", "text_completion", MODEL)
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, TEXT, "stop")
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(ids),
        len(ids),
        2 * len(ids),
    )
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert answer.model_extra is not None
    trace = answer.model_extra["baton"]
    assert (trace["prefilled"], trace["prefill_worker"], trace["decode_worker"]) == (
        "remote",
        "prefill-0",
        "decode-0",
    )
    assert (trace["handoff_bytes"], trace["decision"]) == (4096, "remote: 9 uncached >= 4")
    assert trace["request_id"] == "r1"
    assert "ttft_s" in trace
    assert "token_ids" not in (choice.model_extra or {})


async def test_completion_streamed(served: Served) -> None:
    stream = await served.openai.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    *parts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len({chunk.created for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(served.codec.encode(TEXT))
    assert all(chunk.usage is None for chunk in parts)
    assert (parts[-1].model_extra or {})["baton"]["prefill_worker"] == "prefill-0"
    assert all("baton" not in (chunk.model_extra or {}) for chunk in parts[:-1])
    assert len(parts) > 4  # it did stream


async def test_usage_only_when_asked(served: Served) -> None:
    for chunk in await served.events("/v1/completions", prompt="fox"):
        assert "usage" not in chunk
        assert chunk["choices"]


async def test_max_tokens_default_is_openais(served: Served) -> None:
    await served.completion(prompt="fox")
    await served.completion(prompt="fox", max_tokens=None)
    await served.completion(prompt=[40] * (MAX_MODEL_LEN - 5))
    await served.post("/v1/chat/completions", messages=[{"role": "user", "content": "fox"}])
    first, second, clamped, chat = (prompt.sampling.max_tokens for prompt in served.dispatcher.prompts)
    assert (first, second, clamped) == (16, 16, 5)
    assert chat > 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("fox", ["fox"]),
        (["fox", "dog"], ["fox", "dog"]),
        (["fox"], ["fox"]),
        ([[40, 41], [42]], [[40, 41], [42]]),
        ([40, 41], [[40, 41]]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_kinds_of_prompts(
    served: Served, prompt: Any, texts: list[str | list[int]], stream: bool
) -> None:
    expected = [served.codec.encode(text) if isinstance(text, str) else text for text in texts]
    answers: dict[int, list[int]] = {}
    if stream:
        chunks = await served.events("/v1/completions", prompt=prompt, return_token_ids=True)
    else:
        chunks = [(await served.completion(prompt=prompt, return_token_ids=True)).json()]
    for chunk in chunks:
        for choice in chunk["choices"]:
            answers.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert [answers[index] for index in sorted(answers)] == expected


async def test_several_prompts_run_at_once_each_with_its_own_trace(served: Served) -> None:
    served.dispatcher.hold_at = 1
    task = asyncio.create_task(
        served.http.post("/v1/completions", json={"prompt": ["a", "b", "c"]}, headers={"X-Request-Id": "r"})
    )
    await until(lambda: served.dispatcher.active == 3)
    task.cancel()
    await until(lambda: sorted(served.dispatcher.cancelled) == ["r-0", "r-1", "r-2"])
    served.dispatcher.hold_at = None
    answer = (await served.completion(prompt=["fox", "dog"])).json()
    assert [choice["baton"]["prefilled"] for choice in answer["choices"]] == ["remote", "remote"]
    assert "baton" not in answer
    lengths = [len(served.codec.encode(text)) for text in ("fox", "dog")]
    assert answer["usage"]["prompt_tokens"] == sum(lengths)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 6


async def test_usage_of_a_stream_of_several_prompts(served: Served) -> None:
    body = {"prompt": ["fox", "dog"], "stream_options": {"include_usage": True}}
    *parts, last = await served.events("/v1/completions", **body)
    assert last["usage"]["completion_tokens"] == sum(
        len(served.codec.encode(text)) for text in ("fox", "dog")
    )
    ends = [part for part in parts if part["choices"][0]["finish_reason"]]
    assert sorted(part["choices"][0]["index"] for part in ends) == [0, 1]
    assert all("baton" in part for part in ends)


async def test_one_bad_prompt_refuses_the_call(served: Served) -> None:
    served.dispatcher.hold_at = 1
    for stream in (False, True):
        response = await served.completion(prompt=[[40], [VOCAB_SIZE]], stream=stream)
        assert response.status_code == 400
        assert "vocabulary" in response.json()["error"]["message"]
    await until(lambda: served.dispatcher.active == 0)


# ---- chat ----------------------------------------------------------------------------------------------------------


async def test_chat(served: Served) -> None:
    served.dispatcher.script = says(served.codec, TEXT)
    answer = await served.openai.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]},
        ],
        extra_headers={"X-Request-Id": "r1"},
    )
    assert (answer.id, answer.object) == ("chatcmpl-r1", "chat.completion")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(served.codec.encode(TEXT)) - 1
    assert (answer.model_extra or {})["baton"]["decode_worker"] == "decode-0"
    prompt = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi\nthere<|im_end|>\n<|im_start|>assistant\n"
    assert served.dispatcher.prompts[0].tokens == served.codec.encode(prompt, add_special_tokens=False)


async def test_chat_streamed(served: Served) -> None:
    served.dispatcher.script = says(served.codec, TEXT)
    stream = await served.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *parts, last = [chunk async for chunk in stream]
    assert first.object == "chat.completion.chunk"
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(part.choices[0].delta.content or "" for part in parts) == TEXT
    assert parts[-1].choices[0].finish_reason == "stop"
    assert (parts[-1].model_extra or {})["baton"]["prefilled"] == "remote"
    assert last.usage is not None
    assert last.choices == []


async def test_the_last_chunk_carries_what_was_held_back(served: Served) -> None:
    served.dispatcher.script = says(served.codec, "the lazy")
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    }
    for path, body in bodies.items():
        last = (await served.events(path, stop="lazy dog", **body))[-1]["choices"][0]
        assert (last.get("text") or last.get("delta", {}).get("content")) == "lazy"
        assert last["finish_reason"] == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_limit(served: Served, name: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], name: 2}
    answer = (await served.post("/v1/chat/completions", **body)).json()
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_chat_token_ids(served: Served) -> None:
    ids = served.codec.encode(TEXT, add_special_tokens=False)
    served.dispatcher.script = lambda _prompt: ids
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "return_token_ids": True}
    answer = (await served.post("/v1/chat/completions", **body)).json()
    assert answer["choices"][0]["token_ids"] == ids
    chunks = await served.events("/v1/chat/completions", **body)
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == ids


# ---- fields --------------------------------------------------------------------------------------------------------


async def test_sampling_fields_reach_the_dispatcher(served: Served) -> None:
    await served.completion(
        prompt="fox",
        temperature=0.5,
        top_p=0.25,
        top_k=-1,
        seed=-1,
        max_tokens=3,
        stop=["zzz"],
        stop_token_ids=[40],
        ignore_eos=True,
    )
    sampling = served.dispatcher.prompts[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 0)
    assert (sampling.seed, sampling.max_tokens, sampling.stop_token_ids) == (2**64 - 1, 3, (40,))


async def test_stop_string(served: Served) -> None:
    response = await served.http.post(
        "/v1/completions", json={"prompt": TEXT, "stop": "brown"}, headers={"X-Request-Id": "r"}
    )
    answer = response.json()
    assert answer["choices"][0]["text"] == "the quick "
    assert answer["baton"]["request_id"] == "r" and answer["baton"]["prefilled"] == "remote"
    assert served.dispatcher.cancelled == ["r"]


# ---- request ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_request_id_in_and_out(served: Served, stream: bool) -> None:
    headers = {"X-Request-Id": "mine-1"}
    response = await served.http.post(
        "/v1/completions", json={"prompt": "x", "stream": stream}, headers=headers
    )
    assert response.headers["x-request-id"] == "mine-1"
    assert served.dispatcher.prompts[0].request_id == "mine-1"
    drawn = (await served.completion(prompt="x", stream=stream)).headers["x-request-id"]
    assert served.dispatcher.prompts[1].request_id == drawn
    response = await served.completion(prompt="x", stream=stream, n=99)
    assert response.status_code == 400
    assert response.headers["x-request-id"]


# ---- the other paths -----------------------------------------------------------------------------------------------


async def test_models(served: Served) -> None:
    (model,) = (await served.openai.models.list()).data
    assert (model.id, model.owned_by) == (MODEL, "baton")
    assert (model.model_extra or {})["max_model_len"] == MAX_MODEL_LEN
    assert (await served.openai.models.retrieve(MODEL)).id == MODEL


async def test_health_follows_the_dispatcher(served: Served) -> None:
    assert (await served.http.get("/health")).status_code == 200
    served.dispatcher.ready = False
    assert (await served.http.get("/health")).status_code == 503


async def test_extra_routes(served: Served) -> None:
    assert (await served.http.get("/extra")).text == "added"
