"""The generation service: what it refuses, what it hands to the dispatcher, and how an answer becomes text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from router.dispatch_api import Ended, NewTokens, Prompt, RefusalKind, Refused
from router.generation import ContextLengthExceeded, GenerateCall, Generation, TextDelta, TextEnd
from router.text import TextCodec
from tests.router.echo import MAX_MODEL_LEN, MODEL, VOCAB_SIZE, EchoDispatcher, make_generation, until

Made = tuple[Generation, TextCodec, EchoDispatcher]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    dispatcher = EchoDispatcher()
    generation, codec = make_generation(tmp_path, dispatcher)
    return generation, codec, dispatcher


async def collect(generation: Generation, call: GenerateCall) -> tuple[list[TextDelta], TextEnd]:
    events = [event async for event in generation.generate(call)]
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert isinstance(events[-1], TextEnd)
    assert len(deltas) == len(events) - 1
    return deltas, events[-1]


def whole_text(deltas: list[TextDelta], end: TextEnd) -> str:
    return "".join(delta.text for delta in deltas) + end.text


def script(codec: TextCodec, text: str) -> Callable[[Prompt], list[int]]:
    ids = codec.encode(text, add_special_tokens=False)
    return lambda _prompt: ids


async def test_text_comes_back_with_its_trace(made: Made) -> None:
    generation, codec, dispatcher = made
    text = "the quick brown 🙂 fox"
    deltas, end = await collect(generation, GenerateCall(text=text, request_id="r1", model=MODEL))
    assert whole_text(deltas, end) == text
    ids = [token_id for delta in deltas for token_id in delta.ids]
    assert ids == codec.encode(text)
    assert [delta.first_index for delta in deltas] == list(range(len(ids)))
    assert (end.reason, end.request_id) == ("stop", "r1")
    assert end.prompt_tokens == end.completion_tokens == len(ids)
    assert (end.trace, end.decode_worker, end.decision) == (
        dispatcher.trace,
        "decode-0",
        "remote: 9 uncached >= 4",
    )
    assert dispatcher.cancelled == []
    assert dispatcher.active == 0


async def test_the_end_brings_what_was_held_back(made: Made) -> None:
    generation, codec, dispatcher = made
    half = codec.encode("\U0001f6f8", add_special_tokens=False)[:1]  # an emoji that the tokenizer never saw
    dispatcher.script = lambda _prompt: [*codec.encode("so ", add_special_tokens=False), *half]
    deltas, end = await collect(generation, GenerateCall(text="x"))
    assert end.text == "\ufffd"
    assert whole_text(deltas, end) == "so \ufffd"


# ---- sampling parameters -----------------------------------------------------------------------------------------


async def test_everything_given_reaches_the_dispatcher(made: Made) -> None:
    generation, codec, _dispatcher = made
    prompt = await generation.prepare(
        GenerateCall(
            token_ids=[5, 6],
            temperature=0.5,
            top_k=7,
            top_p=0.25,
            seed=11,
            max_tokens=9,
            stop_token_ids=[30, 31, 30],
            request_id="mine",
            salt="tenant",
        )
    )
    sampling = prompt.sampling
    assert (prompt.tokens, prompt.request_id, prompt.salt) == ([5, 6], "mine", "tenant")
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 0.25)
    assert (sampling.seed, sampling.max_tokens) == (11, 9)
    assert sampling.stop_token_ids == (30, 31, *codec.eos_ids)


async def test_absent_fields_take_the_models_defaults(tmp_path: Path) -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "eos_token_id": [1, 3]}
    generation, _codec = make_generation(tmp_path, EchoDispatcher(), generation_config=defaults)
    sampling = (await generation.prepare(GenerateCall(token_ids=[5, 6]))).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.9)
    assert sampling.stop_token_ids == (1, 3)
    assert sampling.max_tokens == MAX_MODEL_LEN - 2
    sampling = (await generation.prepare(GenerateCall(token_ids=[5], top_k=0, temperature=0.0))).sampling
    assert (sampling.temperature, sampling.top_k) == (0.0, 0)
    assert (await generation.prepare(GenerateCall(token_ids=[5], top_k=-1))).sampling.top_k == 0


async def test_ignore_eos_leaves_only_the_users_stop_ids(made: Made) -> None:
    generation = made[0]
    call = GenerateCall(token_ids=[5], ignore_eos=True, stop_token_ids=[9])
    assert (await generation.prepare(call)).sampling.stop_token_ids == (9,)


async def test_absent_seeds_are_drawn_and_given_ones_kept(made: Made) -> None:
    generation = made[0]
    seeds = {(await generation.prepare(GenerateCall(token_ids=[5]))).sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert (await generation.prepare(GenerateCall(token_ids=[5], seed=0))).sampling.seed == 0


async def test_absent_request_ids_are_drawn(made: Made) -> None:
    generation = made[0]
    ids = {(await generation.prepare(GenerateCall(token_ids=[5]))).request_id for _ in range(8)}
    assert len(ids) == 8
    assert all(ids)


@pytest.mark.parametrize(
    ("default", "given", "expected"),
    [
        (None, None, MAX_MODEL_LEN - 100),
        (16, None, 16),
        (64, None, MAX_MODEL_LEN - 100),  # a default is clamped
        (16, MAX_MODEL_LEN - 100, MAX_MODEL_LEN - 100),
    ],
)
async def test_max_tokens(made: Made, default: int | None, given: int | None, expected: int) -> None:
    call = GenerateCall(token_ids=[5] * 100, default_max_tokens=default, max_tokens=given)
    assert (await made[0].prepare(call)).sampling.max_tokens == expected


# ---- refusals ------------------------------------------------------------------------------------------------------

IDS: dict[str, Any] = {"token_ids": [5, 6]}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "prompt", "exactly one prompt"),
        ({"text": "a", "token_ids": [5]}, "prompt", "exactly one prompt"),
        ({"token_ids": []}, "prompt", "prompt is empty"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools here"),
        ({"text": "\ud800"}, "prompt", "not valid Unicode"),
        ({"token_ids": [5, VOCAB_SIZE]}, "prompt", f"token id {VOCAB_SIZE} is not in the vocabulary of 512"),
        ({"token_ids": [-1]}, "prompt", "token id -1"),
        ({**IDS, "temperature": -0.1}, "temperature", "between 0 and 2, not -0.1"),
        ({**IDS, "temperature": 2.1}, "temperature", "between 0 and 2"),
        ({**IDS, "temperature": float("nan")}, "temperature", "between 0 and 2"),
        ({**IDS, "top_p": 0.0}, "top_p", "above 0"),
        ({**IDS, "top_p": 1.1}, "top_p", "at most 1"),
        ({**IDS, "top_p": float("nan")}, "top_p", "at most 1"),
        ({**IDS, "top_k": -2}, "top_k", "not -2"),
        ({**IDS, "seed": -1}, "seed", "seed must be"),
        ({**IDS, "seed": 2**64}, "seed", "seed must be"),
        ({**IDS, "max_tokens": 0}, "max_tokens", "at least 1, not 0"),
        ({**IDS, "stop": ["x"] * 17}, "stop", "at most 16 stop strings are allowed, not 17"),
        ({**IDS, "stop": [""]}, "stop", "1 to 256"),
        ({**IDS, "stop": ["x" * 257]}, "stop", "not 257"),
        ({**IDS, "stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "token id 512"),
        ({**IDS, "stop_token_ids": [5] * 257}, "stop_token_ids", "at most 256"),
        ({**IDS, "request_id": "x" * 129}, "request_id", "at most 128 printable"),
        ({**IDS, "request_id": "a\nb"}, "request_id", "printable"),
        ({**IDS, "request_id": "é"}, "request_id", "ASCII"),
    ],
)
async def test_refusals_name_the_field(made: Made, fields: dict[str, Any], param: str, message: str) -> None:
    generation, _codec, dispatcher = made
    with pytest.raises(Refused, match=message) as caught:
        await collect(generation, GenerateCall(**fields))
    assert caught.value.kind is RefusalKind.INVALID
    assert caught.value.param == param
    assert dispatcher.prompts == []


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_p": 1.0},
        {"seed": 2**64 - 1},
        {"stop": ["x" * 256] * 16},
        {"stop_token_ids": [VOCAB_SIZE - 1]},
        {"max_tokens": MAX_MODEL_LEN - 2},
        {"request_id": "x" * 128},
    ],
)
async def test_the_limits_themselves_are_allowed(made: Made, fields: dict[str, Any]) -> None:
    await collect(made[0], GenerateCall(**IDS, **fields))


async def test_unknown_model(made: Made) -> None:
    with pytest.raises(Refused, match="'gpt-9' does not exist; this server serves 'echo'") as caught:
        await made[0].prepare(GenerateCall(token_ids=[5], model="gpt-9"))
    assert (caught.value.kind, caught.value.param) == (RefusalKind.NOT_FOUND, "model")


@pytest.mark.parametrize(
    ("fields", "param", "numbers"),
    [
        ({"token_ids": [5] * MAX_MODEL_LEN}, "prompt", [MAX_MODEL_LEN, MAX_MODEL_LEN]),
        ({"text": "z " * 200}, "prompt", [MAX_MODEL_LEN, 401]),
        ({"messages": [{"role": "user", "content": "z " * 200}]}, "messages", [MAX_MODEL_LEN]),
        ({"text": "z" * 1_000_000}, "prompt", [MAX_MODEL_LEN, 1_000_000]),
        ({"token_ids": [5] * 100, "max_tokens": 29}, "max_tokens", [MAX_MODEL_LEN, 100, 29, 28]),
    ],
)
async def test_too_long_names_limit_and_length(
    made: Made, fields: dict[str, Any], param: str, numbers: list[int]
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        await made[0].prepare(GenerateCall(**fields))
    assert caught.value.kind is RefusalKind.INVALID
    assert caught.value.param == param
    for number in numbers:
        assert str(number) in caught.value.message


async def test_hopeless_texts_are_not_tokenized(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, codec, _dispatcher = made

    async def never(text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(codec, "encode_async", never)
    with pytest.raises(ContextLengthExceeded, match="characters"):
        await generation.prepare(GenerateCall(text="z" * 1_000_000))


async def test_tokenizer_beyond_the_models_vocabulary(tmp_path: Path) -> None:
    generation, _codec = make_generation(tmp_path, EchoDispatcher(), config={"vocab_size": 20})
    with pytest.raises(Refused, match="not in the vocabulary of 20"):
        await generation.prepare(GenerateCall(text="zzz"))


# ---- chat ----------------------------------------------------------------------------------------------------------


async def test_chat_is_rendered_without_another_bos(made: Made) -> None:
    generation, codec, _dispatcher = made
    prompt = await generation.prepare(GenerateCall(messages=[{"role": "user", "content": "fox"}]))
    rendered = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.tokens == codec.encode(rendered, add_special_tokens=False)
    assert prompt.tokens[0] != codec.encode("")[0]


# ---- stop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 3, 100])
async def test_stop_string_ends_text_and_ids_and_cancels(made: Made, piece: int) -> None:
    generation, codec, dispatcher = made
    dispatcher.script = script(codec, "the quick brown fox jumps over the lazy dog")
    dispatcher.piece = piece
    call = GenerateCall(text="x", request_id="r", stop=["fox ju", "lazy"])
    deltas, end = await collect(generation, call)
    assert whole_text(deltas, end) == "the quick brown "
    assert (end.reason, end.trace) == ("stop", dispatcher.trace)
    ids = [token_id for delta in deltas for token_id in delta.ids]
    assert end.completion_tokens == len(ids)
    assert "fox ju" in codec.decode(ids)
    assert "fox ju" not in codec.decode(ids[:-1])  # no ids after the one that completed it
    assert dispatcher.cancelled == ["r"]
    assert dispatcher.active == 0


async def test_cancel_goes_out_before_the_end_is_told(made: Made) -> None:
    generation, codec, dispatcher = made
    dispatcher.script = script(codec, "the quick brown fox")
    async with aclosing(
        generation.generate(GenerateCall(text="x", request_id="r", stop=["quick"]))
    ) as events:
        async for event in events:
            if isinstance(event, TextEnd):
                assert dispatcher.cancelled == ["r"]
                return
    raise AssertionError("no end")


async def test_what_might_have_been_a_stop_string_comes_with_the_end(made: Made) -> None:
    generation, codec, dispatcher = made
    dispatcher.script = script(codec, "the lazy")
    deltas, end = await collect(generation, GenerateCall(text="x", stop=["lazy dog"]))
    assert "".join(delta.text for delta in deltas) == "the "
    assert end.text == "lazy"
    assert end.trace is dispatcher.trace
    assert dispatcher.cancelled == []


@pytest.mark.parametrize("stop", [(), ("zzz",)])
async def test_stop_tokens_are_no_text(made: Made, stop: tuple[str, ...]) -> None:
    generation, codec, dispatcher = made
    dog = codec.encode(" dog", add_special_tokens=False)
    dispatcher.script = lambda _prompt: [*codec.encode("the lazy", add_special_tokens=False), *dog]
    call = GenerateCall(text="x", stop_token_ids=[dog[0]], stop=stop)
    deltas, end = await collect(generation, call)
    assert whole_text(deltas, end) == "the lazy"
    assert deltas[-1].ids == [dog[0]]
    assert end.reason == "stop"


async def test_eos_ends_and_ignore_eos_does_not(made: Made) -> None:
    generation, codec, dispatcher = made
    (eos,) = codec.eos_ids
    ids = codec.encode("fox", add_special_tokens=False)
    dispatcher.script = lambda _prompt: [*ids, eos, *ids]
    deltas, end = await collect(generation, GenerateCall(text="x"))
    assert (whole_text(deltas, end), end.completion_tokens, end.reason) == ("fox", len(ids) + 1, "stop")
    deltas, end = await collect(
        generation, GenerateCall(text="x", ignore_eos=True, max_tokens=2 * len(ids) + 1)
    )
    assert (whole_text(deltas, end), end.reason) == ("foxfox", "length")


# ---- the client goes away, the dispatcher fails --------------------------------------------------------------------


async def test_closing_cancels_at_once(made: Made) -> None:
    generation, _codec, dispatcher = made
    events = generation.generate(GenerateCall(text="the quick brown fox", request_id="gone"))
    await anext(events)
    assert dispatcher.active == 1
    await events.aclose()
    assert dispatcher.cancelled == ["gone"]


async def test_cancelling_the_task_cancels_the_request(made: Made) -> None:
    generation, _codec, dispatcher = made
    dispatcher.hold_at = 1
    task = asyncio.create_task(collect(generation, GenerateCall(text="the fox", request_id="gone")))
    await dispatcher.holding.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: dispatcher.cancelled == ["gone"])


@pytest.mark.parametrize("refuse_at", [None, 2])
async def test_refusals_of_the_dispatcher_pass_through(made: Made, refuse_at: int | None) -> None:
    generation, _codec, dispatcher = made
    dispatcher.refusal = Refused(RefusalKind.NO_ROOM, "full", retry_after_s=1.5)
    dispatcher.refuse_at = refuse_at
    with pytest.raises(Refused) as caught:
        await collect(generation, GenerateCall(text="the fox"))
    assert caught.value is dispatcher.refusal
    assert dispatcher.active == 0


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([NewTokens(0, [5])], "broke off"),
        ([NewTokens(0, [5]), NewTokens(2, [6]), Ended("stop")], "token 1 was due, token 2 came"),
        ([NewTokens(0, [5]), NewTokens(0, [5]), Ended("stop")], "token 1 was due, token 0 came"),
    ],
)
async def test_a_broken_stream_is_never_passed_on(
    made: Made, monkeypatch: pytest.MonkeyPatch, events: list[NewTokens | Ended], message: str
) -> None:
    generation, _codec, dispatcher = made

    async def broken(_prompt: Prompt) -> Any:
        for event in events:
            yield event

    monkeypatch.setattr(dispatcher, "generate", broken)
    with pytest.raises(Refused, match=message) as caught:
        await collect(generation, GenerateCall(text="the fox"))
    assert caught.value.kind is RefusalKind.INTERNAL


def test_ready_and_model(made: Made) -> None:
    generation, _codec, dispatcher = made
    for ready in (True, False):
        dispatcher.ready = ready
        assert generation.ready is ready
    assert (generation.model.name, generation.model.max_model_len) == (MODEL, MAX_MODEL_LEN)
    assert generation.model.vocab_size == VOCAB_SIZE
