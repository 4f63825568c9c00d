"""Measures the transport to one peer with a small budget, and judges what was found.

    writer    4 KiB, one after another            -> latency
              64 KiB, twice as much each time     -> bandwidth: the best of them, until the time is used up

All bytes go from and into areas that nothing else uses, behind the writer's buffers and the peer's slots: several
writers may measure at once, and late bytes harm nobody. `Preflight` is pure: what settled and the time in, rows to
write out, so that the thread which owns an endpoint measures between its other work and never waits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from kvtransfer.messages import Measured
from kvtransfer.rows import OPERATION_BYTES
from kvtransfer.transport import Rows, Transport, TransportError

AREA_BYTES = 4 << 20  # also the longest write
BUDGET_BYTES = 16 * AREA_BYTES
BUDGET_S = 0.05  # of large writes; small ones get a quarter of that besides
LIMIT_S = 5.0  # for all to settle; a peer that takes longer hangs

_SMALL_BYTES = 4096
_SMALL_WRITES = 8  # and one before them that opens the connection and does not count
_FIRST_BYTES = 64 << 10
_LARGE_WRITES = 3  # at least, however slow
_POLL_S = 20e-6
assert AREA_BYTES <= OPERATION_BYTES


class Preflight:
    """One peer's measurement: `begin`, then `settled` for each write until it gives none. Ends in `measured`."""

    def __init__(
        self,
        *,
        staging_at: int = 0,
        landing_at: int = 0,
        area_bytes: int = AREA_BYTES,
        budget_s: float = BUDGET_S,
        budget_bytes: int = BUDGET_BYTES,
        limit_s: float = LIMIT_S,
    ) -> None:
        """`staging_at`, `landing_at`: where the areas of `area_bytes` begin."""
        if area_bytes <= 0:
            raise ValueError(f"area_bytes={area_bytes}: must be positive")
        self.measured: Measured | None = None
        self._at = (staging_at, landing_at)
        self._area_bytes = area_bytes
        self._budget_s = budget_s
        self._budget_bytes = budget_bytes
        self._limit_s = limit_s
        self._began_s = 0.0
        self._posted_s = 0.0
        self._size = min(_SMALL_BYTES, area_bytes)
        self._small: list[float] = []
        self._best = 0.0
        self._moved = 0
        self._large = -1  # large writes that have settled; -1: not yet begun
        self._large_s = 0.0

    def begin(self, now: float) -> Rows:
        """The first write."""
        self._began_s = now
        return self._post(now)

    def settled(self, error: str, now: float) -> Rows | None:
        """The write that was posted last has settled: the next one, or None at the end."""
        if self.measured is not None:
            return None
        if error:
            self.give_up(error)
            return None
        took_s = max(now - self._posted_s, 1e-9)
        self._moved += self._size
        if self._large < 0:
            self._small.append(took_s)
            measured = len(self._small) - 1
            spent = now - self._began_s >= self._budget_s / 4
            if measured < _SMALL_WRITES and not (measured and spent):
                return self._post(now)
            self._large, self._large_s = 0, now
            self._size = min(_FIRST_BYTES, self._area_bytes)
            return self._post(now)
        self._large += 1
        self._best = max(self._best, self._size / took_s)
        spent = now - self._large_s >= self._budget_s or self._moved >= self._budget_bytes
        if spent and self._large >= _LARGE_WRITES:
            latency_s = statistics.median(self._small[1:])
            self.measured = Measured(latency_s=latency_s, bytes_per_s=self._best, moved_bytes=self._moved)
            return None
        self._size = min(2 * self._size, self._area_bytes)
        return self._post(now)

    def overdue(self, now: float) -> bool:
        """Whether to `give_up`: a peer that hangs settles nothing."""
        return self.measured is None and now - self._began_s >= self._limit_s

    def give_up(self, error: str) -> None:
        """Ends it without a result; what is in flight lands in areas that nobody reads."""
        if self.measured is None:
            self.measured = Measured(moved_bytes=self._moved, error=error)

    def _post(self, now: float) -> Rows:
        self._posted_s = now
        return np.array([[*self._at, self._size]], dtype=np.uint64)


def run(
    endpoint: Transport, peer: str, preflight: Preflight, clock: Callable[[], float] = time.monotonic
) -> Measured:
    """Measures with an endpoint that does nothing else. Never raises for what the transport does, never hangs."""
    rows: Rows | None = preflight.begin(clock())
    while rows is not None:
        try:
            ticket = endpoint.write(peer, rows)
            errors = [settled.error for settled in endpoint.poll() if settled.ticket == ticket]
            while not errors and not preflight.overdue(clock()):
                time.sleep(_POLL_S)  # lets the transport's own threads run
                errors = [settled.error for settled in endpoint.poll() if settled.ticket == ticket]
        except TransportError as error:
            errors = [str(error)]
        if not errors:
            preflight.give_up("it has not settled in time: the peer hangs, or its network does")
            break
        rows = preflight.settled(errors[0], clock())
    assert preflight.measured is not None
    return preflight.measured


def refusal(measured: Measured, min_bandwidth_gb_s: float) -> str:
    """Why this link is not to be used; empty: it is. `min_bandwidth_gb_s`: 0 for whatever there is."""
    if min_bandwidth_gb_s <= 0:
        return ""
    if measured.error:
        return (
            f"the link could not be measured ({measured.error}), and kvtransfer.min_bandwidth = "
            f"{min_bandwidth_gb_s:g} GB/s is wanted"
        )
    if measured.gb_per_s >= min_bandwidth_gb_s:
        return ""
    return (
        f"the link does {measured.gb_per_s:.3g} GB/s, less than kvtransfer.min_bandwidth = "
        f"{min_bandwidth_gb_s:g} GB/s: `baton doctor` shows what is in the way"
    )


def summary(measured: Measured, transport: str, devices: str) -> str:
    """One line for people: "nixl/UCX (cma/memory): 4.1 GB/s, 35 us"."""
    via = f"{transport} ({devices})" if devices else transport
    if measured.error:
        return f"{via}: not measured: {measured.error}"
    return f"{via}: {measured.gb_per_s:.3g} GB/s, {measured.latency_s * 1e6:.0f} us"


def worst(one: Measured | None, other: Measured | None) -> Measured | None:
    """Of two links that are used together: the least bandwidth, the largest latency, the first error."""
    if one is None or other is None:
        return one or other
    return Measured(
        latency_s=max(one.latency_s, other.latency_s),
        bytes_per_s=0.0 if one.error or other.error else min(one.bytes_per_s, other.bytes_per_s),
        moved_bytes=one.moved_bytes + other.moved_bytes,
        error=one.error or other.error,
    )
