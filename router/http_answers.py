"""What /v1/completions and /v1/chat/completions answer, as bytes; used by `router.http_door`.

A streamed token costs a few string joins: everything about a chunk but its text and ids is encoded once per answer.
Besides OpenAI's fields an answer carries a `baton` object (the trace: where the prompt was prefilled and how long each
phase took) and, when asked with `return_token_ids`, the `token_ids` of each choice or delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.api import Logprobs
from router.dispatch_api import RefusalKind, Refused
from router.generation import ChoiceEnd, ContextLengthExceeded, TextDelta, TextEnd, TextEvent, TextPrompt
from router.http_logprobs import ChoiceLogprobs, TokenBytes, prompt_logprobs

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode
_ERROR_TYPES = {
    RefusalKind.INVALID: ("invalid_request_error", None),
    RefusalKind.NOT_FOUND: ("invalid_request_error", "model_not_found"),
    RefusalKind.NO_ROOM: ("rate_limit_error", "rate_limit_exceeded"),
    RefusalKind.TOO_LATE: ("rate_limit_error", "deadline_unreachable"),
    RefusalKind.UNAVAILABLE: ("service_unavailable_error", "unavailable"),
    RefusalKind.INTERNAL: ("server_error", "internal_error"),
}


@dataclass(slots=True)
class Choice:
    """One answer while it is collected."""

    parts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: Logprobs = field(default_factory=Logprobs)
    reason: str = ""


class Collected:
    """The `n` choices of one call while they are collected."""

    def __init__(self, n: int) -> None:
        self.choices = [Choice() for _ in range(n)]
        self.prompt: TextPrompt | None = None
        self.end: TextEnd | None = None

    def add(self, event: TextEvent) -> None:
        if isinstance(event, TextPrompt):
            self.prompt = event
        elif isinstance(event, TextDelta):
            choice = self.choices[event.choice]
            choice.parts.append(event.text)
            choice.ids.extend(event.ids)
            if event.logprobs is not None:
                choice.logprobs.extend(event.logprobs)
        elif isinstance(event, ChoiceEnd):
            self._ended(event)
        else:
            self._ended(event.choices[-1])
            self.end = event

    def _ended(self, end: ChoiceEnd) -> None:
        self.choices[end.choice].parts.append(end.text)
        self.choices[end.choice].reason = end.reason


class Answers:
    """Encodes the answers of one call. `chat`: as chat.completion, otherwise as text_completion.

    A call has as many choices as prompts times `n`, those of one prompt together.
    """

    def __init__(
        self,
        *,
        chat: bool,
        request_id: str,
        model: str,
        created: int,
        with_ids: bool,
        with_usage: bool,
        with_logprobs: bool,
        token_bytes: TokenBytes,
    ) -> None:
        self._chat = chat
        self._with_logprobs = with_logprobs
        self._token_bytes = token_bytes
        self._logprobs: dict[int, ChoiceLogprobs] = {}  # by choice
        self._with_ids = with_ids
        self._usage_in_chunks = b',"usage":null' if with_usage else b""
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "object": "",
            "created": created,
            "model": model,
        }
        chunk_head = _encode({**self._head, "object": "chat.completion.chunk" if chat else "text_completion"})
        self._chunk_head = b"data: " + chunk_head[:-1]

    def role(self, index: int) -> bytes:
        """What comes before the first token of a streamed chat answer; nothing otherwise."""
        if not self._chat:
            return b""
        return self._chunk(index, b'"delta":{"role":"assistant","content":""},"logprobs":null', b"null")

    def prompt(self, index: int, prompt: TextPrompt) -> bytes:
        """The echoed prompt in front of a choice."""
        if not prompt.text:
            return b""
        ids = b',"token_ids":[]' if self._with_ids else b""
        logprobs = self._tell(index, prompt.ids, prompt.logprobs)
        return self._chunk(index, self._text(prompt.text, logprobs) + ids, b"null")

    def delta(self, index: int, delta: TextDelta) -> bytes:
        """One event of the stream. Empty when there is nothing to tell yet."""
        if not delta.text and not self._with_ids and delta.logprobs is None:
            return b""
        ids = b',"token_ids":' + _encode(delta.ids) if self._with_ids else b""
        logprobs = b"null" if delta.logprobs is None else self._tell(index, delta.ids, delta.logprobs)
        return self._chunk(index, self._text(delta.text, logprobs) + ids, b"null")

    def end(self, index: int, choice: ChoiceEnd, end: TextEnd | None) -> bytes:
        """The event that ends a choice, with its reason; the last of a prompt with the trace."""
        ids = b',"token_ids":[]' if self._with_ids else b""
        more = b"" if end is None else b',"baton":' + _encode(baton(end))
        if not self._chat or choice.text:
            content = self._text(choice.text)
        else:
            content = b'"delta":{},"logprobs":null'
        return self._chunk(index, content + ids, _encode(choice.reason), more)

    def usage(self, ends: Sequence[TextEnd]) -> bytes:
        """The last event when usage was asked for: no choices."""
        return self._chunk_head + b',"choices":[],"usage":' + _encode(usage(ends)) + b"}\n\n"

    def whole(self, calls: Sequence[Collected]) -> bytes:
        """The answer to a call that does not stream. With several prompts, each choice has its own `baton`."""
        ends = [call.end for call in calls if call.end is not None]
        body: dict[str, Any] = {
            **self._head,
            "object": "chat.completion" if self._chat else "text_completion",
        }
        told: list[dict[str, Any]] = []
        for call, end in zip(calls, ends, strict=True):
            for choice in call.choices:
                told.append(self._choice(len(told), choice, call.prompt))
                if len(ends) > 1:
                    told[-1]["baton"] = baton(end)
        body["choices"] = told
        body["usage"] = usage(ends)
        if len(ends) == 1:
            body["baton"] = baton(ends[0])
        return _encode(body)

    def _choice(self, index: int, choice: Choice, prompt: TextPrompt | None) -> dict[str, Any]:
        text = "".join(choice.parts)
        told: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": choice.reason}
        ids, logprobs = choice.ids, choice.logprobs
        if prompt is not None:
            text = prompt.text + text
            if prompt.logprobs is not None:
                told["prompt_logprobs"] = prompt_logprobs(self._token_bytes, prompt.ids, prompt.logprobs)
            if prompt.text and prompt.logprobs is not None and self._with_logprobs:
                ids, logprobs = prompt.ids + ids, prompt.logprobs.part(0, len(prompt.ids) - 1)
                logprobs.extend(choice.logprobs)
        if self._with_logprobs:
            told["logprobs"] = self._of(index).tell(ids, logprobs)
        if self._chat:
            told["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            told["text"] = text
        if self._with_ids:
            told["token_ids"] = choice.ids
        return told

    def _of(self, index: int) -> ChoiceLogprobs:
        return self._logprobs.setdefault(index, ChoiceLogprobs(self._token_bytes, chat=self._chat))

    def _tell(self, index: int, ids: list[int], logprobs: Logprobs | None) -> bytes:
        if logprobs is None or not self._with_logprobs:
            return b"null"
        return _encode(self._of(index).tell(ids, logprobs))

    def _text(self, text: str, logprobs: bytes = b"null") -> bytes:
        if self._chat:
            return b'"delta":{"content":' + _encode(text) + b'},"logprobs":' + logprobs
        return b'"text":' + _encode(text) + b',"logprobs":' + logprobs

    def _chunk(self, index: int, content: bytes, reason: bytes, more: bytes = b"") -> bytes:
        return b'%b,"choices":[{"index":%d,%b,"finish_reason":%b}]%b%b}\n\n' % (
            self._chunk_head,
            index,
            content,
            reason,
            self._usage_in_chunks,
            more,
        )


def baton(end: TextEnd) -> dict[str, Any]:
    """The trace as JSON, field for field `Trace` in inference.proto.

    A request that a stop string ended has been cancelled before its worker told: then only its id is known.
    """
    if end.trace is None:
        return {"request_id": end.request_id}
    return {
        "request_id": end.request_id,
        "decode_worker": end.decode_worker,
        "decision": end.decision,
        **msgspec.structs.asdict(end.trace),
    }


def usage(ends: Sequence[TextEnd]) -> dict[str, Any]:
    prompt = sum(end.prompt_tokens for end in ends)
    completion = sum(end.completion_tokens for end in ends)
    cached = sum(end.trace.cached_tokens for end in ends if end.trace is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_body(refused: Refused) -> bytes:
    """OpenAI's shape of an error."""
    kind, code = _ERROR_TYPES[refused.kind]
    if isinstance(refused, ContextLengthExceeded):
        code = "context_length_exceeded"
    return error_json(refused.message, kind, refused.param or None, code)


def error_json(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
