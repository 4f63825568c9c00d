"""Any server with OpenAI's HTTP API as the load sees it: what it takes, how it is asked, what its events mean.

`HttpDoor.open` finds out by asking: fields that make a run exact (token ids as prompts, `ignore_eos`,
`return_token_ids`) are used where the server takes them and left out where it refuses them, and the report says which.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from bench.door import PROBE_S, Asking, DoorError, Facts
from bench.http1 import BadAnswer, EventReader
from bench.http_client import HttpClient, HttpFailure
from bench.prompts import FIRST_ID, TokenPrompts, WordPrompts, fit_words, sample_words
from bench.record import Record
from bench.traces import TraceRequest

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_MANY_WORDS = 320  # of the longer of two texts that are measured, where the context allows
_MAX_ERROR_BYTES = 64 << 10


class HttpDoor:
    """One server under one URL. `headers` go with every request."""

    def __init__(
        self, url: str, api: str, asking: Asking, *, clock: Callable[[], float], headers: dict[str, str]
    ) -> None:
        base = re.sub(r"/v1/?$", "", url)  # both ways of writing it are in use
        try:
            self.client = HttpClient(base, clock=clock, headers=headers)
        except ValueError as error:
            raise DoorError(str(error)) from None
        if api == "chat" and asking.prompts == "ids":
            raise DoorError("chat messages are text; token ids go with --api completions")
        self._facts = Facts(url, api, asking.model)
        self._asking = asking

    async def open(self) -> Facts:
        try:
            await self._models()
            await self._extensions()
            if self._facts.api == "completions" and self._asking.prompts != "text":
                await self._token_ids()
            if not self._facts.end_id:
                await self._words()
        except HttpFailure as failure:
            raise DoorError(f"{self._facts.url}: {failure}") from None
        return self._facts

    def target(self, prompts: TokenPrompts | WordPrompts, tag: str) -> HttpTarget:
        return HttpTarget(self.client, self._facts, self._asking, prompts, tag)

    async def close(self) -> None:
        self.client.close()

    async def _models(self) -> None:
        status, body = await self.client.fetch("GET", "/v1/models", timeout_s=PROBE_S)
        try:
            models = msgspec.json.decode(body, type=_Models).data if status == 200 else []
        except msgspec.DecodeError:
            models = []
        wanted = [model for model in models if model.id == self._facts.model]
        model = next(iter(wanted or ([] if self._facts.model else models)), None)
        if model is None and models:
            names = ", ".join(model.id for model in models)
            raise DoorError(f"{self._facts.url} has no model {self._facts.model!r}; it has {names}")
        if model is None and not self._facts.model:
            raise DoorError(
                f"{self._facts.url}/v1/models answered HTTP {status} and names no model; give --model"
            )
        if model is not None:
            self._learn(model=model.id, max_model_len=model.max_model_len or 0)

    async def _extensions(self) -> None:
        wanted = ["return_token_ids"] + ["ignore_eos"] * self._asking.ignore_eos
        status, message, _ = await self._probe(sample_words(8, "extensions"))
        if status != 200:
            raise DoorError(f"{self._facts.url} refuses a plain request: HTTP {status}: {message}")
        for field in wanted:
            status, message, _ = await self._probe(sample_words(8, "extensions"), **{field: True})
            if status == 200:
                self._learn(extensions=(*self._facts.extensions, field))
            elif status not in (400, 422):
                raise DoorError(f"{self._facts.url}: with {field} HTTP {status}: {message}")

    async def _token_ids(self) -> None:
        ids = [FIRST_ID, self._asking.end_id - 1] * 4
        status, message, counted = await self._probe(ids)
        if status == 200 and len(ids) <= counted <= len(ids) + 1:  # some put a begin of text before it
            self._learn(end_id=self._asking.end_id)
            return
        if self._asking.prompts == "ids":
            raise DoorError(
                f"{self._facts.url} takes no prompt of ids below {self._asking.end_id} (HTTP {status}: "
                f"{message or f'{len(ids)} ids counted as {counted} tokens'}); use --prompts text or a smaller --end-id"
            )

    async def _words(self) -> None:
        counts = []
        # An eighth of the context: words that the vocabulary does not know have several tokens.
        many = min(_MANY_WORDS, self._facts.max_model_len // 8) if self._facts.max_model_len else _MANY_WORDS
        for words in (max(1, many // 5), max(2, many)):
            status, message, counted = await self._probe(sample_words(words, "length"))
            if status != 200:
                raise DoorError(f"{self._facts.url}: HTTP {status} for {words} words: {message}")
            counts.append((words, counted))
        try:
            tokens_per_word, extra = fit_words(*counts)
        except ValueError as error:
            raise DoorError(f"{self._facts.url}: {error}") from None
        self._learn(tokens_per_word=tokens_per_word, extra_tokens=extra)

    async def _probe(self, prompt: str | list[int], **fields: Any) -> tuple[int, str, int]:
        """Status, message of the error, prompt tokens that the server counted, of an answer of one token."""
        body = {**body_of(self._facts, self._asking, prompt, 1), "stream": False, **fields}
        body.pop("stream_options")
        status, answer = await self.client.fetch(
            "POST", PATHS[self._facts.api], msgspec.json.encode(body), timeout_s=PROBE_S
        )
        if status != 200:
            return status, error_message(answer), 0
        try:
            usage = msgspec.json.decode(answer, type=_Event).usage
        except msgspec.DecodeError as error:
            raise DoorError(f"{self._facts.url} is no OpenAI server: {error}") from None
        return status, "", usage.prompt_tokens if usage else 0

    def _learn(self, **facts: Any) -> None:
        self._facts = replace(self._facts, **facts)


class HttpTarget:
    """What `bench.load` asks: streamed answers to the prompts of one run."""

    def __init__(
        self,
        client: HttpClient,
        facts: Facts,
        asking: Asking,
        prompts: TokenPrompts | WordPrompts,
        tag: str,
    ) -> None:
        self._client = client
        self._facts = facts
        self._asking = asking
        self._prompts = prompts
        self._tag = tag

    def prepare(self, request: TraceRequest) -> tuple[str, bytes]:
        """The request id, and the request as bytes."""
        request_id = f"{self._tag}-{request.number}"
        body = body_of(self._facts, self._asking, self._prompts.build(request), request.output_tokens)
        body.update(dict.fromkeys(self._facts.extensions, True))
        path = PATHS[self._facts.api]
        header = f"X-Request-Id: {request_id}\r\n"
        return request_id, self._client.encode("POST", path, msgspec.json.encode(body), header)

    async def ask(self, prepared: tuple[str, bytes], record: Record) -> None:
        record.request_id, request = prepared
        stream = _Stream(record)
        try:
            await self._client.exchange(request, stream)
        except HttpFailure as failure:
            record.fail(failure.kind, str(failure))
        else:
            stream.close()


def body_of(facts: Facts, asking: Asking, prompt: str | list[int], output_tokens: int) -> dict[str, Any]:
    """The fields that every server knows, and those of the user."""
    if facts.api == "chat":
        content: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    else:
        content = {"prompt": prompt}
    return {
        "model": facts.model,
        **content,
        "max_tokens": output_tokens,
        "temperature": asking.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **asking.extra,
    }


def kind_of(status: int) -> str:
    """The kind of error of an HTTP status."""
    return {429: "no_room", 503: "unavailable"}.get(
        status, "invalid" if 400 <= status < 500 else "server_error"
    )


def error_message(body: bytes) -> str:
    """What an error's body says, in OpenAI's shape or any other."""
    try:
        told = msgspec.json.decode(body)
        told = told.get("error", told)
        return str(told.get("message", told) if isinstance(told, dict) else told)[:500]
    except (msgspec.DecodeError, AttributeError):
        return body[:500].decode(errors="replace")


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Trace(msgspec.Struct):
    prefilled: str = ""


class _Event(msgspec.Struct):
    """What matters of an event; msgspec skips the rest without making objects of it."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    baton: _Trace | None = None
    error: Any = None
    object: str = ""


class _Stream:
    """Reads one streamed answer into its record."""

    _decode = msgspec.json.Decoder(_Event).decode

    def __init__(self, record: Record) -> None:
        self._record = record
        self._events = EventReader()
        self._plain = b""  # the body of what is no stream
        self._streams = False
        self._done = False

    def head(self, status: int, headers: dict[str, str]) -> None:
        self._record.status = status
        self._streams = status == 200 and headers.get("content-type", "").startswith("text/event-stream")

    def body(self, now: float, data: bytes) -> bool:
        if not self._streams:
            self._plain = (self._plain + data)[:_MAX_ERROR_BYTES]
            return False
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self._done = True
                return True
            try:
                self._take(now, self._decode(event), event)
            except msgspec.DecodeError as error:
                raise BadAnswer(f"{error} in the event {event[:200]!r}") from None
        return False

    def close(self) -> None:
        """The exchange is over, and the connection did not break."""
        record = self._record
        if record.status != 200:
            record.fail(kind_of(record.status), error_message(self._plain))
        elif not self._streams:
            record.fail("bad_answer", f"the answer is no event stream: {self._plain[:200]!r}")
        elif not self._done and not record.finish_reason:
            record.fail("broken_stream", "the stream ended without [DONE] and without a reason")
        if not record.completion_tokens:
            record.completion_tokens = sum(record.piece_tokens)

    def _take(self, now: float, event: _Event, raw: bytes) -> None:
        record = self._record
        if event.error is not None or event.object == "error":
            record.fail(_kind_of_error(event.error), error_message(raw))
            return
        for choice in event.choices:
            delta = choice.delta
            text = choice.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning))
            # Where ids are told they count: text may lag behind them, or come in larger pieces.
            tokens = len(choice.token_ids) if choice.token_ids is not None else int(bool(text))
            if tokens:
                record.piece(now, tokens)
            if choice.finish_reason:
                record.finish_reason = choice.finish_reason
        if event.usage is not None:
            record.prompt_tokens = event.usage.prompt_tokens
            record.completion_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            record.cached_tokens = (details and details.cached_tokens) or 0
        if event.baton is not None:
            record.prefilled = event.baton.prefilled


def _kind_of_error(error: Any) -> str:
    """Of an error in the middle of a stream, from what servers put there: a status, or words."""
    if not isinstance(error, dict):
        return "server_error"
    code = error.get("code")
    if isinstance(code, int) and code >= 400:
        return kind_of(code)
    said = f"{code} {error.get('type')}"
    return "no_room" if "rate_limit" in said else "unavailable" if "unavailable" in said else "server_error"
