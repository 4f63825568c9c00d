"""The text of one answer while it grows, and what the doors are told of it; used by `router.generation`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.api import SamplingParams, Trace
from router.dispatch_api import NewTokens, RefusalKind, Refused
from router.text import IncrementalDetokenizer, StopMatcher


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


class Answer:
    """The text of one answer while it grows."""

    __slots__ = ("_detokenizer", "_min_tokens", "_stop_ids", "_stops", "stopped", "tokens")

    def __init__(
        self, detokenizer: IncrementalDetokenizer, stops: StopMatcher | None, sampling: SamplingParams
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
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
            if stops is None or self.tokens + count <= self._min_tokens:
                text += piece  # a stop string may not even begin before `min_tokens`
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
