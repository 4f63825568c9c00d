"""The life of a hand-off in a prefill worker: the one transition table."""

from __future__ import annotations

from enum import Enum

from engine.lifecycle import Lifecycle


class State(Enum):
    COMPUTING = "computing"  # with the scheduler, chunks leave as they are done
    SENDING = "sending"  # all computed, some chunks wait for credit or are in flight
    ENDING = "ending"  # given up; writes in flight still have to settle
    ENDED = "ended"


HANDOFFS = Lifecycle(
    "hand-off",
    {
        State.COMPUTING: {State.SENDING, State.ENDING},
        State.SENDING: {State.ENDED, State.ENDING},
        State.ENDING: {State.ENDED},
        State.ENDED: set(),
    },
)
