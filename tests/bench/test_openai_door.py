"""The HTTP door against a scripted server: what it finds out, what it counts, how it names what goes wrong."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from bench.door import Asking, DoorError, Facts
from bench.http_client import HttpClient, HttpFailure
from bench.load import Job, Load
from bench.openai_door import HttpDoor, error_message
from bench.record import Record, Run
from bench.traces import Trace, TraceRequest
from tests.bench.scripted import SSE, Asked, Script, Server, scripted, well


def a_door(url: str, api: str = "completions", **asking: Any) -> HttpDoor:
    return HttpDoor(
        url, api, Asking(**asking), clock=time.perf_counter, headers={"Authorization": "Bearer x"}
    )


async def load(
    server: Server, *, requests: int = 1, tokens: int = 3, api: str = "completions", **options: Any
) -> Run:
    """A run of requests that are due at once."""
    trace = Trace("t", tuple(TraceRequest(n, 0.0, 8, tokens) for n in range(requests)), 1.0)
    door = a_door(server.url, api)
    facts = Facts(server.url, api, "m", end_id=1000 if api == "completions" else 0, tokens_per_word=1.0)
    door._facts = facts
    try:
        jobs = [Job(request, 0.0) for request in trace.requests]
        return await Load(door.target(facts.prompts(trace, "s"), "run"), jobs, **options).run()
    finally:
        await door.close()


async def one(script: Script, **options: Any) -> Record:
    async with scripted(script) as server:
        return (await load(server, **options)).records[0]


# ---- finding out -----------------------------------------------------------------------------------------------


async def test_a_server_that_takes_everything() -> None:
    async with scripted() as server:
        door = a_door(server.url + "/v1/")
        facts = await door.open()
        await door.close()
    assert facts.model == "m" and facts.max_model_len == 4096 and facts.end_id == 1000
    assert facts.extensions == ("return_token_ids", "ignore_eos")
    assert all(asked.headers["authorization"] == "Bearer x" for asked in server.asked)
    assert server.connections == 1  # kept


async def test_a_plain_openai_server_gets_text_of_a_measured_length() -> None:
    """It refuses what OpenAI does not know, and has one and a half tokens a word and nine of its own."""

    async def strict(asked: Asked) -> None:
        if asked.body.keys() & {"ignore_eos", "return_token_ids"} or isinstance(
            asked.body.get("prompt"), list
        ):
            await asked.plain(400, {"error": {"message": "unknown"}})
        elif asked.path.endswith("completions"):
            words = len(asked.body["prompt"].split())
            await asked.plain(200, {"choices": [], "usage": {"prompt_tokens": round(1.5 * words + 9)}})
        else:
            await well(asked)

    async with scripted(strict) as server:
        door = a_door(server.url)
        facts = await door.open()
        await door.close()
        assert (facts.extensions, facts.end_id) == ((), 0)
        assert (facts.tokens_per_word, facts.extra_tokens) == pytest.approx((1.5, 9.0))
        with pytest.raises(DoorError, match="takes no prompt of ids below 1000 .*unknown.*--prompts text"):
            await a_door(server.url, prompts="ids").open()


async def test_a_chat_server_gets_messages() -> None:
    async with scripted() as server:
        door = a_door(server.url, "chat", ignore_eos=False)
        facts = await door.open()
        await door.close()
    assert (facts.end_id, facts.tokens_per_word, facts.extensions) == (0, 1.0, ("return_token_ids",))
    with pytest.raises(DoorError, match="chat messages are text"):
        a_door(server.url, "chat", prompts="ids")


async def test_servers_that_cannot_be_measured_are_told_before_the_run() -> None:
    async def says(asked: Asked) -> None:
        await asked.plain(*answers[asked.path])

    answers: dict[str, tuple[int, Any]] = {
        "/v1/models": (404, {}),
        "/v1/completions": (401, {"error": "no key"}),
    }
    async with scripted(says) as server:
        with pytest.raises(DoorError, match="answered HTTP 404 and names no model; give --model"):
            await a_door(server.url).open()
        with pytest.raises(DoorError, match="refuses a plain request: HTTP 401: no key"):
            await a_door(server.url, model="m").open()
        answers["/v1/models"] = (200, {"data": [{"id": "n"}]})
        with pytest.raises(DoorError, match="has no model 'm'; it has n"):
            await a_door(server.url, model="m").open()
    with pytest.raises(DoorError, match=r"http://127\.0\.0\.1:\d+: .*[Cc]onnect"):
        await a_door(server.url).open()
    for url in ("127.0.0.1:8000", "ftp://x", "http://"):
        with pytest.raises(DoorError, match="is no address of a server; write http://HOST:PORT"):
            a_door(url)


async def test_a_server_without_usage_cannot_have_texts_of_a_length() -> None:
    async def mute(asked: Asked) -> None:
        if asked.path == "/v1/models":
            await well(asked)
        else:
            await asked.plain(200, {"choices": []})

    async with scripted(mute) as server:
        with pytest.raises(DoorError, match="cannot be made to a length"):
            await a_door(server.url).open()


# ---- counting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_every_piece_is_stamped_and_counted(api: str) -> None:
    async with scripted() as server:
        run = await load(server, requests=20, tokens=5, api=api)
    assert [record.error for record in run.records] == [""] * 20
    for record in run.records:
        assert len(record.piece_times) == record.completion_tokens == 5
        assert list(record.piece_times) == sorted(record.piece_times)
        assert record.sent is not None and record.end is not None
        assert (
            record.scheduled <= record.sent <= record.piece_times[0] <= record.piece_times[-1] <= record.end
        )
        assert (record.prompt_tokens, record.finish_reason, record.status) == (7, "length", 200)
    assert sorted(asked.headers["x-request-id"] for asked in server.asked) == sorted(
        f"run-{n}" for n in range(20)
    )
    assert all(asked.body["stream_options"] == {"include_usage": True} for asked in server.asked)


async def test_ids_say_how_many_tokens_a_piece_has() -> None:
    async def script(asked: Asked) -> None:
        await asked.raw(SSE)
        await asked.events({"choices": [], "object": "text_completion"})
        await asked.token("", token_ids=[])  # a head without tokens
        await asked.token("", token_ids=[5])  # text that waits for the rest of a character
        await asked.token("ab", token_ids=[6, 7, 8])
        await asked.token("c", token_ids=[])  # text that was held back
        await asked.end(4, prompt_tokens_details={"cached_tokens": 3})

    record = await one(script)
    assert list(record.piece_tokens) == [1, 3]
    assert (record.completion_tokens, record.cached_tokens, record.error) == (4, 3, "")


async def test_a_server_without_usage_and_done_still_ends_by_its_reason() -> None:
    async def script(asked: Asked) -> None:
        await asked.raw(SSE.replace("Transfer-Encoding: chunked\r\n", ""))
        for reason in (None, None, "stop"):
            await asked.raw(
                'data: {"choices":[{"text":"a","finish_reason":%s}]}\n\n'
                % ("null" if not reason else f'"{reason}"')
            )
        asked.close()

    record = await one(script)
    assert (record.error, record.completion_tokens, record.finish_reason) == ("", 3, "stop")


async def test_thinking_is_an_answer_too_and_batons_trace_is_kept() -> None:
    async def script(asked: Asked) -> None:
        await asked.raw(SSE)
        await asked.events({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await asked.events({"choices": [{"delta": {"reasoning_content": "hm"}}]})
        await asked.events({"choices": [{"delta": {"content": "a"}}], "baton": {"prefilled": "remote"}})
        await asked.end(2)

    record = await one(script, api="chat")
    assert len(record.piece_times) == 2 and record.prefilled == "remote"


# ---- what goes wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, "no_room"), (503, "unavailable"), (400, "invalid"), (404, "invalid"), (500, "server_error")],
)
async def test_refusals_by_kind(status: int, kind: str) -> None:
    record = await one(lambda asked: asked.plain(status, {"error": {"message": "because"}}))
    assert (record.error, record.status, record.message) == (kind, status, "because")
    assert not record.piece_times


async def half(asked: Asked) -> None:
    await asked.raw(SSE)
    await asked.token()


async def closes_in_the_middle(asked: Asked) -> None:
    await half(asked)
    asked.close()


async def ends_without_a_reason(asked: Asked) -> None:
    await half(asked)
    await asked.raw("0\r\n\r\n")


async def resets(asked: Asked) -> None:
    asked.reset()


async def hangs(asked: Asked) -> None:
    await half(asked)
    await asyncio.Event().wait()


async def is_no_http(asked: Asked) -> None:
    await asked.raw("220 smtp ready\r\n\r\n")


async def is_no_stream(asked: Asked) -> None:
    await asked.plain(200, {"choices": []})


async def is_no_json(asked: Asked) -> None:
    await asked.raw(SSE)
    await asked.events("{oops")


def tells(error: Any) -> Script:
    async def script(asked: Asked) -> None:
        await half(asked)
        await asked.events(error)
        await asked.raw("0\r\n\r\n")

    return script


@pytest.mark.parametrize(
    ("script", "kind", "pieces"),
    [
        (closes_in_the_middle, "broken_stream", 1),
        (ends_without_a_reason, "broken_stream", 1),
        (resets, "reset", 0),
        (hangs, "timeout", 1),
        (is_no_http, "bad_answer", 0),
        (is_no_stream, "bad_answer", 0),
        (is_no_json, "bad_answer", 0),
        (tells({"error": {"message": "lost", "type": "service_unavailable_error"}}), "unavailable", 1),
        (tells({"error": {"message": "full", "code": 429}}), "no_room", 1),
        (tells({"object": "error", "message": "oops"}), "server_error", 1),
    ],
)
async def test_failures_by_kind(script: Script, kind: str, pieces: int) -> None:
    record = await one(script, timeout_s=0.3 if kind == "timeout" else 20.0)
    assert (record.error, len(record.piece_times)) == (kind, pieces), record.message
    assert record.message and not record.ok


async def test_a_server_that_is_not_there() -> None:
    async with scripted() as server:
        pass
    run = await load(server, requests=3)
    assert [record.error for record in run.records] == ["connect"] * 3


async def test_failures_do_not_touch_the_others() -> None:
    async def every_second(asked: Asked) -> None:
        number = int(asked.headers["x-request-id"].rpartition("-")[2])
        await (resets if number % 2 else well)(asked)

    async with scripted(every_second) as server:
        run = await load(server, requests=30)
    assert [record.error for record in run.records] == ["", "reset"] * 15


async def test_an_interrupt_reaches_the_server() -> None:
    async with scripted(hangs) as server:
        trace = Trace("t", tuple(TraceRequest(n, 0.0, 8, 3) for n in range(5)), 1.0)
        door = a_door(server.url)
        target = door.target(Facts(server.url, "completions", "m", end_id=1000).prompts(trace, ""), "run")
        running = Load(target, [Job(request, 0.0) for request in trace.requests])
        task = asyncio.create_task(running.run())
        async with asyncio.timeout(10):
            while len(server.asked) < 5:
                await asyncio.sleep(0.005)
            running.interrupt()
            run = await task
            while len(server.gone) < 5:
                await asyncio.sleep(0.005)
        await door.close()
    assert run.interrupted and [record.error for record in run.records] == ["cancelled"] * 5
    assert sorted(server.gone) == [f"run-{n}" for n in range(5)]


# ---- connections -----------------------------------------------------------------------------------------------


async def test_a_kept_connection_that_was_closed_is_replaced_once() -> None:
    count = 0

    async def closes_after_each(asked: Asked) -> None:
        nonlocal count
        count += 1
        if count == 2:
            asked.close()  # the request on the kept connection meets a server that has just closed it
        else:
            await asked.plain(200, {"n": count})

    async with scripted(closes_after_each) as server:
        client = HttpClient(server.url, clock=time.perf_counter)
        assert (await client.fetch("GET", "/a", timeout_s=5))[1] == b'{"n": 1}'
        assert (await client.fetch("GET", "/b", timeout_s=5))[1] == b'{"n": 3}'
        assert (client.redials, server.connections) == (1, 2)
        client.close()


async def test_a_request_that_takes_too_long_closes_its_connection() -> None:
    async with scripted(hangs) as server:
        client = HttpClient(server.url, clock=time.perf_counter)
        with pytest.raises(HttpFailure, match=r"GET /a was not answered within 0.1 s"):
            await client.fetch("GET", "/a", timeout_s=0.1)
        async with asyncio.timeout(5):
            while not server.gone:
                await asyncio.sleep(0.005)
        client.close()


@pytest.mark.parametrize("header", [{"A\r\nB": "x"}, {"A": "x\r\nB: y"}, {"A:": "x"}])
def test_headers_cannot_smuggle_others(header: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is no header"):
        HttpClient("http://x", clock=time.perf_counter, headers=header)


def test_messages_of_errors_in_any_shape() -> None:
    assert error_message(b'{"error": {"message": "m"}}') == "m"
    assert error_message(b'{"detail": "m"}') == "{'detail': 'm'}"
    assert error_message(b'{"error": "m"}') == "m"
    assert error_message(b"<html>") == "<html>"
    assert error_message(b"[1]") == "[1]"
