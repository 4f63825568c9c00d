"""Token ids to text while they arrive: one `IncrementalDetokenizer` per request, fed by `router.generation`.

Each id stands for a run of bytes (`TokenBytes`), and an incremental UTF-8 decoder turns the bytes into characters:
well under a microsecond a token however long the answer is. Two kinds of decoders can be written that way, byte-level
BPE (GPT-2, Llama 3, Qwen) and SentencePiece with byte fall-back (Llama 2, Mistral, Gemma); for any other kind
(`WindowDetokenizer`) the library decodes a short window of recent ids again and again. Never torch, no I/O.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD_IDS = 8  # of a broken character; UTF-8 needs at most 4 bytes, so this is never a whole one
_WINDOW_IDS = 8  # ids before the new ones that the library is shown for context


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    # SentencePiece's byte fall-back writes one U+FFFD for each byte that is not part of a character.
    assert isinstance(error, UnicodeDecodeError)
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("baton.replace_each_byte", _replace_each_byte)


class IncrementalDetokenizer(Protocol):
    """Turns ids into text. The pieces returned, joined, are the text of the whole answer."""

    def push(self, token_id: int) -> str:
        """The text that became final with this id; may be empty."""

    def flush(self) -> str:
        """The answer is over: what was waiting for the rest of a character."""


class TokenBytes(dict[int, bytes]):
    """The bytes that each id stands for, filled as ids are met. Shared by all requests.

    Special tokens and ids without a token (models pad their vocabulary) stand for nothing.
    """

    def __init__(self, tokenizer: Tokenizer, spell: Callable[[str], bytes]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._spell = spell
        added = tokenizer.get_added_tokens_decoder()
        self.update((token_id, b"") for token_id, token in added.items() if token.special)

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        spelled = self[token_id] = b"" if token is None else self._spell(token)
        return spelled


class ByteDetokenizer:
    """For tokenizers whose tokens are runs of bytes. Broken characters become U+FFFD as the tokenizer would write them.

    One difference from decoding all ids at once: SentencePiece's byte fall-back replaces *every* byte of a run of byte
    tokens when any byte of it is wrong, also the whole characters before it. Those were streamed already.
    """

    __slots__ = ("_bytes", "_decode", "_strip")

    def __init__(
        self, token_bytes: TokenBytes, *, errors: str, strip_first_space: bool, context: Iterable[int]
    ) -> None:
        self._bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")(errors).decode
        self._strip = strip_first_space
        for token_id in context:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        text = self._decode(self._bytes[token_id])
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For every other decoder: decodes the last ids with and without the new ones and takes the difference.

    The window is bounded, so that the cost of a token does not grow with the answer. A decoder that changes earlier
    text in the light of later ids, beyond the window, would be followed only inside it.
    """

    __slots__ = ("_decode", "_emitted", "_ids")

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Iterable[int]) -> None:
        self._decode = decode
        self._ids: list[int] = list(context)[-_WINDOW_IDS:]
        self._emitted = len(self._ids)  # so many of `_ids` are in the text already

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._advance(final=len(self._ids) - self._emitted > _MAX_HELD_IDS)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        whole = self._decode(self._ids)
        if whole.endswith(_REPLACEMENT) and not final:
            return ""
        before = self._decode(self._ids[: self._emitted])
        if not final and not whole.startswith(before):
            return ""  # the decoder joins this id with earlier ones; wait for more
        self._ids = self._ids[-_WINDOW_IDS:]
        self._emitted = len(self._ids)
        return whole[len(before) :]


def token_bytes(tokenizer: Tokenizer) -> TokenBytes | None:
    """The bytes of each token, where the tokenizer's decoder is of a kind that joins bytes; None for other kinds."""
    if is_byte_level(tokenizer):
        return TokenBytes(tokenizer, _spell_byte_level)
    steps = _decoder_steps(tokenizer)
    kinds = [step["type"] for step in steps]
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        old, new = steps[0]["pattern"].get("String"), steps[0]["content"]
        one_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if old is not None and steps[3:] in ([], [one_space]):
            return TokenBytes(tokenizer, lambda token: _spell_byte_fallback(token.replace(old, new)))
    return None


def detokenizers(tokenizer: Tokenizer) -> Callable[[Iterable[int]], IncrementalDetokenizer]:
    """A factory for this tokenizer: `make(context)`, where `context` are the last ids of the prompt.

    Context matters where a tokenizer drops the space before the first word of a text: an answer continues a text.
    """
    pieces = token_bytes(tokenizer)
    if pieces is None:
        return lambda context: WindowDetokenizer(
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), context
        )
    strip = len(_decoder_steps(tokenizer)) == 4
    errors = "replace" if is_byte_level(tokenizer) else "baton.replace_each_byte"
    return lambda context: ByteDetokenizer(pieces, errors=errors, strip_first_space=strip, context=context)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """True when every text has tokens of its own, byte by byte if need be."""
    return [step["type"] for step in _decoder_steps(tokenizer)] == ["ByteLevel"]


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    described = json.loads(tokenizer.decoder.__getstate__())
    return described["decoders"] if described["type"] == "Sequence" else [described]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's map of bytes to printable characters, backwards (`bytes_to_unicode` in openai/gpt-2, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    mapped = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    mapped.update((chr(256 + index), byte) for index, byte in enumerate(others))
    return mapped


_BYTE_OF_CHAR = _byte_of_char()


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


def _spell_byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.encode()
