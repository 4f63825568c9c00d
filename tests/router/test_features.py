"""What a request may ask for beside its prompt: the same over gRPC and HTTP, streamed or not, limits and all."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import baton.rpc
from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc
from router.generation import TextPrompt
from router.grpc_door import PROMPT_PIECE, InferenceDoor, _prompt_pieces
from tests.router.echo import VOCAB_SIZE, made_up
from tests.router.http_client import Served, says, serving

TEXT = "the quick brown fox"


class Doors:
    """One generation service behind both doors."""

    def __init__(self, http: Served, stub: Any) -> None:
        self.http = http
        self.stub = stub

    async def grpc(self, **sampling: Any) -> list[api.GenerateResponse]:
        request = api.GenerateRequest(text=TEXT, sampling=api.SamplingParams(**sampling))
        return [response async for response in self.stub.Generate(request, timeout=10)]


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with serving(tmp_path) as http:
        server = baton.rpc.server("secret")
        door = InferenceDoor(http.generation, api.StatusResponse)
        inference_pb2_grpc.add_InferenceServicer_to_server(door, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Doors(http, inference_pb2_grpc.InferenceStub(channel))
        await server.stop(None)


ASKED: dict[str, Any] = {
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 1.25,
    "logit_bias": {7: 3.5, 9: -100.0},
    "min_tokens": 3,
    "n": 2,
    "seed": 5,
    "top_k": 4,
    "prompt_logprobs": 2,
}


async def test_every_field_reaches_the_engine_from_both_doors(doors: Doors) -> None:
    bias = {str(token): amount for token, amount in ASKED["logit_bias"].items()}
    asked = {**ASKED, "logit_bias": bias, "max_tokens": 40}
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 3}
    await doors.grpc(**ASKED, logprobs=3, max_tokens=40)
    assert (await doors.http.completion(prompt=TEXT, **asked, logprobs=3)).status_code == 200
    assert (await doors.http.post("/v1/chat/completions", **chat, **asked)).status_code == 200
    over_grpc, completion, chatted = doors.http.dispatcher.prompts
    assert over_grpc.sampling == completion.sampling == chatted.sampling
    assert over_grpc.n == completion.n == chatted.n == 2
    found = over_grpc.sampling
    assert dict(found.logit_bias) == ASKED["logit_bias"]
    for name in ASKED.keys() - {"logit_bias", "n"}:
        assert getattr(found, name) == ASKED[name], name
    assert found.logprobs == 3 and found.max_tokens == 40


async def test_absent_means_off(doors: Doors) -> None:
    await doors.grpc(max_tokens=3)
    await doors.http.completion(prompt=TEXT, max_tokens=3)
    for prompt in doors.http.dispatcher.prompts:
        assert not prompt.sampling.shapes and prompt.n == 1
        assert prompt.sampling.logprobs is prompt.sampling.prompt_logprobs is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 0, "between 1 and 16"),
        ("n", 17, "between 1 and 16"),
        ("logprobs", 21, "between 0 and 20"),
        ("prompt_logprobs", 21, "between 0 and 20"),
        ("min_p", 1.5, "between 0 and 1"),
        ("min_p", -0.5, "between 0 and 1"),
        ("repetition_penalty", 0, "above 0"),
        ("repetition_penalty", 11, "at most 10"),
        ("presence_penalty", 2.5, "between -2 and 2"),
        ("frequency_penalty", -2.5, "between -2 and 2"),
        ("logit_bias", {7: 101}, "between -100 and 100"),
        ("logit_bias", {VOCAB_SIZE: 1}, "vocabulary"),
        ("min_tokens", 100_000, "at most"),
    ],
)
async def test_limits(doors: Doors, field: str, value: Any, message: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await doors.grpc(**{field: value})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in (caught.value.details() or "")
    body = {field: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value}
    response = await doors.http.completion(prompt=TEXT, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field and message in error["message"]
    assert not doors.http.dispatcher.prompts


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 21, "logprobs": True}, "logprobs"),
        ("/v1/chat/completions", {"logprobs": 2}, "logprobs"),
        ("/v1/chat/completions", {"echo": True}, "echo"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/completions", {"best_of": 2}, "best_of"),
        ("/v1/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
async def test_what_either_api_refuses(doors: Doors, path: str, body: dict[str, Any], param: str) -> None:
    prompt = (
        {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    )
    response = await doors.http.post(path, **prompt, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# ---- n -------------------------------------------------------------------------------------------------------------


async def test_choices_over_grpc(doors: Doors) -> None:
    *tokens, last = await doors.grpc(n=3)
    ids = doors.http.codec.encode(TEXT)
    for choice in range(3):
        mine = [response.tokens for response in tokens if response.tokens.choice == choice]
        assert [token for piece in mine for token in piece.ids] == ids[choice:]
        end = last.finished.choices[choice]
        text = "".join(piece.text for piece in mine) + end.text
        assert text == doors.http.codec.decode(ids[choice:])
        assert (end.index, end.reason, end.completion_tokens) == (choice, "stop", len(ids) - choice)
    assert last.finished.completion_tokens == 3 * len(ids) - 3
    assert last.finished.reason == "stop" and last.finished.trace.decode_worker == "decode-0"


@pytest.mark.parametrize("chat", [False, True])
async def test_choices_over_http(doors: Doors, chat: bool) -> None:
    doors.http.dispatcher.script = says(doors.http.codec, TEXT)
    ids = doors.http.codec.encode(TEXT, add_special_tokens=False)
    texts = [doors.http.codec.decode(ids[choice:]) for choice in range(3)]
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    whole = (await doors.http.post(path, **body, n=3, return_token_ids=True)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [c["message"]["content"] if chat else c["text"] for c in whole["choices"]] == texts
    assert [choice["token_ids"] for choice in whole["choices"]] == [ids, ids[1:], ids[2:]]
    assert all(choice["finish_reason"] == "stop" for choice in whole["choices"])
    assert whole["usage"]["completion_tokens"] == 3 * len(ids) - 3
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert "baton" in whole
    events = await doors.http.events(path, **body, n=3, stream_options={"include_usage": True})
    assert events.pop()["usage"] == whole["usage"]
    found, reasons = ["", "", ""], [[], [], []]  # type: ignore[var-annotated]
    for event in events:
        (choice,) = event["choices"]
        found[choice["index"]] += choice["delta"].get("content", "") if chat else choice["text"]
        reasons[choice["index"]] += [choice["finish_reason"]] * bool(choice["finish_reason"])
    assert found == texts and reasons == [["stop"]] * 3
    assert [("baton" in event) for event in events].count(True) == 1


async def test_several_prompts_with_several_choices(doors: Doors) -> None:
    whole = (
        await doors.http.completion(prompt=[[40, 41, 42], [50, 51, 52]], n=2, return_token_ids=True)
    ).json()
    found = [(choice["index"], choice["token_ids"]) for choice in whole["choices"]]
    assert found == [(0, [40, 41, 42]), (1, [41, 42]), (2, [50, 51, 52]), (3, [51, 52])]
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (6, 10)
    body = {"prompt": [[40, 41, 42], [50, 51, 52]], "n": 2, "return_token_ids": True}
    streamed: dict[int, list[int]] = {}
    for event in await doors.http.events("/v1/completions", **body):
        (choice,) = event["choices"]
        streamed.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert sorted(streamed.items()) == found


async def test_a_stop_string_ends_its_choice_alone(doors: Doors) -> None:
    """Choice 1 lacks the first token, so it has no "the"; when all are stopped the worker is told at once."""
    doors.http.dispatcher.script = says(doors.http.codec, "the fox the")
    whole = (await doors.http.completion(prompt="x", n=2, stop=["the fox"], logprobs=0)).json()
    first, second = whole["choices"]
    assert (first["text"], first["finish_reason"]) == ("", "stop")
    assert second["text"].endswith(" the") and second["finish_reason"] == "stop"
    assert len(doors.http.dispatcher.cancelled) == 1  # when the other had ended, nobody needed the rest
    ids = doors.http.codec.encode("the fox", add_special_tokens=False)
    assert len(first["logprobs"]["tokens"]) == len(ids)
    both = await doors.http.completion(prompt="x", n=2, stop=["fox"])
    assert [choice["finish_reason"] for choice in both.json()["choices"]] == ["stop", "stop"]
    assert len(doors.http.dispatcher.cancelled) == 2


async def test_min_tokens_holds_stop_strings_off(doors: Doors) -> None:
    doors.http.dispatcher.script = says(doors.http.codec, "fox fox fox fox")
    ids = doors.http.codec.encode("fox fox", add_special_tokens=False)
    short = (await doors.http.completion(prompt="x", stop=["fox"])).json()
    assert short["choices"][0]["text"] == ""
    longer = (await doors.http.completion(prompt="x", stop=["fox"], min_tokens=len(ids))).json()
    assert longer["choices"][0]["text"] == "fox fox "


# ---- log-probabilities and echo ------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 3])
async def test_logprobs_over_grpc(doors: Doors, piece: int) -> None:
    doors.http.dispatcher.piece = piece
    *tokens, _ = await doors.grpc(logprobs=2, n=2)
    for response in tokens:
        expected = made_up(list(response.tokens.ids), 2)
        assert response.tokens.logprobs.chosen == pytest.approx(expected.chosen)
        assert list(response.tokens.logprobs.top_ids) == expected.top_ids
        assert response.tokens.logprobs.top == pytest.approx(expected.top)
    assert not any(response.tokens.HasField("logprobs") for response in await doors.grpc())


async def test_logprobs_end_with_the_answer(doors: Doors) -> None:
    """Tokens that came with the one that completed a stop string are dropped, and their log-probabilities too."""
    doors.http.dispatcher.piece = 100
    first, last = await doors.grpc(logprobs=1, stop=["brown"])
    assert 0 < len(first.tokens.ids) < len(doors.http.codec.encode(TEXT))
    assert list(first.tokens.logprobs.top_ids) == list(first.tokens.ids)
    assert len(first.tokens.logprobs.chosen) == last.finished.completion_tokens == len(first.tokens.ids)


async def test_prompt_over_grpc(doors: Doors) -> None:
    ids = doors.http.codec.encode(TEXT)
    first, *rest = await doors.grpc(echo=True, prompt_logprobs=1)
    assert list(first.prompt.ids) == ids and first.prompt.text == TEXT
    assert first.prompt.logprobs.chosen == pytest.approx(made_up(ids[1:], 1).chosen)
    assert list(first.prompt.logprobs.top_ids) == ids[1:]
    assert not any(response.HasField("prompt") for response in rest)
    silent, *_ = await doors.grpc(prompt_logprobs=0)
    assert silent.prompt.text == "" and len(silent.prompt.logprobs.chosen) == len(ids) - 1
    echoed, *_ = await doors.grpc(echo=True)
    assert echoed.prompt.text == TEXT and not echoed.prompt.HasField("logprobs")


def test_a_long_prompt_comes_in_pieces() -> None:
    ids = [token % VOCAB_SIZE for token in range(2 * PROMPT_PIECE + 5)]
    pieces = [piece.prompt for piece in _prompt_pieces(TextPrompt(ids, "text", made_up(ids[1:], 2)))]
    assert [piece.first_index for piece in pieces] == [0, PROMPT_PIECE, 2 * PROMPT_PIECE]
    assert [token for piece in pieces for token in piece.ids] == ids
    assert [piece.text for piece in pieces] == ["text", "", ""]
    for piece in pieces:
        expected = made_up(list(piece.ids)[not piece.first_index :], 2)
        assert piece.logprobs.chosen == pytest.approx(expected.chosen)
        assert list(piece.logprobs.top_ids) == expected.top_ids


@pytest.mark.parametrize("echo", [False, True])
async def test_completion_logprobs(doors: Doors, echo: bool) -> None:
    """OpenAI's four lists, whole and streamed; with `echo` they begin with the prompt, whose first token has none."""
    codec = doors.http.codec
    doors.http.dispatcher.script = says(codec, "naïve fox 🙂")
    answer = codec.encode("naïve fox 🙂", add_special_tokens=False)
    prompt = codec.encode(TEXT)
    body = {"prompt": TEXT, "logprobs": 2, "echo": echo, "n": 2}
    whole = (await doors.http.completion(**body)).json()
    for choice, ids in zip(whole["choices"], (answer, answer[1:]), strict=True):
        told = choice["logprobs"]
        every = [*prompt, *ids] if echo else ids
        assert len(told["tokens"]) == len(every)
        names = [codec.token_bytes(token) for token in every]
        assert [name_bytes(token) for token in told["tokens"]] == names
        expected: list[float | None] = [-token / 1000 for token in every]
        if echo:
            expected[0] = None
            assert told["top_logprobs"][0] is None
            assert choice["text"].startswith(TEXT)
        assert told["token_logprobs"] == expected
        assert all(len(top) == 2 for top in told["top_logprobs"] if top)
        offsets, at = [], 0
        for token in told["tokens"]:
            offsets.append(at)
            at += len(token)
        assert told["text_offset"] == offsets
    streamed: list[dict[str, list[Any]]] = [{}, {}]
    for event in await doors.http.events("/v1/completions", **body):
        for choice in event["choices"]:
            for name, values in (choice["logprobs"] or {}).items():
                streamed[choice["index"]].setdefault(name, []).extend(values)
    assert streamed == [choice["logprobs"] for choice in whole["choices"]]


def name_bytes(token: str) -> bytes:
    """OpenAI writes a part of a character as bytes:\\xf0\\x9f."""
    if not token.startswith("bytes:"):
        return token.encode()
    return bytes(int(part, 16) for part in token.removeprefix("bytes:").split("\\x")[1:])


async def test_chat_logprobs(doors: Doors) -> None:
    codec = doors.http.codec
    doors.http.dispatcher.script = says(codec, "fox 🙂")
    ids = codec.encode("fox 🙂", add_special_tokens=False)
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    whole = (await doors.http.post("/v1/chat/completions", **body)).json()
    content = whole["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "fox 🙂"
    for entry, token in zip(content, ids, strict=True):
        assert entry["logprob"] == -token / 1000
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-token / 1000, -(token + 1) / 1000]
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
    streamed: list[Any] = []
    for event in await doors.http.events("/v1/chat/completions", **body):
        streamed += ((event["choices"][0]["logprobs"] or {}).get("content")) or []
    assert streamed == content
    plain = await doors.http.post("/v1/chat/completions", messages=body["messages"], logprobs=False)
    assert plain.json()["choices"][0]["logprobs"] is None


async def test_echo_without_logprobs(doors: Doors) -> None:
    doors.http.dispatcher.script = says(doors.http.codec, " fox jumps")
    whole = (await doors.http.completion(prompt=TEXT, echo=True, n=2)).json()
    assert whole["choices"][0]["text"] == TEXT + " fox jumps" and whole["choices"][0]["logprobs"] is None
    ids = doors.http.codec.encode("the lazy dog")
    events = await doors.http.events("/v1/completions", prompt=ids, echo=True)
    assert "".join(event["choices"][0]["text"] for event in events) == "the lazy dog fox jumps"


async def test_prompt_logprobs_over_http(doors: Doors) -> None:
    """As vLLM tells them."""
    ids = doors.http.codec.encode(TEXT)
    response = await doors.http.completion(prompt=TEXT, prompt_logprobs=1)
    (choice,) = response.json()["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None and not choice["text"].startswith(TEXT * 2)
    for told, token in zip(rest, ids[1:], strict=True):
        name = doors.http.codec.token_bytes(token).decode(errors="replace")
        assert told == {str(token): {"logprob": -token / 1000, "decoded_token": name}}
    assert json.loads(response.text)["usage"]["prompt_tokens"] == len(ids)
