"""What the tests of the doors share: a tiny model directory, and a dispatcher that answers from a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from engine.api import Logprobs, Trace
from router.dispatch_api import ChoiceEnded, Ended, Event, NewTokens, Prompt, PromptScores, Refused
from router.generation import Generation
from router.text import TextCodec

CORPUS = [
    "the quick brown fox jumps over the lazy dog " * 4,
    "été naïve café",
    "你好世界 🙂🙂👩‍👩‍👧",
    "0123456789",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 512  # of the model: padded, the tokenizer has fewer
MAX_MODEL_LEN = 128
MODEL = "echo"


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("日本 go", special=False, normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def write_model(path: Path, tokenizer: Tokenizer, **files: dict[str, Any]) -> Path:
    """A model directory. `files` replaces the content of <name>.json."""
    contents: dict[str, dict[str, Any]] = {
        "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE},
        "config": {"vocab_size": VOCAB_SIZE, "eos_token_id": tokenizer.token_to_id("</s>")},
        **files,
    }
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


class EchoDispatcher:
    """Answers with `script(prompt)`, or the prompt's own tokens, in pieces; obeys max_tokens and stop ids.

    `prompts` and `cancelled` record what it was asked and which requests were closed before their end.
    """

    def __init__(self, script: Callable[[Prompt], list[int]] | None = None, *, piece: int = 1) -> None:
        self.script = script or (lambda prompt: prompt.tokens)
        self.piece = piece
        self.ready = True
        self.prompts: list[Prompt] = []
        self.cancelled: list[str] = []
        self.active = 0
        self.given = 0  # pieces of answers that were taken
        self.refusal: Exception | None = None
        self.refuse_at: int | None = None  # so many tokens come first
        self.hold_at: int | None = None  # so many tokens come, then nothing more
        self.holding = asyncio.Event()
        self.delay_s = 0.0
        self.trace = Trace(
            prefilled="remote", prefill_worker="prefill-0", cached_tokens=3, handoff_bytes=4096
        )

    async def generate(self, prompt: Prompt) -> AsyncGenerator[Event, bool | None]:
        self.prompts.append(prompt)
        if self.refusal is not None and self.refuse_at is None:
            raise self.refusal
        self.active += 1
        ended = False
        try:
            answers = [_answer(self.script(prompt)[choice:], prompt) for choice in range(prompt.n)]
            if prompt.sampling.prompt_logprobs is not None:
                for start in range(1, len(prompt.tokens), 5):
                    part = prompt.tokens[start : start + 5]
                    yield PromptScores(start, made_up(part, prompt.sampling.prompt_logprobs))
            top = prompt.sampling.logprobs
            for start in range(0, max(len(ids) for ids, _ in answers), self.piece):
                await self._obstacles(start)
                self.given += 1
                for choice, (ids, reason) in enumerate(answers):
                    piece = ids[start : start + self.piece]
                    if piece:
                        logprobs = None if top is None else made_up(piece, top)
                        if (yield NewTokens(start, piece, choice, logprobs)):
                            self.cancelled.append(prompt.request_id)
                            ended = True
                            yield Ended("stop", self.trace, "decode-0", "remote: 9 uncached >= 4")
                            return
                    if choice and len(piece) and start + self.piece >= len(ids):
                        yield ChoiceEnded(choice, reason)
            ids, reason = answers[0]
            await self._obstacles(len(ids))
            ended = True
            yield Ended(reason, self.trace, "decode-0", "remote: 9 uncached >= 4")
        except Refused:
            ended = True
            raise
        finally:
            self.active -= 1
            if not ended:
                self.cancelled.append(prompt.request_id)

    async def _obstacles(self, at: int) -> None:
        if self.hold_at is not None and at >= self.hold_at:
            self.holding.set()
            await asyncio.Event().wait()
        if self.refusal is not None and self.refuse_at is not None and at >= self.refuse_at:
            raise self.refusal
        await asyncio.sleep(self.delay_s)


def made_up(ids: list[int], top: int) -> Logprobs:
    """Log-probabilities that tell their token: -id / 1000; the likeliest are the token itself and those after it."""
    others = [(token + other) % VOCAB_SIZE for token in ids for other in range(top)]
    return Logprobs([-token / 1000 for token in ids], others, [-token / 1000 for token in others])


def _answer(script: list[int], prompt: Prompt) -> tuple[list[int], str]:
    ids: list[int] = []
    for token_id in script[: prompt.sampling.max_tokens]:
        ids.append(token_id)
        if token_id in prompt.sampling.stop_token_ids:
            return ids, "stop"
    return ids, "length" if len(ids) == prompt.sampling.max_tokens else "stop"


def make_generation(
    path: Path, dispatcher: EchoDispatcher, *, max_model_len: int = MAX_MODEL_LEN, **files: dict[str, Any]
) -> tuple[Generation, TextCodec]:
    codec = TextCodec.load(write_model(path, byte_level_tokenizer(), **files))
    return Generation(codec, dispatcher, served_name=MODEL, max_model_len=max_model_len), codec


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Waits for something that another task or process brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
