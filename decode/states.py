"""The life of a request in a decode worker: the one transition table."""

from __future__ import annotations

from enum import Enum

from engine.lifecycle import Lifecycle


class State(Enum):
    ARRIVED = "arrived"
    PARKED = "parked"  # waits for another request that computes the same prefix
    HANDOFF = "handoff"  # its KV is being fetched
    PREFILL = "prefill"  # with the scheduler, no token drawn yet
    DECODING = "decoding"
    ENDED = "ended"


REQUESTS = Lifecycle(
    "request",
    {
        State.ARRIVED: {State.PARKED, State.HANDOFF, State.PREFILL},
        State.PARKED: {State.HANDOFF, State.PREFILL, State.ENDED},
        State.HANDOFF: {State.PREFILL, State.ENDED},
        State.PREFILL: {State.DECODING, State.ENDED},
        State.DECODING: {State.ENDED},
        State.ENDED: set(),
    },
)
