"""What an answer consists of, and how one grows from responses; the words of `baton.client`. Pure.

`Growth` is one choice (one answer) while it comes: what the caller has, and how far the current call has got. After a
break the call starts from the beginning, so what the caller has is compared with what comes again, and skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.v1 import inference_pb2 as api


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a token's probability, and of the likeliest ones at its place, the likeliest first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Delta:
    """Some more of one choice. Text waits for whole characters and possible stop strings; ids do not."""

    first_index: int  # position of the first id within the answer
    token_ids: list[int]
    text: str
    choice: int = 0
    logprobs: list[TokenLogprob] | None = None  # of each of `token_ids`, when asked for


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int  # of all choices
    cached_tokens: int  # of the prompt, found in the prefix cache of the worker that decoded

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer."""

    index: int
    text: str
    token_ids: list[int]
    reason: str  # "stop" | "length"
    logprobs: list[TokenLogprob] | None


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """The prompt as the server saw it. `logprobs`: of all its tokens but the first; `text`: with `echo`."""

    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None


@dataclass(frozen=True, slots=True)
class Completion:
    """All answers to one request. `trace`: where they were computed and how long it took, see inference.proto."""

    choices: list[Choice]
    usage: Usage
    trace: api.Trace
    request_id: str
    seed: int | None  # asks for this very answer again; None for a greedy one
    calls: int  # how many it took; 1 when nothing went wrong
    prompt: EchoedPrompt | None = None  # with `echo` or `prompt_logprobs`

    @property
    def text(self) -> str:
        """Of the first choice, as are the next three."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def reason(self) -> str:
        return self.choices[0].reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.choices[0].logprobs


class Garbled(ValueError):
    """A response that is no continuation of those before it; says how."""


@dataclass(slots=True)
class Growth:
    """One choice while it comes."""

    index: int
    ids: list[int] = field(default_factory=list)  # what the caller has
    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    chars: int = 0
    earlier: str = ""  # the caller's text when this call began
    ids_at: int = 0  # how far this call's answer has come
    chars_at: int = 0

    def restart(self) -> None:
        """A call begins: everything comes again."""
        self.earlier = "".join(self.parts)
        self.ids_at = self.chars_at = 0

    def advance(
        self, first_index: int, ids: list[int], text: str, logprobs: list[TokenLogprob] | None = None
    ) -> Delta | None:
        """What of it is new to the caller, None when nothing. Raises Garbled."""
        if first_index != self.ids_at:
            raise Garbled(f"token {self.ids_at} was due, token {first_index} came")
        have = self.ids[self.ids_at : self.ids_at + len(ids)]
        if have != ids[: len(have)]:
            raise Garbled("the answer that was asked for again differs from what came before the break")
        have_text = self.earlier[self.chars_at : self.chars_at + len(text)]
        if have_text != text[: len(have_text)]:
            raise Garbled("the text that was asked for again differs from what came before the break")
        self.ids_at += len(ids)
        self.chars_at += len(text)
        new_ids, new_text = ids[len(have) :], text[len(have_text) :]
        if not new_ids and not new_text:
            return None
        new_logprobs = None if logprobs is None else logprobs[len(have) :]
        delta = Delta(len(self.ids), new_ids, new_text, self.index, new_logprobs)
        self.ids += new_ids
        self.parts.append(new_text)
        self.chars += len(new_text)
        self.logprobs += new_logprobs or ()
        return delta

    def finish(self, choice: api.Choice, *, with_logprobs: bool) -> Choice:
        """The whole answer; raises Garbled when not all of it has come."""
        if choice.index != self.index or choice.completion_tokens != self.ids_at:
            raise Garbled(
                f"choice {choice.index} ended with {choice.completion_tokens} tokens, {self.ids_at} came"
            )
        if self.ids_at < len(self.ids) or self.chars_at < self.chars:
            raise Garbled("the answer that was asked for again is shorter")
        logprobs = list(self.logprobs) if with_logprobs else None
        return Choice(self.index, "".join(self.parts), list(self.ids), choice.reason, logprobs)


def token_logprobs(ids: Sequence[int], message: api.Logprobs) -> list[TokenLogprob]:
    """One for each id. Raises Garbled."""
    chosen, top_ids, top = message.chosen, message.top_ids, message.top
    width = len(top_ids) // max(1, len(ids))
    if len(chosen) != len(ids) or len(top_ids) != len(top) or width * len(ids) != len(top_ids):
        raise Garbled(f"log-probabilities of {len(chosen)} tokens came with {len(ids)} tokens")
    likeliest = list(zip(top_ids, top, strict=True))
    return [
        TokenLogprob(token_id, logprob, likeliest[width * at : width * (at + 1)])
        for at, (token_id, logprob) in enumerate(zip(ids, chosen, strict=True))
    ]
