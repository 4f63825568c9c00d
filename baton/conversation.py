"""One request over as many calls as it takes: what to send, what each response adds, when to ask again. Pure.

    ask -> tokens ... tokens -> finished
     ^        `-> the call broke: pause, ask the same again, skip what the caller has (and check that it agrees)
     `-- no room, nothing there: pause

Asking again is safe because a request is answered alike each time: its id stays, and the seed is drawn here. `Stream`
and `AsyncStream` in `baton.client` are the shells: they make the calls, sleep the pauses, and know nothing of this.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from baton.errors import BatonError, BrokenAnswer, DeadlineExceeded, InvalidRequest, NoRoom, Unavailable
from baton.v1 import inference_pb2 as api


class Sampling(TypedDict, total=False):
    """How to draw tokens: `SamplingParams` of inference.proto. Absent or None: the model's own, then the default."""

    temperature: float | None  # 0 = greedy
    top_k: int | None  # 0 = off
    top_p: float | None
    seed: int | None  # drawn by the client when absent
    max_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None


@dataclass(frozen=True, slots=True)
class Delta:
    """Some more of an answer. Text waits for whole characters and possible stop strings; ids do not."""

    first_index: int  # position of the first id within the answer
    token_ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache of the worker that decoded

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `trace`: where it was computed and how long each phase took, see inference.proto."""

    text: str
    token_ids: list[int]
    reason: str  # "stop" | "length"
    usage: Usage
    trace: api.Trace
    request_id: str
    seed: int | None  # asks for this very answer again; None for a greedy one
    calls: int  # how many it took; 1 when nothing went wrong


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how soon to ask again. Pauses double from `first_s` to `longest_s`, half of each is chance."""

    calls: int = 4  # at most, the first one included
    first_s: float = 0.1
    longest_s: float = 5.0

    def pause_s(self, made: int, advised_s: float, chance: float) -> float:
        """After `made` calls; `chance` in [0, 1). Never less than the server advised."""
        own = min(self.longest_s, self.first_s * 2.0 ** (made - 1)) * (0.5 + 0.5 * chance)
        return max(own, advised_s * (1 + 0.25 * chance))


def make_request(
    prompt: str | Sequence[int], request_id: str, model: str, sampling: Sampling, draw_seed: Callable[[], int]
) -> api.GenerateRequest:
    """The message; raises TypeError for an unknown field and InvalidRequest for a value that no message can hold."""
    given = {name: value for name, value in sampling.items() if value is not None}
    unknown = given.keys() - api.SamplingParams.DESCRIPTOR.fields_by_name.keys()
    if unknown:
        raise TypeError(f"unknown sampling field {', '.join(sorted(unknown))}")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    request_id = request_id or uuid.uuid4().hex
    try:
        params = api.SamplingParams(**given)  # type: ignore[arg-type]
        # Every request can be asked again: without a temperature of 0 it may be drawn, and then from our seed.
        if not params.HasField("seed") and not (params.HasField("temperature") and params.temperature == 0):
            params.seed = draw_seed()
        request = api.GenerateRequest(request_id=request_id, model=model, sampling=params)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(str(error), request_id=request_id) from None
    return request


class Conversation:
    """The state of one request. `chance` gives numbers in [0, 1) for the jitter."""

    def __init__(
        self, request: api.GenerateRequest, *, deadline: float, retry: Retry, chance: Callable[[], float]
    ) -> None:
        self.request = request
        self.completion: Completion | None = None
        self._deadline = deadline
        self._retry = retry
        self._chance = chance
        self._calls = 0
        self._ids: list[int] = []  # what the caller has
        self._parts: list[str] = []
        self._chars = 0
        self._earlier = ""  # the caller's text when this call began
        self._ids_at = 0  # how far this call's answer has come
        self._chars_at = 0

    def begin_call(self, now: float) -> float:
        """A call is made now; returns its time-out. Raises DeadlineExceeded."""
        remaining_s = self._deadline - now
        if remaining_s <= 0:
            raise DeadlineExceeded("the time for the answer is over", request_id=self.request.request_id)
        self._calls += 1
        self._ids_at = self._chars_at = 0
        self._earlier = "".join(self._parts)
        return remaining_s

    def take(self, response: object) -> Delta | None:
        """What a response adds for the caller, None when nothing. Raises BrokenAnswer."""
        if self.completion is not None:
            raise self._broken("the server went on after the end of the answer")
        kind = response.WhichOneof("event") if isinstance(response, api.GenerateResponse) else None
        if kind is None:
            raise self._broken("the server sent what is not a response of baton.v1.Inference")
        assert isinstance(response, api.GenerateResponse)
        if kind == "tokens":
            tokens = response.tokens
            return self._advance(tokens.first_index, list(tokens.ids), tokens.text)
        finished = response.finished
        if finished.completion_tokens != self._ids_at or self._ids_at < len(self._ids):
            raise self._broken(
                f"the answer ended with {finished.completion_tokens} tokens, {max(self._ids_at, len(self._ids))} came"
            )
        delta = self._advance(self._ids_at, [], finished.text)
        if self._chars_at < self._chars:
            raise self._broken("the answer that was asked for again has less text")
        self.completion = self._complete(finished)
        return delta

    def call_ended(self) -> None:
        """The call ended well. Raises BrokenAnswer when the answer had not."""
        if self.completion is None:
            raise self._broken("the server ended the call without ending the answer")

    def call_failed(self, error: BatonError, now: float) -> float:
        """The pause until the next call; raises `error` when there is to be none."""
        if not isinstance(error, Unavailable | NoRoom) or self._calls >= self._retry.calls:
            raise error from None
        pause_s = self._retry.pause_s(self._calls, error.retry_after_s, self._chance())
        if now + pause_s >= self._deadline:
            raise error from None  # says more than that the time was over after a pause for nothing
        return pause_s

    def _advance(self, first_index: int, ids: list[int], text: str) -> Delta | None:
        if first_index != self._ids_at:
            raise self._broken(f"token {self._ids_at} was due, token {first_index} came")
        fresh_ids, fresh_text = ids, text
        known = min(len(ids), len(self._ids) - self._ids_at)
        if known > 0:
            if self._ids[self._ids_at : self._ids_at + known] != ids[:known]:
                raise self._broken(
                    "the answer that was asked for again differs from what came before the break"
                )
            fresh_ids = ids[known:]
        known = min(len(text), self._chars - self._chars_at)
        if known > 0:
            if self._earlier[self._chars_at : self._chars_at + known] != text[:known]:
                raise self._broken(
                    "the text that was asked for again differs from what came before the break"
                )
            fresh_text = text[known:]
        self._ids_at += len(ids)
        self._chars_at += len(text)
        if not fresh_ids and not fresh_text:
            return None
        delta = Delta(len(self._ids), fresh_ids, fresh_text)
        self._ids += fresh_ids
        self._parts.append(fresh_text)
        self._chars += len(fresh_text)
        return delta

    def _complete(self, finished: api.Finished) -> Completion:
        params = self.request.sampling
        return Completion(
            text="".join(self._parts),
            token_ids=list(self._ids),
            reason=finished.reason,
            usage=Usage(finished.prompt_tokens, finished.completion_tokens, finished.trace.cached_tokens),
            trace=finished.trace,
            request_id=finished.request_id or self.request.request_id,
            seed=params.seed if params.HasField("seed") else None,
            calls=self._calls,
        )

    def _broken(self, message: str) -> BrokenAnswer:
        return BrokenAnswer(message, request_id=self.request.request_id)
