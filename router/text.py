"""Text in and out of the model: tokenizer, chat template, end-of-sequence ids and sampling defaults of one model.

Owned by the router process, used by `router.generation`. Reads a model directory in the layout of Hugging Face with
the `tokenizers` library alone: never torch, nor transformers, which would pull it. What a prompt tokenizes to is what
transformers' fast tokenizer gives for the same files. Detokenizing is in `router.detokenizer`, stop strings in
`router.stop`; both are re-exported here.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from router.chat import ChatTemplate, ChatTemplateError
from router.detokenizer import IncrementalDetokenizer, detokenizers, is_byte_level, token_bytes
from router.stop import StopMatcher

__all__ = [
    "ChatTemplateError",
    "IncrementalDetokenizer",
    "SamplingDefaults",
    "StopMatcher",
    "TextCodec",
]

log = logging.getLogger(__name__)

# Longer texts are tokenized in a thread: about a millisecond of the event loop for each 4000 characters.
_INLINE_CHARS = 8192
_CONTEXT_IDS = 8  # of the prompt's end that the detokenizer is shown
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What generation_config.json may ask for and no engine here applies, with the neutral values.
_NOT_APPLIED = {
    "no_repeat_ngram_size": (0, None),
    "typical_p": (1, None),
}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request that says nothing gets: the model's generation_config.json, then these values."""

    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class TextCodec:
    """Everything about one model that concerns text. Shared by all requests; create one with `TextCodec.load`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_ids: tuple[int, ...] = (),
        defaults: SamplingDefaults = SamplingDefaults(),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        tokenizer.no_truncation()  # a tokenizer.json may ask for either; a prompt is never cut or padded
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._make_detokenizer: Callable[[Iterable[int]], IncrementalDetokenizer] = detokenizers(tokenizer)
        self._token_bytes = token_bytes(tokenizer)
        self._chars_per_token = _longest_token(tokenizer)
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.defaults = defaults

    @classmethod
    def load(cls, model_path: str | Path) -> TextCodec:
        """Reads tokenizer.json, tokenizer_config.json, config.json, generation_config.json and chat_template.jinja.

        Raises FileNotFoundError without tokenizer.json, ValueError when a file cannot be understood.
        """
        path = Path(model_path)
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{path / 'tokenizer.json'} is missing: a fast tokenizer is needed")
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        settings = {
            **_read_json(path / "special_tokens_map.json"),
            **_read_json(path / "tokenizer_config.json"),
        }
        config, generation = _read_json(path / "config.json"), _read_json(path / "generation_config.json")
        special_tokens = _special_tokens(settings)
        template = _chat_template_source(path, settings)
        return cls(
            tokenizer,
            vocab_size=_model_field(config, "vocab_size") or tokenizer.get_vocab_size(with_added_tokens=True),
            eos_ids=_eos_ids(generation, config, tokenizer, special_tokens),
            defaults=_sampling_defaults(generation),
            chat_template=None if template is None else ChatTemplate(template, special_tokens),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. `add_special_tokens`: those of the post-processor, usually one at the beginning.

        As in transformers, `add_bos_token` in tokenizer_config.json changes nothing where there is a tokenizer.json.
        Raises UnicodeEncodeError for text with lone surrogates.
        """
        try:
            # encode_batch_fast keeps no offsets and lets go of the interpreter lock; `encode` does neither.
            encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:  # what the library says of a text that it cannot read as UTF-8
            text.encode()
            raise
        return list(encoded[0].ids)

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`encode`, in a thread where it would hold up the event loop."""
        if len(text) <= _INLINE_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all ids together, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special ones as they are written; empty for an id without a token.

        Where tokens are runs of bytes these are the very bytes, perhaps a part of a character.
        """
        if self._token_bytes is None:
            return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()
        found = self._token_bytes[token_id]
        return found or (self._tokenizer.id_to_token(token_id) or "").encode()

    def longest_text(self, tokens: int) -> int | None:
        """How many characters `tokens` tokens can stand for at most; None when the tokenizer sets no such bound.

        Lets a hopeless prompt be refused before any time goes into tokenizing it.
        """
        return None if self._chars_per_token is None else tokens * self._chars_per_token

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a conversation; it has its special tokens already (`encode` must not add them again).

        Raises ChatTemplateError when the model has no template or the template refuses the messages.
        """
        if self._chat_template is None:
            raise ChatTemplateError("this model has no chat template; send a plain prompt instead")
        return self._chat_template.render(messages)

    def detokenizer(self, prompt: Sequence[int] = ()) -> IncrementalDetokenizer:
        """A fresh detokenizer for the answer to `prompt`."""
        return self._make_detokenizer(prompt[-_CONTEXT_IDS:])


def _longest_token(tokenizer: Tokenizer) -> int | None:
    """In characters; None when one token may stand for any amount of text (unknown token, normalizer, white space)."""
    swallows = any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    if tokenizer.normalizer is not None or swallows or not is_byte_level(tokenizer):
        return None
    return max(map(len, tokenizer.get_vocab()), default=1)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def _model_field(config: Mapping[str, Any], name: str) -> Any:
    """A field of config.json; multi-modal models keep those of the language model one level down."""
    text_config = config.get("text_config")
    nested = text_config.get(name) if isinstance(text_config, dict) else None
    value = config.get(name)
    return nested if value is None else value


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name to text, as templates see them, e.g. {"bos_token": "<s>"}."""
    extra = settings.get("model_specific_special_tokens") or settings.get("extra_special_tokens")
    found = {name: settings.get(name) for name in _NAMED_TOKENS}
    if isinstance(extra, dict):
        found.update(extra)
    texts = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template_source(path: Path, settings: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _eos_ids(
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    special_tokens: Mapping[str, str],
) -> tuple[int, ...]:
    """The first source that names any, as transformers' `generate` does; then the tokenizer's own."""
    for found in (generation.get("eos_token_id"), _model_field(config, "eos_token_id")):
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list) and found:
            return tuple(found)
    token = special_tokens.get("eos_token")
    token_id = None if token is None else tokenizer.token_to_id(token)
    return () if token_id is None else (token_id,)


def _sampling_defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    ignored = [name for name, neutral in _NOT_APPLIED.items() if generation.get(name) not in neutral]
    if ignored:
        log.warning("generation_config.json: %s not supported and not applied", ", ".join(ignored))
    plain = SamplingDefaults()

    def given(name: str) -> float:
        value = generation.get(name)
        return float(getattr(plain, name) if value is None else value)

    return SamplingDefaults(
        temperature=given("temperature"),
        top_k=max(0, int(given("top_k"))),
        top_p=given("top_p"),
        min_p=given("min_p"),
        repetition_penalty=given("repetition_penalty"),
    )
