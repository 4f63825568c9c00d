"""A prefill rank measures its links to a decode worker's ranks when they are connected, one after another.

Part of the mover, and only in its thread: it posts small writes between the mover's own (`kvtransfer.preflight`) and
never waits. `Connected` is reported when all are measured: no hand-off begins over a link that nobody has tried.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.handshake import PREFLIGHT
from kvtransfer.memory import TransferMemory
from kvtransfer.messages import Connected, Measured, MoverReport
from kvtransfer.peers import Peer
from kvtransfer.preflight import Preflight, summary, worst
from kvtransfer.transport import Rows, Settled, TransportError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Link:
    """To one worker: its ranks that are still to be measured, the slowest of those that were."""

    peer: Peer
    ranks: deque[int]
    preflight: Preflight | None = None
    slowest: Measured | None = None


class Linking:
    """`measure` gives one `Connected` report, at once or later, unless the mover's thread breaks."""

    def __init__(
        self,
        memory: TransferMemory,
        on_report: Callable[[MoverReport], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._endpoint = memory.endpoint
        self._on_report = on_report
        self._clock = clock
        self._links: dict[str, _Link] = {}  # by incarnation
        self._tickets: dict[
            int, tuple[_Link, Preflight] | None
        ] = {}  # None: of a measurement that was given up

    @property
    def busy(self) -> bool:
        return bool(self._links)

    def measure(self, peer: Peer) -> None:
        """This rank is connected to the ranks of `peer`."""
        link = _Link(peer, deque(peer.partners))
        self._links[peer.hello.incarnation] = link
        self._next(link)

    def settled(self, settled: Settled) -> bool:
        """Whether that write was one of these."""
        if settled.ticket not in self._tickets:
            return False
        known = self._tickets.pop(settled.ticket)
        if known is not None and known[0].preflight is known[1]:
            link, preflight = known
            self._go_on(link, preflight.settled(settled.error, self._clock()))
        return True

    def tick(self) -> None:
        """Gives up on ranks that do not settle anything."""
        now = self._clock()
        for link in [link for link in self._links.values() if link.preflight is not None]:
            if link.preflight is not None and link.preflight.overdue(now):
                link.preflight.give_up("it has not settled in time: the peer hangs, or its network does")
                self._go_on(link, None)

    def forget(self, incarnation: str, reason: str) -> None:
        """Reports what is under way to this worker as failed."""
        link = self._links.pop(incarnation, None)
        if link is not None:
            self._give_up_tickets(link)
            self._on_report(Connected(incarnation, reason))

    def close(self, reason: str) -> None:
        for incarnation in list(self._links):
            self.forget(incarnation, reason)

    def _next(self, link: _Link) -> None:
        """Begins with the next rank, or reports."""
        hello = link.peer.hello
        if not link.ranks or (link.slowest is not None and link.slowest.error):
            del self._links[hello.incarnation]
            if link.slowest is not None:
                line = summary(link.slowest, self._endpoint.name, self._endpoint.devices)
                log.log(
                    logging.WARNING if link.slowest.error else logging.INFO,
                    "to %s: %s",
                    hello.worker_id,
                    line,
                )
            self._on_report(
                Connected(hello.incarnation, "", link.slowest, self._endpoint.devices, self._endpoint.warning)
            )
            return
        if PREFLIGHT not in hello.capabilities:
            link.slowest = Measured(
                error=f"its release ({hello.release or 'unknown'}) has no room to measure"
            )
            return self._next(link)
        rank = link.ranks[0]
        area_at = hello.slot_count * hello.slot_bytes[rank]
        link.preflight = Preflight(staging_at=self._memory.area_at, landing_at=area_at)
        self._go_on(link, link.preflight.begin(self._clock()))
        return None

    def _go_on(self, link: _Link, rows: Rows | None) -> None:
        """Posts a write of the rank in turn, or takes what it has come to."""
        preflight = link.preflight
        assert preflight is not None
        if rows is not None:
            try:
                ticket = self._endpoint.write(link.peer.name(link.ranks[0]), rows)
            except TransportError as refused:
                preflight.give_up(str(refused))
            else:
                self._tickets[ticket] = (link, preflight)
                return
        measured = preflight.measured
        assert measured is not None
        link.preflight = None
        link.ranks.popleft()
        self._give_up_tickets(link)
        link.slowest = worst(link.slowest, measured)
        self._next(link)

    def _give_up_tickets(self, link: _Link) -> None:
        """Their writes settle later: they must still be known as ours."""
        for ticket, known in self._tickets.items():
            if known is not None and known[0] is link:
                self._tickets[ticket] = None
