"""The JSON bodies of the OpenAI API as this server understands them; used by `router.http_door`.

Every field has one of three fates, so that nothing silently does nothing: it is understood (a field of the model);
it cannot change the answer (`_HARMLESS`, ignored); it would change the answer and is not supported (`_UNSUPPORTED`,
refused unless it has its neutral value). A field that nobody knows is refused too, as OpenAI does: it may be a
misspelt one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from router.dispatch_api import RefusalKind, Refused
from router.generation import GenerateCall

MAX_PROMPTS = 64  # of one /v1/completions call
COMPLETION_MAX_TOKENS = 16  # what OpenAI's /v1/completions gives when `max_tokens` is absent
_SEED_MODULUS = 2**64  # OpenAI's seeds are signed

_HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",  # without tools there is nothing to call
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    }
)
# Field -> values that ask for nothing. Absent and null are always neutral. Types count: false is neutral for the chat's
# `logprobs`, while 0 asks /v1/completions for one log-probability a token.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1, 1.0),
    "logprobs": (False,),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

Int = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Body = TypeVar("Body", bound="_Body")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")  # `include_obfuscation` and the like change no answer

    include_usage: Flag | None = None


class _Body(BaseModel):
    """What both kinds of completions have in common."""

    model_config = ConfigDict(extra="allow")
    name: ClassVar[str]

    model: str = ""
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    max_tokens: Int | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    n: Int | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[int, Number] | None = None
    # Extensions, named as vLLM names them.
    top_k: Int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: Int | None = None
    prompt_logprobs: Int | None = None
    priority: Int | None = None
    cache_salt: str | None = None
    ttft_ms: Int | None = None  # no other server has these
    itl_ms: Int | None = None
    deadline_ms: Int | None = None
    user: str | None = None
    ignore_eos: Flag | None = None
    stop_token_ids: list[Int] | None = None
    return_token_ids: Flag | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def refuse_unsupported(self) -> None:
        """Raises Refused naming a field that would change the answer, or that is not known at all."""
        if self.prompt_logprobs is not None and self.stream:
            raise _refused("prompt_logprobs are not told in a stream", "prompt_logprobs")
        for field, value in (self.model_extra or {}).items():
            if field in _HARMLESS or value is None:
                continue
            if field not in _UNSUPPORTED:
                raise _refused(f"unrecognized request argument: {field}", field)
            if not any(type(value) is type(neutral) and value == neutral for neutral in _UNSUPPORTED[field]):
                raise _refused(f"{field} is not supported by this server", field)

    def _call(self, request_id: str) -> GenerateCall:
        return GenerateCall(
            model=self.model,
            request_id=request_id,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed % _SEED_MODULUS,
            max_tokens=self.max_tokens,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or [],
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos=bool(self.ignore_eos),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            min_tokens=self.min_tokens,
            prompt_logprobs=self.prompt_logprobs,
            n=self.n,
            priority=self.priority or 0,
            salt=self.cache_salt or "",
            ttft_ms=self.ttft_ms,
            itl_ms=self.itl_ms,
            deadline_ms=self.deadline_ms,
            user=self.user or "",
        )


class CompletionBody(_Body):
    """POST /v1/completions."""

    name = "completion"

    prompt: str | list[Int] | list[str] | list[list[Int]]
    # How many of the likeliest; false, which asks for nothing, is what the chat API says.
    logprobs: Int | Literal[False] | None = None
    echo: Flag | None = None

    def calls(self, request_id: str) -> list[GenerateCall]:
        """One call for each prompt; several prompts get the request's id with a number."""
        prompts: list[str | list[int]] = []
        if isinstance(self.prompt, str):
            prompts.append(self.prompt)
        elif self.prompt and isinstance(self.prompt[0], int):
            prompts.append([token for token in self.prompt if isinstance(token, int)])
        else:
            prompts.extend(prompt for prompt in self.prompt if not isinstance(prompt, int))
        if not prompts:
            raise _refused("the prompt is empty", "prompt")
        if len(prompts) > MAX_PROMPTS:
            raise _refused(
                f"at most {MAX_PROMPTS} prompts are allowed in one call, not {len(prompts)}", "prompt"
            )
        calls = []
        for index, prompt in enumerate(prompts):
            call = self._call(request_id if len(prompts) == 1 else f"{request_id}-{index}")
            call.default_max_tokens = COMPLETION_MAX_TOKENS
            call.echo = bool(self.echo)
            if self.logprobs is not None and self.logprobs is not False:
                call.logprobs = self.logprobs
                if self.echo and call.prompt_logprobs is None:
                    call.prompt_logprobs = self.logprobs
            if isinstance(prompt, str):
                call.text = prompt
            else:
                call.token_ids = prompt
            calls.append(call)
        return calls


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """A chat message. What else it holds (`name`, `reasoning_content`) is the template's business."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[ContentPart] | None = None

    def plain(self) -> dict[str, Any]:
        """As templates for text models expect it: content is one text, parts on lines of their own."""
        for field in ("tool_calls", "function_call", "audio"):
            if (self.model_extra or {}).get(field):
                raise _refused(f"{field} in messages is not supported by this server", "messages")
        content = self.content
        if isinstance(content, list):
            content = "\n".join(_part_text(part) for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content}


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    name = "chat"

    messages: list[Message]
    max_completion_tokens: Int | None = None
    logprobs: Flag | None = None
    top_logprobs: Int | None = None

    def calls(self, request_id: str) -> list[GenerateCall]:
        call = self._call(request_id)
        call.messages = [message.plain() for message in self.messages]
        if self.max_completion_tokens is not None:  # the newer name of the same limit
            call.max_tokens = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs and self.top_logprobs != 0:
            raise _refused("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.logprobs:
            call.logprobs = self.top_logprobs or 0
        return [call]


def parse(kind: type[Body], raw: bytes) -> Body:
    """Raises Refused (INVALID), naming the field, for anything but a body that can be answered."""
    try:
        body = kind.model_validate_json(raw)
    except pydantic.ValidationError as error:
        raise _explained(error.errors(include_url=False, include_input=False)[0]) from None
    body.refuse_unsupported()
    return body


def _explained(first: Mapping[str, Any]) -> Refused:
    if first["type"] == "json_invalid":
        return _refused(f"the body is not valid JSON: {first['ctx']['error']}", "")
    # Locations of unions name the member that was tried last; only the field itself means something to a client.
    field = str(first["loc"][0]) if first["loc"] else ""
    if field == "prompt":
        return _refused("prompt must be a string, a list of token ids, or a list of one of these", field)
    if not field:
        return _refused("the body must be a JSON object", "")
    return _refused(f"{field}: {first['msg']}", field)


def _part_text(part: ContentPart) -> str:
    if part.type != "text" or part.text is None:
        raise _refused(f"content parts of type {part.type!r} are not supported, only text", "messages")
    return part.text


def _refused(message: str, param: str) -> Refused:
    return Refused(RefusalKind.INVALID, message, param=param)
