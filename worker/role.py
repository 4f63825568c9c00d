"""What the step loop expects of a role. Both roles share the loop and differ in what feeds and drains it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from engine.api import KvEvents, Load, RequestEnd, StepOutput
from engine.costs import StepModel
from engine.plan import StepPlan, StepResult
from kvtransfer.messages import MoverJob, MoverReport
from worker.messages import PeerRefused, ToEngine, ToPeer

# What a role wants done: said to the shell, or given to the mover of its process.
Said = StepOutput | RequestEnd | ToPeer | PeerRefused
Action = Said | MoverJob


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds KV blocks of a worker, or waits in it: a request, a hand-off, a chunk that is being copied in.

    `since` and `deadline` are on the clock of the step loop; infinite: what it waits for has a limit of its own.
    """

    name: str  # the request's id, or the peer and the hand-off's id
    kind: str  # "request", "hand-off", "chunk" or "step"
    state: str
    blocks: list[int]
    since: float
    deadline: float = math.inf
    landing: bool = False  # the blocks are being filled; nobody may read them


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A landing slot that is not free: whose lease on it is open, or why it is kept."""

    peer: str
    handoff_id: int
    chunk: int
    slot: int
    state: str  # "granted", "landed" or "quarantined"
    since: float  # granted, on the clock of the step loop


class Role(Protocol):
    """A pure state machine: events and `now` in, actions out. See `decode.role` and `prefill.role`."""

    costs: StepModel  # learned by the step loop; the role adds what it sees, and may ask it

    @property
    def has_work(self) -> bool:
        """A step might run now without any further event."""

    @property
    def expecting(self) -> bool:
        """Peers may be writing into this process's slots: the mover must poll."""

    @property
    def at_rest(self) -> bool:
        """Nothing is accepted and unfinished: the ledger must be all free or cached."""

    def handle(self, event: ToEngine, now: float) -> None:
        """Something from the shell."""

    def report(self, report: MoverReport, now: float) -> None:
        """Something from the mover."""

    def tick(self, now: float) -> None:
        """Deadlines; called after the events of a turn, so that news beats time-outs."""

    def schedule(self, now: float) -> StepPlan | None:
        """The next step; each is followed by one `commit`."""

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> None:
        """The step was computed."""

    def drain(self) -> list[Action]:
        """What is to be done since the last call, in order."""

    def load(self) -> Load:
        """A snapshot for routers and operators."""

    def kv_events(self, limit: int) -> KvEvents | None:
        """The next batch of at most `limit` changes of the prefix cache; None when there is none."""

    def owners(self) -> Iterator[Owner]:
        """All who hold blocks or wait for a peer, in no order; costs what they hold."""

    def leases(self) -> Iterator[HeldLease]:
        """All slots that are not free."""

    def check(self) -> None:
        """Raises LedgerError when the books do not add up, or are not those of the `owners`."""
