"""Log-probabilities as OpenAI's two APIs tell them; used by `router.http_answers`. Names tokens by their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.api import Logprobs

TokenBytes = Callable[[int], bytes]


class ChoiceLogprobs:
    """Those of one choice as it grows: offsets in /v1/completions count from the beginning of its text."""

    def __init__(self, token_bytes: TokenBytes, *, chat: bool) -> None:
        self._bytes = token_bytes
        self._chat = chat
        self._offset = 0

    def tell(self, ids: Sequence[int], logprobs: Logprobs) -> dict[str, Any]:
        """The `logprobs` object for some more tokens. Those of a prompt lack one for its first token: null."""
        missing = len(ids) - len(logprobs.chosen)
        if self._chat:
            return {"content": [self._entry(at, ids, logprobs) for at in range(len(ids))], "refusal": None}
        told: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for at, token in enumerate(ids, -missing):
            text = self._text(token)
            told["tokens"].append(text)
            told["text_offset"].append(self._offset)
            told["token_logprobs"].append(logprobs.chosen[at] if at >= 0 else None)
            likely = {self._text(other): value for other, value in _likeliest(logprobs, at)}
            told["top_logprobs"].append({**likely, text: logprobs.chosen[at]} if at >= 0 else None)
            self._offset += len(text)
        return told

    def _entry(self, at: int, ids: Sequence[int], logprobs: Logprobs) -> dict[str, Any]:
        return {
            **self._named(ids[at], logprobs.chosen[at]),
            "top_logprobs": [self._named(*each) for each in _likeliest(logprobs, at)],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._bytes(token)
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}

    def _text(self, token: int) -> str:
        """Parts of characters as OpenAI writes them, or they would all be the same."""
        piece = self._bytes(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def prompt_logprobs(token_bytes: TokenBytes, ids: Sequence[int], logprobs: Logprobs) -> list[Any]:
    """vLLM's `prompt_logprobs`: null for the first token, then by id the token itself and the likeliest."""
    told: list[Any] = [None]
    for at, token in enumerate(ids[1:]):
        values = {**dict(_likeliest(logprobs, at)), token: logprobs.chosen[at]}
        told.append(
            {
                str(each): {"logprob": value, "decoded_token": token_bytes(each).decode(errors="replace")}
                for each, value in values.items()
            }
        )
    return told


def _likeliest(logprobs: Logprobs, at: int) -> list[tuple[int, float]]:
    part = logprobs.part(at, at + 1) if at >= 0 else Logprobs()
    return list(zip(part.top_ids, part.top, strict=True))
