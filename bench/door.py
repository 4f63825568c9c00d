"""What both doors of a server have in common: how requests are made, and what was found out about the server.

`bench.openai_door` and `bench.baton_door` implement `Door`; `bench.session` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.load import Target
from bench.prompts import TokenPrompts, WordPrompts
from bench.traces import Trace

PROBE_S = 60.0  # for one answer of a few tokens; the first one of a cold server takes its time


class DoorError(Exception):
    """The server cannot be measured as asked. The message names the remedy."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How every request is made, whatever its prompt. Answers have the trace's lengths if the server knows how."""

    model: str = ""  # empty: the first that the server lists
    prompts: str = "auto"  # ids | text | auto: ids where the server takes them
    # Token ids of prompts are below this. Not found out by trying: an id beyond the vocabulary can bring a server down.
    end_id: int = 1000
    temperature: float = 0.0
    ignore_eos: bool = True  # end only at the wanted length
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of the body, HTTP only
    timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found out about a server before the run."""

    url: str
    api: str  # completions | chat | baton.v1
    model: str
    max_model_len: int = 0  # tokens of prompt and answer; 0: it does not say
    end_id: int = 0  # prompts are token ids below this; 0: prompts are text
    tokens_per_word: float = 0.0
    extra_tokens: float = 0.0  # that a text prompt has besides its words
    extensions: tuple[str, ...] = ()  # fields beyond OpenAI's that it takes

    def prompts(self, trace: Trace, salt: str) -> TokenPrompts | WordPrompts:
        """What builds the prompts of a trace for this server."""
        if self.end_id:
            return TokenPrompts(trace, self.end_id, salt=salt)
        return WordPrompts(trace, self.tokens_per_word, self.extra_tokens, salt)


class Door(Protocol):
    async def open(self) -> Facts:
        """Finds out what the server takes, with a few small requests. Raises DoorError."""
        ...

    def target(self, prompts: TokenPrompts | WordPrompts, tag: str) -> Target:
        """What `bench.load` sends to. `tag` begins the request ids of one run."""
        ...

    async def close(self) -> None: ...
