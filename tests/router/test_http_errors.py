"""The HTTP door over real sockets: what it refuses, what fails, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from router.dispatch_api import RefusalKind, Refused
from router.http_answers import error_body
from router.http_bodies import MAX_PROMPTS
from router.http_door import create_app
from tests.router.echo import MAX_MODEL_LEN, MODEL, EchoDispatcher, make_generation, until
from tests.router.http_client import MAX_BODY, TEXT, Served

# ---- fields ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("suffix", "x"),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
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


async def test_client_that_does_not_read_holds_up_its_stream(tmp_path: Path) -> None:
    """As the server does for a full socket: `send` does not return. Nothing more is taken from the dispatcher then."""
    dispatcher = EchoDispatcher(lambda _prompt: [50] * 100)
    app = create_app(make_generation(tmp_path, dispatcher)[0])
    gone, stuck = asyncio.Event(), asyncio.Event()
    body = json.dumps({"prompt": [40], "stream": True, "max_tokens": 100}).encode()
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            stuck.set()
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    serving = asyncio.create_task(app(scope, receive, send))
    await stuck.wait()
    for _ in range(50):
        await asyncio.sleep(0)
    assert dispatcher.given == 1
    gone.set()
    await serving
    assert len(dispatcher.cancelled) == 1


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
