"""The verbs of a transport: one-sided writes from this endpoint's staging memory into a peer's landing memory.

An endpoint is built with two byte regions, registered once for the life of the process: `staging` (what it sends
from) and `landing` (its slots: the only memory that a peer may write). One thread owns an endpoint and makes all
calls. Settling is an event of its own: a write that nobody waits for any more still settles, and only then may its
staging bytes be reused. Nothing here times out; deadlines belong to the leases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Region = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.uint64]


class TransportError(RuntimeError):
    """A peer cannot be reached, or a description is unusable; says which and why."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The end of one write. `error` empty: every byte is in the peer's landing memory."""

    ticket: int
    error: str = ""


class Transport(Protocol):
    """Six verbs; see the module's text for who may call them."""

    name: str  # e.g. "nixl/UCX"; shown at start and in the hello

    def describe(self) -> bytes:
        """What a peer must know to write into this endpoint's landing memory. Goes only to authenticated peers."""

    def connect(self, peer: str, description: bytes) -> None:
        """Makes `peer` writable. Raises TransportError. Connecting the same peer again replaces its description."""

    def disconnect(self, peer: str) -> None:
        """Forgets `peer`; its writes in flight still settle (kept until then). Unknown peers are ignored."""

    def write(self, peer: str, rows: Rows) -> int:
        """Posts one write and returns its ticket. `rows` is [N, 3]: staging offset, landing offset, bytes.

        May settle inside the call; it is still reported by `poll`. Raises TransportError only when nothing was posted.
        """

    def poll(self) -> list[Settled]:
        """Makes progress, for incoming writes too, and returns what has settled since the last call."""

    def gone(self, peer: str) -> bool:
        """True only when `peer`'s process is certainly dead and nothing that it sent can still arrive."""
