"""Every state machine that the simulator drives, and how often each of their transitions was taken in this process."""

from __future__ import annotations

from collections import Counter
from typing import Any

from decode.states import REQUESTS
from engine.ledger import BLOCKS, SLOTS
from engine.lifecycle import Lifecycle
from engine.sequence import PHASES
from kvtransfer.leases import LEASES
from prefill.states import HANDOFFS

Transition = tuple[str, str, str]  # of what, from, to

TABLES: list[Lifecycle[Any]] = [REQUESTS, PHASES, HANDOFFS, LEASES, BLOCKS, SLOTS]


def allowed() -> list[Transition]:
    """In the order of the tables."""
    return [
        (table.name, before.name, after.name)
        for table in TABLES
        for before, moves in table.moves.items()
        for after in table.moves
        if after in moves
    ]


def taken() -> Counter[Transition]:
    """Since this process began, in the order of the tables whatever came first."""
    return Counter(
        {
            (table.name, before.name, after.name): table.taken[before, after]
            for table in TABLES
            for before, moves in table.moves.items()
            for after in table.moves
            if after in moves and table.taken[before, after]
        }
    )
