"""What the prefix cache of one worker gained and lost since that was last told: the source of KV events.

The ledger writes it as blocks are published and evicted; the step loop takes it out in batches with consecutive
numbers. A name that came and went between two batches is in neither, so the journal never holds more names than twice
the pool's blocks, however long nobody takes. Pure; must never cost more than a dictionary entry a block.
"""

from __future__ import annotations

from itertools import islice

from engine.api import KvEvents
from engine.prefix import HINT_BYTES


class CacheJournal:
    """The difference between what was told and what the cache has; names are those of `engine.prefix`."""

    def __init__(self) -> None:
        self._added: dict[bytes, None] = {}  # in order: the head of a prefix before what is built on it
        self._evicted: dict[bytes, None] = {}
        self._cleared = False
        self._seq = 0

    def __bool__(self) -> bool:
        """There is something to tell."""
        return bool(self._added or self._evicted or self._cleared)

    def add(self, name: bytes) -> None:
        """The cache has this block from now on."""
        if name in self._evicted:
            del self._evicted[name]
        else:
            self._added[name] = None

    def evict(self, name: bytes) -> None:
        """The cache has lost this block."""
        if name in self._added:
            del self._added[name]
        else:
            self._evicted[name] = None

    def clear(self) -> None:
        """The cache has lost all its blocks."""
        self._added.clear()
        self._evicted.clear()
        self._cleared = True

    def take(self, limit: int) -> KvEvents | None:
        """The next batch, of at most `limit` names, losses first; None when there is nothing to tell."""
        if not self:
            return None
        self._seq += 1
        evicted = _take(self._evicted, limit)
        added = _take(self._added, limit - len(evicted))
        cleared, self._cleared = self._cleared, False
        return KvEvents(self._seq, _packed(added), _packed(evicted), cleared)


def _take(names: dict[bytes, None], limit: int) -> list[bytes]:
    if len(names) <= limit:
        taken = list(names)
        names.clear()
    else:
        taken = list(islice(names, limit))
        for name in taken:
            del names[name]
    return taken


def _packed(names: list[bytes]) -> bytes:
    return b"".join([name[:HINT_BYTES] for name in names])
