"""Into how many groups of layers a hand-off is cut, from what the link and the prefill worker were measured at. Pure.

A group leaves while the layers behind it are being computed, so only the last group of the last token range is exposed.
More groups expose less, until their pieces are small or the link's latency is what they take. `LinkModel` learns the
link from the writes of a prefill worker, which tells its peer in `Done`; `layer_groups` chooses for the next hand-off.
"""

from __future__ import annotations

import math

MEMORY = 0.95  # how much of it each further write leaves to what was seen before
LEAST_PIECE_BYTES = 64 << 10  # smaller ones are slow on every fabric
EXPOSED = 0.1  # the last group's transfer, as a share of the time in which its token range is computed
LATENCIES = 8.0  # a group takes so many times the link's latency, at least


class LinkModel:
    """Seconds of a write = latency_s + bytes / bytes_per_s, fitted to writes that are forgotten exponentially."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, size_bytes: int, seconds: float) -> None:
        """A write of so many bytes took so long, not counting what it waited for writes before it."""
        if size_bytes <= 0 or seconds <= 0:
            return
        x, y = float(size_bytes), seconds
        self._weight = MEMORY * self._weight + 1.0
        self._x = MEMORY * self._x + x
        self._y = MEMORY * self._y + y
        self._xx = MEMORY * self._xx + x * x
        self._xy = MEMORY * self._xy + x * y

    @property
    def measured(self) -> tuple[float, float]:
        """(bytes_per_s, latency_s); (0, 0) when nothing was seen. Writes of one size only tell no latency."""
        if not self._weight:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        if spread > 1e-4 * mean_x * mean_x:
            slope = (self._xy / self._weight - mean_x * mean_y) / spread
            latency_s = mean_y - slope * mean_x
            if slope > 0 and latency_s >= 0:
                return 1.0 / slope, latency_s
        return mean_x / mean_y, 0.0


def layer_groups(
    layers: int,
    *,
    range_bytes: int,
    piece_bytes: int,
    compute_s: float,
    bytes_per_s: float,
    latency_s: float,
) -> int:
    """How many, 1 to `layers`; 1 when something was not measured.

    `range_bytes`: KV of a whole token range as it crosses, `piece_bytes`: the smallest piece of it, `compute_s`: how
    long the prefill worker computes such a range.
    """
    if bytes_per_s <= 0 or compute_s <= 0:
        return 1
    transfer_s = range_bytes / bytes_per_s
    wanted = math.ceil(transfer_s / (EXPOSED * compute_s))
    most = min(layers, piece_bytes // LEAST_PIECE_BYTES)
    if latency_s > 0:
        most = min(most, int(transfer_s / (LATENCIES * latency_s)))
    return max(1, min(wanted, most))
