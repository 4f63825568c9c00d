"""One request over as many calls as it takes: what to send, what each response adds, when to ask again. Pure.

    ask -> tokens ... tokens -> finished
     ^        `-> the call broke: pause, ask the same again, skip what the caller has (and check that it agrees)
     `-- no room, nothing there: pause

Asking again is safe because a request is answered alike each time: its id stays, and the seed is drawn here. `Stream`
and `AsyncStream` in `baton.client` are the shells: they make the calls, sleep the pauses, and know nothing of this.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from baton.completion import Choice, Completion, Delta, EchoedPrompt, Garbled, Growth, Usage, token_logprobs
from baton.errors import BatonError, BrokenAnswer, DeadlineExceeded, InvalidRequest, NoRoom, Unavailable
from baton.v1 import inference_pb2 as api


class Sampling(TypedDict, total=False):
    """How to answer: `SamplingParams` of inference.proto, and two fields of the request beside it.

    Absent or None: the model's own, then the default of the field.
    """

    temperature: float | None  # 0 = greedy
    top_k: int | None  # 0 = off
    top_p: float | None
    min_p: float | None
    seed: int | None  # drawn by the client when absent
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None  # of each token, with so many of the likeliest
    prompt_logprobs: int | None
    n: int | None  # answers to the same prompt
    echo: bool | None  # tell the prompt too: `Completion.prompt`
    priority: int | None  # less is more urgent
    cache_salt: str | None  # requests with different salts share no cached KV
    ttft_ms: int | None  # targets: the first token within so long
    itl_ms: int | None  # and each further one
    deadline_ms: int | None  # refused when the first token cannot come by then
    user: str | None  # tenant


# In the request, not among the sampling parameters.
_BESIDE = ("priority", "cache_salt", "ttft_ms", "itl_ms", "deadline_ms", "user")


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
    prompt: str | Sequence[int], request_id: str, model: str, asked: Sampling, draw_seed: Callable[[], int]
) -> api.GenerateRequest:
    """The message; raises TypeError for an unknown field and InvalidRequest for a value that no message can hold."""
    given = {name: value for name, value in asked.items() if value is not None}
    beside = {name: given.pop(name) for name in _BESIDE if name in given}
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
        request = api.GenerateRequest(request_id=request_id, model=model, sampling=params, **beside)  # type: ignore[arg-type]
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
        self._choices = [Growth(index) for index in range(max(1, request.sampling.n))]
        self._prompt: api.Prompt | None = None
        self._with_logprobs = request.sampling.HasField("logprobs")

    def begin_call(self, now: float) -> float:
        """A call is made now; returns its time-out. Raises DeadlineExceeded."""
        remaining_s = self._deadline - now
        if remaining_s <= 0:
            raise DeadlineExceeded("the time for the answer is over", request_id=self.request.request_id)
        self._calls += 1
        self._prompt = None
        for choice in self._choices:
            choice.restart()
        return remaining_s

    def take(self, response: object) -> list[Delta]:
        """What a response adds for the caller, often one delta. Raises BrokenAnswer."""
        if self.completion is not None:
            raise self._broken("the server went on after the end of the answer")
        kind = response.WhichOneof("event") if isinstance(response, api.GenerateResponse) else None
        if kind is None:
            raise self._broken("the server sent what is not a response of baton.v1.Inference")
        assert isinstance(response, api.GenerateResponse)
        try:
            if kind == "tokens":
                return self._take_tokens(response.tokens)
            if kind == "finished":
                return self._finish(response.finished)
            self._take_prompt(response.prompt)
        except Garbled as error:
            raise self._broken(str(error)) from None
        return []

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

    def _take_tokens(self, tokens: api.Tokens) -> list[Delta]:
        if tokens.choice >= len(self._choices):
            raise Garbled(f"tokens of choice {tokens.choice} came, {len(self._choices)} were asked for")
        ids = list(tokens.ids)
        logprobs = token_logprobs(ids, tokens.logprobs) if self._with_logprobs else None
        delta = self._choices[tokens.choice].advance(tokens.first_index, ids, tokens.text, logprobs)
        return [] if delta is None else [delta]

    def _take_prompt(self, piece: api.Prompt) -> None:
        if self._prompt is None:
            self._prompt = api.Prompt()
        if piece.first_index != len(self._prompt.ids):
            raise Garbled(f"prompt token {len(self._prompt.ids)} was due, {piece.first_index} came")
        self._prompt.MergeFrom(piece)  # appends ids and log-probabilities; only the first piece has text

    def _finish(self, finished: api.Finished) -> list[Delta]:
        # A server that knows of no choices tells of the only one.
        ends = list(finished.choices) or [
            api.Choice(
                reason=finished.reason, text=finished.text, completion_tokens=finished.completion_tokens
            )
        ]
        if len(ends) != len(self._choices):
            raise Garbled(f"{len(ends)} choices ended, {len(self._choices)} were asked for")
        deltas: list[Delta] = []
        choices: list[Choice] = []
        for growth, end in zip(self._choices, ends, strict=True):
            delta = growth.advance(growth.ids_at, [], end.text)
            choices.append(growth.finish(end, with_logprobs=self._with_logprobs))
            if delta is not None:
                deltas.append(delta)
        self.completion = self._complete(finished, choices)
        return deltas

    def _complete(self, finished: api.Finished, choices: list[Choice]) -> Completion:
        params = self.request.sampling
        return Completion(
            choices=choices,
            usage=Usage(finished.prompt_tokens, finished.completion_tokens, finished.trace.cached_tokens),
            trace=finished.trace,
            request_id=finished.request_id or self.request.request_id,
            seed=params.seed if params.HasField("seed") else None,
            calls=self._calls,
            prompt=self._told_prompt(),
        )

    def _told_prompt(self) -> EchoedPrompt | None:
        prompt = self._prompt
        if prompt is None:
            return None
        wanted = self.request.sampling.HasField("prompt_logprobs")
        logprobs = token_logprobs(prompt.ids[1:], prompt.logprobs) if wanted else None
        return EchoedPrompt(list(prompt.ids), prompt.text, logprobs)

    def _broken(self, message: str) -> BrokenAnswer:
        return BrokenAnswer(message, request_id=self.request.request_id)
