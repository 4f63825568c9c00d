"""Text in, text out: what both front doors call. Owns the checking of a request and the making of its answer.

A `GenerateCall` is validated, tokenized and given to the dispatcher; token ids that come back become text, stop strings
end the answer. Limits and messages are here, so that gRPC and HTTP refuse the same things in the same words. It never
speaks a protocol and holds no state about requests but the generators themselves: closing one cancels its request.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from engine.api import Logprobs
from router.account import Account
from router.answer import Answer, ChoiceEnd, TextDelta, TextEnd, TextEvent, TextPrompt
from router.call import (
    ContextLengthExceeded,
    GenerateCall,
    check_request_id,
    check_sampling,
    check_vocabulary,
    invalid,
    prompt_param,
    sampling_params,
)
from router.dispatch_api import Dispatcher, Ended, Event, Prompt, PromptScores, RefusalKind, Refused
from router.text import ChatTemplateError, StopMatcher, TextCodec

__all__ = [
    "ChoiceEnd",
    "ContextLengthExceeded",
    "GenerateCall",
    "Generation",
    "ModelInfo",
    "TextDelta",
    "TextEnd",
    "TextEvent",
    "TextPrompt",
]


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
        on_end: Callable[[Account], None] | None = None,
    ) -> None:
        """`on_end` is told of every request, once, when it is over."""
        self._codec = codec
        self._dispatcher = dispatcher
        self._draw_seed = draw_seed
        self._on_end = on_end
        self.model = ModelInfo(served_name, max_model_len, codec.vocab_size)

    @property
    def ready(self) -> bool:
        return self._dispatcher.ready

    async def generate(self, call: GenerateCall) -> AsyncGenerator[TextEvent, None]:
        """Yields TextPrompt if asked for, TextDelta as tokens come, a ChoiceEnd for each choice but the last, and one
        TextEnd; raises Refused, before or in the middle.

        Closing the generator early cancels the request.
        """
        with Account(call.request_id, self._on_end) as account:
            prompt = replace(await self.prepare(call), account=account)
            account.request_id, account.prompt_tokens = prompt.request_id, len(prompt.tokens)
            choices = [self._answer(call, prompt, choice) for choice in range(prompt.n)]
            told = None if call.echo or call.prompt_logprobs is not None else Logprobs()
            scores = Logprobs()
            end = TextEnd(len(prompt.tokens), prompt.request_id)
            async with aclosing(self._dispatcher.generate(prompt)) as events:
                async for event in events:
                    if isinstance(event, PromptScores):
                        scores.extend(event.logprobs)
                        continue
                    if told is None:
                        told = scores
                        yield self._told_prompt(call, prompt, scores)
                    if isinstance(event, Ended):
                        end.trace, end.decode_worker, end.decision = (
                            event.trace,
                            event.decode_worker,
                            event.decision,
                        )
                    for new in choices[event.choice].take(event):
                        if isinstance(new, ChoiceEnd):
                            end.choices.append(new)
                        if len(end.choices) < prompt.n or isinstance(new, TextDelta):
                            yield new
                    if len(end.choices) == prompt.n:
                        if (
                            end.trace is None
                        ):  # a stop string ended it: the worker's account of it is still to come
                            await self._account_for(end, events)
                        break
                else:
                    raise Refused(RefusalKind.INTERNAL, "the token stream broke off without an end")
            account.generated_tokens = end.completion_tokens
            account.outcome = end.reason
            yield end

    async def _account_for(self, end: TextEnd, events: AsyncGenerator[Event, bool | None]) -> None:
        """Ends the request at the dispatcher; where and how its prompt was prefilled comes with that."""
        with suppress(StopAsyncIteration):
            event = await events.asend(True)
            if isinstance(event, Ended):
                end.trace, end.decode_worker, end.decision = event.trace, event.decode_worker, event.decision

    def _answer(self, call: GenerateCall, prompt: Prompt, choice: int) -> Answer:
        return Answer(
            self._codec.detokenizer(prompt.tokens),
            StopMatcher(call.stop) if call.stop else None,
            prompt.sampling,
            choice,
        )

    def _told_prompt(self, call: GenerateCall, prompt: Prompt, scores: Logprobs) -> TextPrompt:
        if call.prompt_logprobs is not None and len(scores.chosen) != len(prompt.tokens) - 1:
            raise Refused(
                RefusalKind.INTERNAL,
                f"log-probabilities of {len(scores.chosen)} of {len(prompt.tokens) - 1} prompt tokens came",
            )
        text = ""
        if call.echo:
            text = self._codec.decode(prompt.tokens) if call.text is None else call.text
        return TextPrompt(prompt.tokens, text, scores if call.prompt_logprobs is not None else None)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for, special tokens as they are written; for log-probabilities."""
        return self._codec.token_bytes(token_id)

    async def prepare(self, call: GenerateCall) -> Prompt:
        """Validates and tokenizes. Raises Refused (INVALID or NOT_FOUND) naming the field."""
        if call.model not in ("", self.model.name):
            raise Refused(
                RefusalKind.NOT_FOUND,
                f"the model {call.model!r} does not exist; this server serves {self.model.name!r}",
                param="model",
            )
        request_id = call.request_id or uuid.uuid4().hex
        check_request_id(request_id)
        check_sampling(call, self.model.vocab_size)
        tokens = await self._tokens(call)
        max_tokens = self._max_tokens(call, len(tokens), prompt_param(call))
        seed = self._draw_seed() if call.seed is None else call.seed
        return Prompt(
            request_id=request_id,
            tokens=tokens,
            sampling=sampling_params(call, self._codec.defaults, self._codec.eos_ids, seed, max_tokens),
            salt=call.salt,
            priority=call.priority,
            n=call.n or 1,
            ttft_s=None if call.ttft_ms is None else call.ttft_ms / 1e3,
            itl_s=None if call.itl_ms is None else call.itl_ms / 1e3,
            deadline_s=None if call.deadline_ms is None else call.deadline_ms / 1e3,
            tenant=call.user,
        )

    async def _tokens(self, call: GenerateCall) -> list[int]:
        given = [prompt is not None for prompt in (call.text, call.token_ids, call.messages)]
        param = prompt_param(call)
        if sum(given) != 1:
            raise invalid("exactly one prompt is needed: text, token ids or messages", param)
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
                raise invalid("the prompt is not valid Unicode text", param) from None
        if not tokens:
            raise invalid("the prompt is empty", param)
        check_vocabulary(tokens, self.model.vocab_size, param)
        return tokens

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if not messages:
            raise invalid("at least one message is needed", "messages")
        try:
            return self._codec.render_chat(messages)
        except ChatTemplateError as error:
            raise invalid(str(error), "messages") from error

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
