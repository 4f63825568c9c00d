"""The text of one answer while it grows, and what the doors are told of it; used by `router.generation`."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.api import Logprobs, SamplingParams, Trace
from router.dispatch_api import ChoiceEnded, Ended, NewTokens, RefusalKind, Refused
from router.text import IncrementalDetokenizer, StopMatcher


@dataclass(slots=True)
class TextPrompt:
    """The prompt, once and first, when it was asked for. `text` empty without `echo`; `logprobs` are of all ids but
    the first."""

    ids: list[int]
    text: str
    logprobs: Logprobs | None = None


@dataclass(slots=True)
class TextDelta:
    """Some more of an answer. Text waits for whole characters and possible stop strings; ids do not."""

    first_index: int
    ids: list[int]
    text: str
    choice: int = 0
    logprobs: Logprobs | None = None  # of each of `ids`


@dataclass(slots=True)
class ChoiceEnd:
    """An answer has ended. `text`: held back until that was known."""

    choice: int
    reason: str  # "stop" | "length"
    text: str
    completion_tokens: int


@dataclass(slots=True)
class TextEnd:
    """The one terminal event. `trace` is None when a stop string cancelled the request before its worker told."""

    prompt_tokens: int
    request_id: str
    choices: list[ChoiceEnd] = field(default_factory=list)  # in the order in which they ended
    trace: Trace | None = None
    decode_worker: str = ""
    decision: str = ""

    @property
    def completion_tokens(self) -> int:
        """Of all choices."""
        return sum(choice.completion_tokens for choice in self.choices)

    @property
    def reason(self) -> str:
        """Of the choice that ended last, which is told with this event and not before."""
        return self.choices[-1].reason

    @property
    def text(self) -> str:
        return self.choices[-1].text


TextEvent = TextPrompt | TextDelta | ChoiceEnd | TextEnd


class Answer:
    """The text of one choice while it grows."""

    __slots__ = (
        "_choice",
        "_detokenizer",
        "_min_tokens",
        "_stop_ids",
        "_stops",
        "ended",
        "stopped",
        "tokens",
    )

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        stops: StopMatcher | None,
        sampling: SamplingParams,
        choice: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self._choice = choice
        self.stopped = False  # by a stop string
        self.ended = False
        self.tokens = 0

    def take(self, event: NewTokens | ChoiceEnded | Ended) -> list[TextDelta | ChoiceEnd]:
        """What an event of this choice comes to; nothing once a stop string has ended it, before the worker does."""
        if self.ended:
            return []
        if not isinstance(event, NewTokens):
            return [self.end(event.reason)]
        delta = self.add(event)
        return [delta, self.end("stop")] if self.stopped else [delta]

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
            if stops is None or self.tokens + count <= self._min_tokens:
                text += piece  # a stop string may not even begin before `min_tokens`
            elif piece:
                text += stops.push(piece)
                if stops.stopped:
                    self.stopped = True
                    ids = ids[:count]
                    break
        self.tokens += len(ids)
        logprobs = new.logprobs
        if logprobs is not None and len(ids) < len(new.ids):
            logprobs = logprobs.part(0, len(ids))
        return TextDelta(new.first_index, ids, text, self._choice, logprobs)

    def end(self, reason: str) -> ChoiceEnd:
        """The choice is over: `reason` is the worker's; a stop string may have been before it."""
        self.ended = True
        text = "" if self.stopped else self.flush()
        return ChoiceEnd(self._choice, "stop" if self.stopped else reason, text, self.tokens)

    def flush(self) -> str:
        """The text that was waiting for more. A stop string may still be completed by it."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            return rest
        text = self._stops.push(rest)
        self.stopped = self._stops.stopped
        return text + self._stops.flush()
