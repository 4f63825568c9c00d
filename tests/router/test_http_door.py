"""The HTTP door over real sockets: with the openai package, and raw where a client would not send such things."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from router.dispatch_api import Prompt, RefusalKind, Refused
from router.http_answers import error_body
from router.http_bodies import MAX_PROMPTS
from router.http_door import create_app
from router.text import TextCodec
from tests.router.echo import MAX_MODEL_LEN, MODEL, VOCAB_SIZE, EchoDispatcher, make_generation, until

MAX_BODY = 20_000
TEXT = "the quick brown 🙂 fox"


class Served:
    def __init__(
        self, dispatcher: EchoDispatcher, codec: TextCodec, port: int, http: httpx.AsyncClient
    ) -> None:
        self.dispatcher = dispatcher
        self.codec = codec
        self.port = port
        self.http = http

    @functools.cached_property
    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="none",
            max_retries=0,
            timeout=10,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),  # loading certificates takes long
        )

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def completion(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", **body)

    async def events(self, path: str, **body: Any) -> list[Any]:
        """All events of a stream, decoded; the last must be [DONE], which is left out."""
        response = await self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert data.pop() == "[DONE]"
        return [json.loads(event) for event in data]


async def extra(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("added")


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    dispatcher = EchoDispatcher()
    generation, codec = make_generation(tmp_path, dispatcher)
    app = create_app(
        generation, extra_routes=[Route("/extra", extra)], max_body_bytes=MAX_BODY, body_timeout_s=0.5
    )
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    # Without `serve`, which takes the signals of the process and looks at its flags ten times a second.
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, verify=False) as http:
        one = Served(dispatcher, codec, port, http)
        yield one
        if "openai" in vars(one):
            await one.openai.close()
    await asyncio.sleep(0)
    await server.shutdown()


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


def says(codec: TextCodec, text: str) -> Any:
    def script(_prompt: Prompt) -> list[int]:
        return codec.encode(text, add_special_tokens=False)

    return script


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
    assert answer["baton"] == {"request_id": "r"}
    assert served.dispatcher.cancelled == ["r"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
        ("logprobs", 0),
        ("logprobs", True),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("repetition_penalty", 1.1),
        ("min_tokens", 3),
        ("max_token", 5),  # misspelt
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_what_would_change_the_answer_is_refused(
    served: Served, path: str, field: str, value: Any
) -> None:
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    response = await served.post(path, **body, **{field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert field in error["message"]
    assert served.dispatcher.prompts == []


async def test_neutral_and_harmless_fields_are_accepted(served: Served) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x", "name": "me"}]},
    }
    for path, body in bodies.items():
        response = await served.post(
            path,
            **body,
            n=1,
            best_of=1,
            echo=False,
            suffix=None,
            logprobs=False,
            top_logprobs=None,
            logit_bias={},
            presence_penalty=0,
            frequency_penalty=0.0,
            tools=[],
            tool_choice="none",
            response_format={"type": "text"},
            user="me",
            metadata={"a": "b"},
            store=False,
            stream=None,
            stop=None,
            seed=None,
            temperature=None,
            ignore_eos=None,
            stop_token_ids=None,
        )
        assert response.status_code == 200, response.text


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"{", None, "not valid JSON"),
        (b"", None, "not valid JSON"),
        (b"[]", None, "JSON object"),
        (b'{"prompt": "\\ud800"}', None, "not valid JSON"),
        (b"{}", "prompt", "prompt must be"),
        (b'{"prompt": 5}', "prompt", "prompt must be"),
        (b'{"prompt": [1, "x"]}', "prompt", "prompt must be"),
        (b'{"prompt": [1.5]}', "prompt", "prompt must be"),
        (b'{"prompt": []}', "prompt", "empty"),
        (b'{"prompt": [[]]}', "prompt", "empty"),
        (b'{"prompt": [[1], [-1]]}', "prompt", "token id -1"),
        (b'{"prompt": [9999]}', "prompt", "token id 9999"),
        (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens", "integer"),
        (b'{"prompt": "x", "max_tokens": true}', "max_tokens", "integer"),
        (b'{"prompt": "x", "max_tokens": 0}', "max_tokens", "at least 1"),
        (b'{"prompt": "x", "temperature": 3}', "temperature", "between 0 and 2"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature", "between 0 and 2"),
        (b'{"prompt": "x", "seed": 18446744073709551616}', "seed", "less than"),
        (b'{"prompt": "x", "stop": [1]}', "stop", "string"),
        (b'{"prompt": "x", "stream": "yes"}', "stream", "boolean"),
        (b'{"prompt": "x", "stream": true, "top_p": 0}', "top_p", "above 0"),
    ],
)
async def test_bad_bodies(served: Served, body: bytes, param: str | None, message: str) -> None:
    response = await served.http.post("/v1/completions", content=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "messages: "),
        ([{"content": "x"}], "messages: "),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "tool_calls"),
        ([{"role": "tool", "content": "x"}], "no tools here"),
    ],
)
async def test_bad_messages(served: Served, messages: Any, message: str) -> None:
    response = await served.post("/v1/chat/completions", messages=messages)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages"
    assert message in error["message"]


async def test_too_long_prompt(served: Served) -> None:
    response = await served.completion(prompt=[40] * 200)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "200" in error["message"]
    assert str(MAX_MODEL_LEN) in error["message"]


async def test_too_many_prompts(served: Served) -> None:
    response = await served.completion(prompt=["x"] * (MAX_PROMPTS + 1))
    assert response.status_code == 400
    assert str(MAX_PROMPTS) in response.json()["error"]["message"]


async def test_too_large_body(served: Served) -> None:
    response = await served.completion(prompt="x" * MAX_BODY)
    assert response.status_code == 413
    assert str(MAX_BODY) in response.json()["error"]["message"]


async def test_body_that_never_comes(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    await writer.wait_closed()


async def test_unknown_model(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await served.openai.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await served.openai.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)]
)
async def test_unknown_paths_and_methods(served: Served, method: str, path: str, status: int) -> None:
    response = await served.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", RefusalKind)
async def test_refusals_have_their_status(served: Served, kind: RefusalKind, stream: bool) -> None:
    served.dispatcher.refusal = Refused(kind, "because é", param="prompt")
    response = await served.completion(prompt="x", stream=stream)
    assert response.status_code == kind.http_status
    assert response.json()["error"]["message"] == "because é"
    assert ("retry-after" in response.headers) == (kind is RefusalKind.NO_ROOM)


@pytest.mark.parametrize("stream", [False, True])
async def test_no_room_tells_when_to_retry(served: Served, stream: bool) -> None:
    served.dispatcher.refusal = Refused(RefusalKind.NO_ROOM, "full", retry_after_s=1.2)
    with pytest.raises(openai.RateLimitError) as caught:
        await served.openai.completions.create(model=MODEL, prompt="x", stream=stream)
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.code == "rate_limit_exceeded"


async def test_refusal_in_the_middle(served: Served) -> None:
    served.dispatcher.refusal = Refused(RefusalKind.UNAVAILABLE, "the last decode worker died")
    served.dispatcher.refuse_at = 3
    assert (await served.completion(prompt=TEXT)).status_code == 503
    *parts, error = await served.events("/v1/completions", prompt=TEXT)
    text = "".join(part["choices"][0]["text"] for part in parts)
    assert text == served.codec.decode(served.codec.encode(TEXT)[:3])
    assert error == json.loads(error_body(served.dispatcher.refusal))
    with pytest.raises(openai.APIError, match="the last decode worker died"):
        async for _ in await served.openai.completions.create(model=MODEL, prompt=TEXT, stream=True):
            pass


@pytest.mark.parametrize("refuse_at", [None, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_unexpected_errors_do_not_leak(
    served: Served, caplog: pytest.LogCaptureFixture, stream: bool, refuse_at: int | None
) -> None:
    served.dispatcher.refusal = ZeroDivisionError("secret detail")
    served.dispatcher.refuse_at = refuse_at
    response = await served.completion(prompt=TEXT, stream=stream)
    assert response.status_code == (200 if stream and refuse_at else 500)
    assert "internal error: ZeroDivisionError" in response.text
    assert "secret detail" not in response.text
    assert "secret detail" in caplog.text


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
    response = await served.completion(prompt="x", stream=stream, n=2)
    assert response.status_code == 400
    assert response.headers["x-request-id"]


async def test_bad_request_id(served: Served) -> None:
    response = await served.http.post(
        "/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "x" * 129}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "request_id"


# ---- the client goes away ------------------------------------------------------------------------------------------


async def raw_post(served: Served, **body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: gone\r\nContent-Length: %d\r\n\r\n"
        % len(content)
        + content
    )
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_at", [0, 2])
async def test_client_goes_away_while_nothing_comes(served: Served, stream: bool, hold_at: int) -> None:
    served.dispatcher.hold_at = hold_at
    _reader, writer = await raw_post(served, prompt=TEXT, stream=stream)
    await served.dispatcher.holding.wait()
    writer.close()
    await until(lambda: served.dispatcher.cancelled == ["gone"])
    assert served.dispatcher.active == 0


async def test_client_goes_away_in_the_middle_of_a_stream(served: Served) -> None:
    served.dispatcher.script = lambda _prompt: [50] * 100
    served.dispatcher.delay_s = 0.02
    reader, writer = await raw_post(served, prompt=TEXT, stream=True, max_tokens=100)
    await reader.readuntil(b"data: ")
    writer.close()
    await until(lambda: served.dispatcher.cancelled == ["gone"], 1.5)


async def test_client_that_does_not_read_holds_up_its_stream_only(served: Served) -> None:
    served.dispatcher.piece = 1
    long = [50] * 100
    sent = 0

    def script(_prompt: Prompt) -> list[int]:
        nonlocal sent
        sent += 1
        return long

    served.dispatcher.script = script
    _reader, writer = await raw_post(served, prompt=TEXT, stream=True, max_tokens=100)
    await until(lambda: sent == 1)
    assert (await served.completion(prompt="fox")).status_code == 200
    writer.close()
    await until(lambda: served.dispatcher.active == 0)


async def test_openai_client_that_closes_its_stream(served: Served) -> None:
    served.dispatcher.hold_at = 2
    stream = await served.openai.completions.create(
        model=MODEL, prompt=TEXT, stream=True, extra_headers={"X-Request-Id": "gone"}
    )
    await anext(stream)
    await stream.close()
    await until(lambda: served.dispatcher.cancelled == ["gone"])


async def test_connection_is_kept_alive(served: Served) -> None:
    """Watching for the client to go away must not eat its next request."""
    async with httpx.AsyncClient(
        base_url=served.http.base_url, limits=httpx.Limits(max_connections=1), timeout=5
    ) as one:
        for stream in (False, True, False, True):
            response = await one.post("/v1/completions", json={"prompt": "fox", "stream": stream})
            assert response.status_code == 200
    assert served.dispatcher.cancelled == []


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
