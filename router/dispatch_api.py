"""What the doors see of the dispatcher: a prompt goes in, tokens come out. Implemented by `router.dispatch`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from engine.api import Logprobs, SamplingParams, Trace
from router.account import Account


class RefusalKind(Enum):
    """Why a request was not accepted or could not be finished, in gRPC's and HTTP's words."""

    INVALID = ("INVALID_ARGUMENT", 400)
    NOT_FOUND = ("NOT_FOUND", 404)
    NO_ROOM = ("RESOURCE_EXHAUSTED", 429)
    TOO_LATE = ("RESOURCE_EXHAUSTED", 429, "deadline")  # its first token cannot come by its deadline
    UNAVAILABLE = ("UNAVAILABLE", 503)
    INTERNAL = ("INTERNAL", 500)

    @property
    def grpc_code(self) -> str:
        return str(self.value[0])

    @property
    def http_status(self) -> int:
        return int(self.value[1])


class Refused(Exception):
    """A typed answer with a reason. `param` names the offending field of the request where there is one."""

    def __init__(
        self, kind: RefusalKind, message: str, *, param: str = "", retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request after validation and tokenization."""

    request_id: str
    tokens: list[int]
    sampling: SamplingParams
    salt: str = ""
    priority: int = 0  # less is more urgent
    n: int = 1  # choices
    ttft_s: float | None = None  # targets of its own; None: the deployment's
    itl_s: float | None = None
    deadline_s: float | None = None  # for the first token, from arrival
    tenant: str = ""
    account: Account = field(default_factory=Account, compare=False)


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Some more tokens of one choice; `logprobs` of each when the request asks for them."""

    first_index: int
    ids: list[int]
    choice: int = 0
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of the prompt's tokens from `first_index` on; all come before the first NewTokens."""

    first_index: int
    logprobs: Logprobs


@dataclass(frozen=True, slots=True)
class ChoiceEnded:
    """One choice has ended, and others have not."""

    choice: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The one terminal event: of the request, and of its last choice. reason: "stop" or "length"; everything else is
    raised as Refused."""

    reason: str
    trace: Trace = field(default_factory=Trace)
    decode_worker: str = ""
    decision: str = ""
    choice: int = 0


Event = NewTokens | PromptScores | ChoiceEnded | Ended


class Dispatcher(Protocol):
    def generate(self, prompt: Prompt) -> AsyncGenerator[Event, bool | None]:
        """Yields NewTokens (and the rest) as they come and one Ended last. Raises Refused, before or in the middle.

        `asend(True)` says that enough has come: the request is cancelled and Ended, with its trace, is yielded next.
        Closing the generator early (`aclose`, cancellation) cancels the request everywhere.
        """

    @property
    def ready(self) -> bool:
        """True when a request would be answered now."""
