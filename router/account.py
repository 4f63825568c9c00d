"""What is known of one request in this router, from its arrival to its one end: what metrics and the log are made from.

`router.generation` opens an account and closes it however the request ends; `router.dispatch` enters what it decides
and hears from the worker. Times are of the monotonic clock. Nothing is computed here while tokens flow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from engine.api import Trace

if TYPE_CHECKING:  # the doors are lighter without numpy
    from router.policy import Decision


@dataclass(slots=True)
class Account:
    """One request. As a context manager it notes how the block ended and calls `on_end` once.

    `outcome`: "stop" | "length", "cancelled" (the client left), or the kind of the refusal in lower case.
    """

    request_id: str = ""
    on_end: Callable[[Account], None] | None = None
    arrived: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    outcome: str = ""
    detail: str = ""  # of a refusal
    prompt_tokens: int = 0
    generated_tokens: int = 0
    decision: Decision | None = None
    submitted: float = 0.0  # when that was
    trace: Trace | None = None  # the worker's; None for a request whose client went away
    first_token: float | None = None
    last_token: dict[int, float] = field(default_factory=dict)  # by choice

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended = time.monotonic()
        if not self.outcome:
            self._explain(error)
        if self.on_end is not None:
            self.on_end(self)

    def _explain(self, error: BaseException | None) -> None:
        from router.dispatch_api import Refused  # which needs this module for `Prompt`

        if isinstance(error, Refused):
            self.outcome, self.detail = error.kind.name.lower(), error.message
        elif error is None or isinstance(error, GeneratorExit | asyncio.CancelledError):
            self.outcome = "cancelled"
        else:
            self.outcome, self.detail = "internal", type(error).__name__
