"""Text in, text out: what both front doors call. Owns the checking of a request and the making of its answer.

A `GenerateCall` is validated, tokenized and given to the dispatcher; token ids that come back become text, stop strings
end the answer. Limits and messages are here, so that gRPC and HTTP refuse the same things in the same words. It never
speaks a protocol and holds no state about requests but the generators themselves: closing one cancels its request.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from engine.api import SamplingParams, Trace
from router.dispatch_api import Dispatcher, NewTokens, Prompt, RefusalKind, Refused
from router.text import ChatTemplateError, IncrementalDetokenizer, StopMatcher, TextCodec

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_REQUEST_ID_CHARS = 128
MAX_SEED = 2**64 - 1


class ContextLengthExceeded(Refused):
    """The prompt, alone or with the answer asked for, does not fit the model."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(RefusalKind.INVALID, message, param=param)


@dataclass(slots=True, kw_only=True)
class GenerateCall:
    """One request as a door understood it. Exactly one of `text`, `token_ids`, `messages`; None means absent."""

    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None  # chat: {"role": ..., "content": text, ...}
    model: str = ""  # empty: the one that is served
    request_id: str = ""  # empty: drawn
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    default_max_tokens: int | None = None  # where `max_tokens` is absent; None: up to the model's context
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    salt: str = ""  # requests with different salts share no cached prefix


@dataclass(slots=True)
class TextDelta:
    """Some more of the answer. Text waits for whole characters and possible stop strings; ids do not."""

    first_index: int
    ids: list[int]
    text: str


@dataclass(slots=True)
class TextEnd:
    """The one terminal event. `trace` is None when a stop string cancelled the request before its worker told."""

    reason: str  # "stop" | "length"
    text: str  # held back until the end was known
    prompt_tokens: int
    completion_tokens: int
    request_id: str
    trace: Trace | None = None
    decode_worker: str = ""
    decision: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    max_model_len: int
    vocab_size: int


class Generation:
    """The service behind both doors; one per router process."""

    def __init__(
        self,
        codec: TextCodec,
        dispatcher: Dispatcher,
        *,
        served_name: str,
        max_model_len: int,
        draw_seed: Callable[[], int] = lambda: random.getrandbits(63),
    ) -> None:
        self._codec = codec
        self._dispatcher = dispatcher
        self._draw_seed = draw_seed
        self.model = ModelInfo(served_name, max_model_len, codec.vocab_size)

    @property
    def ready(self) -> bool:
        return self._dispatcher.ready

    async def generate(self, call: GenerateCall) -> AsyncGenerator[TextDelta | TextEnd, None]:
        """Yields TextDelta as tokens come and one TextEnd last; raises Refused, before or in the middle.

        Closing the generator early cancels the request.
        """
        prompt = await self.prepare(call)
        answer = _Answer(
            self._codec.detokenizer(prompt.tokens),
            StopMatcher(call.stop) if call.stop else None,
            frozenset(prompt.sampling.stop_token_ids),
        )
        end = TextEnd("stop", "", len(prompt.tokens), 0, prompt.request_id)
        async with aclosing(self._dispatcher.generate(prompt)) as events:
            async for event in events:
                if isinstance(event, NewTokens):
                    yield answer.add(event)
                    if answer.stopped:
                        break
                else:
                    end.text = answer.flush()
                    end.reason = "stop" if answer.stopped else event.reason
                    end.trace, end.decode_worker, end.decision = (
                        event.trace,
                        event.decode_worker,
                        event.decision,
                    )
                    break
            else:
                raise Refused(RefusalKind.INTERNAL, "the token stream broke off without an end")
        # The dispatcher's generator is closed by now: after a stop string, the cancel is on its way.
        end.completion_tokens = answer.tokens
        yield end

    async def prepare(self, call: GenerateCall) -> Prompt:
        """Validates and tokenizes. Raises Refused (INVALID or NOT_FOUND) naming the field."""
        if call.model not in ("", self.model.name):
            raise Refused(
                RefusalKind.NOT_FOUND,
                f"the model {call.model!r} does not exist; this server serves {self.model.name!r}",
                param="model",
            )
        request_id = call.request_id or uuid.uuid4().hex
        _check_request_id(request_id)
        _check_sampling(call, self.model.vocab_size)
        tokens = await self._tokens(call)
        max_tokens = self._max_tokens(call, len(tokens), _prompt_param(call))
        defaults = self._codec.defaults
        stop_ids = [*call.stop_token_ids, *(() if call.ignore_eos else self._codec.eos_ids)]
        return Prompt(
            request_id=request_id,
            tokens=tokens,
            sampling=SamplingParams(
                temperature=defaults.temperature if call.temperature is None else call.temperature,
                top_k=max(0, defaults.top_k if call.top_k is None else call.top_k),
                top_p=defaults.top_p if call.top_p is None else call.top_p,
                seed=self._draw_seed() if call.seed is None else call.seed,
                max_tokens=max_tokens,
                stop_token_ids=tuple(dict.fromkeys(stop_ids)),
            ),
            salt=call.salt,
        )

    async def _tokens(self, call: GenerateCall) -> list[int]:
        given = [prompt is not None for prompt in (call.text, call.token_ids, call.messages)]
        param = _prompt_param(call)
        if sum(given) != 1:
            raise _invalid("exactly one prompt is needed: text, token ids or messages", param)
        if call.token_ids is not None:
            tokens = list(call.token_ids)
        else:
            text = call.text if call.text is not None else self._render(call.messages or ())
            limit = self._codec.longest_text(self.model.max_model_len)
            if limit is not None and len(text) > limit:
                raise ContextLengthExceeded(
                    f"this model's maximum context length is {self.model.max_model_len} tokens, at most {limit} "
                    f"characters; the prompt has {len(text)} characters",
                    param=param,
                )
            try:
                tokens = await self._codec.encode_async(text, add_special_tokens=call.messages is None)
            except UnicodeEncodeError:
                raise _invalid("the prompt is not valid Unicode text", param) from None
        if not tokens:
            raise _invalid("the prompt is empty", param)
        _check_vocabulary(tokens, self.model.vocab_size, param)
        return tokens

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if not messages:
            raise _invalid("at least one message is needed", "messages")
        try:
            return self._codec.render_chat(messages)
        except ChatTemplateError as error:
            raise _invalid(str(error), "messages") from error

    def _max_tokens(self, call: GenerateCall, prompt_tokens: int, param: str) -> int:
        limit = self.model.max_model_len
        room = limit - prompt_tokens
        if room < 1:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {limit} tokens and one is needed for the answer; "
                f"the prompt has {prompt_tokens} tokens",
                param=param,
            )
        if call.max_tokens is None:
            return room if call.default_max_tokens is None else min(room, call.default_max_tokens)
        if call.max_tokens > room:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {limit} tokens; the prompt has {prompt_tokens} tokens and "
                f"max_tokens asks for {call.max_tokens} more, at most {room} fit",
                param="max_tokens",
            )
        return call.max_tokens


class _Answer:
    """The text of one answer while it grows."""

    __slots__ = ("_detokenizer", "_stop_ids", "_stops", "stopped", "tokens")

    def __init__(
        self, detokenizer: IncrementalDetokenizer, stops: StopMatcher | None, stop_ids: frozenset[int]
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_ids = stop_ids
        self.stopped = False  # by a stop string
        self.tokens = 0

    def add(self, new: NewTokens) -> TextDelta:
        """Text of the new ids. When a stop string is hit, ids after the one that completed it are dropped."""
        if new.first_index != self.tokens:
            raise Refused(RefusalKind.INTERNAL, f"token {self.tokens} was due, token {new.first_index} came")
        ids, stops, stop_ids, push = new.ids, self._stops, self._stop_ids, self._detokenizer.push
        text = ""
        for count, token_id in enumerate(ids, 1):
            if token_id in stop_ids:
                continue  # it ends the answer and is none of its text, like a stop string
            piece = push(token_id)
            if stops is None:
                text += piece
            elif piece:
                text += stops.push(piece)
                if stops.stopped:
                    self.stopped = True
                    ids = ids[:count]
                    break
        self.tokens += len(ids)
        return TextDelta(new.first_index, ids, text)

    def flush(self) -> str:
        """The text that was waiting for more. A stop string may still be completed by it."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            return rest
        text = self._stops.push(rest)
        self.stopped = self._stops.stopped
        return text + self._stops.flush()


def _invalid(message: str, param: str) -> Refused:
    return Refused(RefusalKind.INVALID, message, param=param)


def _prompt_param(call: GenerateCall) -> str:
    return "prompt" if call.messages is None else "messages"


def _check_request_id(request_id: str) -> None:
    # It goes into logs, headers and metadata of other processes.
    if len(request_id) > MAX_REQUEST_ID_CHARS or not (request_id.isascii() and request_id.isprintable()):
        raise _invalid(
            f"request_id must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters", "request_id"
        )


def _check_vocabulary(ids: Sequence[int], vocab_size: int, param: str) -> None:
    lowest, highest = min(ids, default=0), max(ids, default=0)
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        raise _invalid(f"token id {outside} is not in the vocabulary of {vocab_size} ids", param)


def _check_sampling(call: GenerateCall, vocab_size: int) -> None:
    # Written as "not (low <= x <= high)" so that a NaN is refused too.
    if call.temperature is not None and not 0 <= call.temperature <= 2:
        raise _invalid(f"temperature must be between 0 and 2, not {call.temperature}", "temperature")
    if call.top_p is not None and not 0 < call.top_p <= 1:
        raise _invalid(f"top_p must be above 0 and at most 1, not {call.top_p}", "top_p")
    if call.top_k is not None and call.top_k < -1:
        raise _invalid(f"top_k must be at least 1, or 0 or -1 for off, not {call.top_k}", "top_k")
    if call.seed is not None and not 0 <= call.seed <= MAX_SEED:
        raise _invalid(f"seed must be between 0 and {MAX_SEED}, not {call.seed}", "seed")
    if call.max_tokens is not None and call.max_tokens < 1:
        raise _invalid(f"max_tokens must be at least 1, not {call.max_tokens}", "max_tokens")
    if len(call.stop) > MAX_STOP_STRINGS:
        raise _invalid(f"at most {MAX_STOP_STRINGS} stop strings are allowed, not {len(call.stop)}", "stop")
    for stop in call.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise _invalid(
                f"a stop string must have 1 to {MAX_STOP_CHARS} characters, not {len(stop)}", "stop"
            )
    if len(call.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _invalid(f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids are allowed", "stop_token_ids")
    _check_vocabulary(call.stop_token_ids, vocab_size, "stop_token_ids")
