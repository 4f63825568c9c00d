"""What is known of one request under load: when it was due and sent, when each piece of its answer came, how it ended.

Filled by `bench.load` and the targets, read by `bench.figures`. Times are seconds of one clock.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

# Why a request failed. One vocabulary for both doors, so that they can be compared.
ERRORS = {
    "no_room": "HTTP 429 or RESOURCE_EXHAUSTED: the server refused for want of room",
    "unavailable": "HTTP 503 or UNAVAILABLE: nothing could answer, or a worker was lost",
    "invalid": "another HTTP 4xx, INVALID_ARGUMENT or NOT_FOUND: the request cannot be answered as it is",
    "server_error": "another HTTP 5xx, another gRPC status, or an error in the middle of a stream",
    "connect": "no connection: refused, unknown host, TLS, or too slow",
    "reset": "the connection was reset, or closed before any answer",
    "broken_stream": "the connection or the stream ended in the middle of an answer",
    "bad_answer": "what came is no answer in the door's protocol",
    "empty": "the answer was complete and had no token",
    "timeout": "not complete within the time-out",
    "unfinished": "still running when the time to drain was over",
    "cancelled": "still running when the run was interrupted",
    "client": "a defect of the load generator",
}


@dataclass(slots=True)
class Record:
    """One request. `number` is that of the trace."""

    number: int
    scheduled: float
    input_tokens: int  # as wanted
    output_tokens: int  # as wanted
    warmup: bool = False
    request_id: str = ""
    sent: float | None = None  # None: never
    # A piece is what came at once: an event of a stream, a message. With most servers it is one token.
    piece_times: array[float] = field(default_factory=lambda: array("d"))
    piece_tokens: array[int] = field(default_factory=lambda: array("L"))
    end: float | None = None
    prompt_tokens: int = 0  # as the server counted; 0: it did not say
    completion_tokens: int = 0  # as the server counted, else the sum of the pieces
    cached_tokens: int = 0
    finish_reason: str = ""
    prefilled: str = ""  # where, if the server is a Baton
    status: int = 0  # of HTTP; 0: none
    error: str = ""  # one of ERRORS; empty: answered
    message: str = ""

    @property
    def ok(self) -> bool:
        """Answered completely. False also for one that never ended."""
        return not self.error and self.end is not None

    def piece(self, now: float, tokens: int) -> None:
        """Some more of the answer has come."""
        self.piece_times.append(now)
        self.piece_tokens.append(tokens)

    def fail(self, error: str, message: str) -> None:
        """The first reason counts."""
        if not self.error:
            self.error, self.message = error, message


@dataclass(frozen=True, slots=True)
class Run:
    """What was recorded. `begin` is the clock's value at the begin of the schedule."""

    records: list[Record]
    begin: float
    end: float
    cpu_s: float  # that this process spent
    lags_s: list[float] = field(default_factory=list)  # how much too late the loop woke, sampled all the time
    interrupted: bool = False
