"""Who is next when requests must wait: by priority, then by tenants' fair shares, then by arrival. Pure.

Shares follow start-time fair queueing (Goyal, Vin and Cheng, 1996): each request has a start tag in virtual time, the
later of the time now and the end of its tenant's last one, and a tenant's time runs by tokens over its weight. An idle
tenant saves nothing up. `router.dispatch` asks it for every request, waiting or not; what was not used is given back.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

REMEMBERED = 4096  # tenants; those that are owed nothing are forgotten beyond that


@dataclass(slots=True, order=True)
class Ticket:
    """A request that waits. `tag` is where its tenant's time begins for it."""

    priority: int
    tag: float
    arrival: int
    tenant: str = field(compare=False)
    tokens: int = field(compare=False)
    waits: bool = field(default=False, compare=False)


class Admission:
    """The queue of one router. `weights` of tenants; who is not named weighs 1."""

    def __init__(self, weights: Mapping[str, float], max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._weights = weights
        self._heap: list[Ticket] = []
        self._waiting = 0
        self._ends: dict[str, float] = {}  # virtual time at which a tenant's requests so far end
        self._now = 0.0  # virtual time: the tag of the latest request that went in
        self._arrivals = 0

    def __len__(self) -> int:
        return self._waiting

    @property
    def full(self) -> bool:
        return self._waiting >= self.max_waiting

    def enter(self, tenant: str, priority: int, tokens: int) -> Ticket:
        """A request of so many tokens arrives. Follow with `wait`, or with `admitted` when nothing stands before it."""
        self._arrivals += 1
        tag = max(self._now, self._ends.get(tenant, 0.0))
        self._ends[tenant] = tag + tokens / self._weight(tenant)
        return Ticket(priority, tag, self._arrivals, tenant, tokens)

    def wait(self, ticket: Ticket) -> None:
        ticket.waits = True
        heapq.heappush(self._heap, ticket)
        self._waiting += 1

    def admitted(self, ticket: Ticket) -> None:
        """It goes to a worker."""
        self._now = max(self._now, ticket.tag)
        if len(self._ends) > REMEMBERED:
            self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._now}

    def next(self) -> Ticket | None:
        """Who goes in now; it waits no more."""
        while self._heap:
            ticket = heapq.heappop(self._heap)
            if ticket.waits:
                self._leave(ticket)
                self.admitted(ticket)
                return ticket
        return None

    def leave(self, ticket: Ticket) -> bool:
        """It goes away without having gone in; False when it did not wait."""
        if not ticket.waits:
            return False
        self._leave(ticket)
        self.give_back(ticket.tenant, ticket.tokens)
        ticket.tokens = 0
        if len(self._heap) > 2 * self._waiting + 16:
            self._heap = [one for one in self._heap if one.waits]
            heapq.heapify(self._heap)
        return True

    def _leave(self, ticket: Ticket) -> None:
        ticket.waits = False
        self._waiting -= 1

    def give_back(self, tenant: str, tokens: int) -> None:
        """Tokens that a request was counted with and did not use."""
        if tenant in self._ends:
            self._ends[tenant] -= tokens / self._weight(tenant)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)
