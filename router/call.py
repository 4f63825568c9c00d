"""A request as a door understood it, before tokenization: its fields, their limits, and what they mean to the engine.

The limits and the words of refusals are here and in `router.generation`, so that gRPC and HTTP refuse the same things
in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.api import SamplingParams
from router.dispatch_api import RefusalKind, Refused
from router.text import SamplingDefaults

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_REQUEST_ID_CHARS = 128
MAX_SEED = 2**64 - 1
MAX_BIASED_IDS = 1024
MAX_REPETITION_PENALTY = 10
MAX_LOGPROBS = 20
MAX_CHOICES = 16
MAX_PRIORITY = 1000
MAX_SALT_CHARS = 256
MAX_USER_CHARS = 256
MAX_TARGET_MS = 24 * 3600 * 1000


class ContextLengthExceeded(Refused):
    """The prompt, alone or with the answer asked for, does not fit the model."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(RefusalKind.INVALID, message, param=param)


@dataclass(slots=True, kw_only=True)
class GenerateCall:
    """One request as a door understood it. Exactly one of `text`, `token_ids`, `messages`; None means absent."""

    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None  # chat: {"role": ..., "content": text, ...}
    model: str = ""  # empty: the one that is served
    request_id: str = ""  # empty: drawn
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    default_max_tokens: int | None = None  # where `max_tokens` is absent; None: up to the model's context
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int | None = None
    logprobs: int | None = None  # so many of the likeliest beside each token of the answer
    prompt_logprobs: int | None = None
    n: int | None = None
    echo: bool = False  # tell the prompt first
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    salt: str = ""  # requests with different salts share no cached prefix
    priority: int = 0  # less is more urgent
    ttft_ms: int | None = None  # targets; None: the deployment's
    itl_ms: int | None = None
    deadline_ms: int | None = None  # for the first token: refused when it cannot be kept
    user: str = ""  # tenant


def invalid(message: str, param: str) -> Refused:
    return Refused(RefusalKind.INVALID, message, param=param)


def prompt_param(call: GenerateCall) -> str:
    return "prompt" if call.messages is None else "messages"


def check_request_id(request_id: str) -> None:
    # It goes into logs, headers and metadata of other processes.
    if len(request_id) > MAX_REQUEST_ID_CHARS or not (request_id.isascii() and request_id.isprintable()):
        raise invalid(
            f"request_id must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters", "request_id"
        )


def check_vocabulary(ids: Sequence[int], vocab_size: int, param: str) -> None:
    lowest, highest = min(ids, default=0), max(ids, default=0)
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        raise invalid(f"token id {outside} is not in the vocabulary of {vocab_size} ids", param)


def check_sampling(call: GenerateCall, vocab_size: int) -> None:
    # Written as "not (low <= x <= high)" so that a NaN is refused too.
    if call.temperature is not None and not 0 <= call.temperature <= 2:
        raise invalid(f"temperature must be between 0 and 2, not {call.temperature}", "temperature")
    if call.top_p is not None and not 0 < call.top_p <= 1:
        raise invalid(f"top_p must be above 0 and at most 1, not {call.top_p}", "top_p")
    if call.top_k is not None and call.top_k < -1:
        raise invalid(f"top_k must be at least 1, or 0 or -1 for off, not {call.top_k}", "top_k")
    if call.min_p is not None and not 0 <= call.min_p <= 1:
        raise invalid(f"min_p must be between 0 and 1, not {call.min_p}", "min_p")
    _check_penalties(call, vocab_size)
    if call.seed is not None and not 0 <= call.seed <= MAX_SEED:
        raise invalid(f"seed must be between 0 and {MAX_SEED}, not {call.seed}", "seed")
    if call.max_tokens is not None and call.max_tokens < 1:
        raise invalid(f"max_tokens must be at least 1, not {call.max_tokens}", "max_tokens")
    if call.n is not None and not 1 <= call.n <= MAX_CHOICES:
        raise invalid(f"n must be between 1 and {MAX_CHOICES}, not {call.n}", "n")
    for name in ("logprobs", "prompt_logprobs"):
        top = getattr(call, name)
        if top is not None and not 0 <= top <= MAX_LOGPROBS:
            raise invalid(f"{name} must be between 0 and {MAX_LOGPROBS}, not {top}", name)
    if not -MAX_PRIORITY <= call.priority <= MAX_PRIORITY:
        raise invalid(
            f"priority must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], not {call.priority}", "priority"
        )
    if len(call.salt) > MAX_SALT_CHARS:
        raise invalid(
            f"cache_salt has {len(call.salt)} characters, at most {MAX_SALT_CHARS} are allowed", "cache_salt"
        )
    if len(call.user) > MAX_USER_CHARS:
        raise invalid(f"user has {len(call.user)} characters, at most {MAX_USER_CHARS} are allowed", "user")
    for name in ("ttft_ms", "itl_ms", "deadline_ms"):
        target = getattr(call, name)
        if target is not None and not 1 <= target <= MAX_TARGET_MS:
            raise invalid(f"{name} must be between 1 and {MAX_TARGET_MS}, not {target}", name)
    if call.min_tokens is not None and call.min_tokens < 0:
        raise invalid(f"min_tokens must be at least 0, not {call.min_tokens}", "min_tokens")
    if len(call.stop) > MAX_STOP_STRINGS:
        raise invalid(f"at most {MAX_STOP_STRINGS} stop strings are allowed, not {len(call.stop)}", "stop")
    for stop in call.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise invalid(
                f"a stop string must have 1 to {MAX_STOP_CHARS} characters, not {len(stop)}", "stop"
            )
    if len(call.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise invalid(f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids are allowed", "stop_token_ids")
    check_vocabulary(call.stop_token_ids, vocab_size, "stop_token_ids")


def _check_penalties(call: GenerateCall, vocab_size: int) -> None:
    if call.repetition_penalty is not None and not 0 < call.repetition_penalty <= MAX_REPETITION_PENALTY:
        raise invalid(
            f"repetition_penalty must be above 0 and at most {MAX_REPETITION_PENALTY}, "
            f"not {call.repetition_penalty}",
            "repetition_penalty",
        )
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(call, name)
        if penalty is not None and not -2 <= penalty <= 2:
            raise invalid(f"{name} must be between -2 and 2, not {penalty}", name)
    if len(call.logit_bias) > MAX_BIASED_IDS:
        raise invalid(f"at most {MAX_BIASED_IDS} entries of logit_bias are allowed", "logit_bias")
    check_vocabulary(list(call.logit_bias), vocab_size, "logit_bias")
    for token, bias in call.logit_bias.items():
        if not -100 <= bias <= 100:
            raise invalid(f"logit_bias must be between -100 and 100, not {bias} (id {token})", "logit_bias")


def sampling_params(
    call: GenerateCall, defaults: SamplingDefaults, eos_ids: Sequence[int], seed: int, max_tokens: int
) -> SamplingParams:
    """What the call asks for, with the model's defaults where it says nothing. Raises Refused."""
    min_tokens = call.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid(
            f"min_tokens is {min_tokens}, but at most {max_tokens} tokens will be generated", "min_tokens"
        )
    repetition = call.repetition_penalty
    return SamplingParams(
        temperature=defaults.temperature if call.temperature is None else call.temperature,
        top_k=max(0, defaults.top_k if call.top_k is None else call.top_k),
        top_p=defaults.top_p if call.top_p is None else call.top_p,
        min_p=defaults.min_p if call.min_p is None else call.min_p,
        repetition_penalty=defaults.repetition_penalty if repetition is None else repetition,
        presence_penalty=call.presence_penalty or 0.0,
        frequency_penalty=call.frequency_penalty or 0.0,
        logit_bias=tuple(sorted(call.logit_bias.items())),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        logprobs=call.logprobs,
        prompt_logprobs=call.prompt_logprobs,
        stop_token_ids=tuple(dict.fromkeys([*call.stop_token_ids, *(() if call.ignore_eos else eos_ids)])),
    )
