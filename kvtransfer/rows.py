"""Descriptor rows of a write, [N, 3]: staging offset, landing offset, bytes. Merged, checked and cut for all
transports."""

from __future__ import annotations

import numpy as np

from kvtransfer.transport import Rows, TransportError

OPERATION_BYTES = (
    16 << 20
)  # bounds a synchronous copy, what must be waited for after an abort, and unfairness
OPERATION_ROWS = 256


def merged(rows: Rows) -> Rows:
    """The same copies in as few rows as their order allows: a row that goes on where the one before it ends, on both
    sides, joins that."""
    if len(rows) < 2:
        return rows
    ends = rows[:-1, :2] + rows[:-1, 2:]
    starts = np.flatnonzero(np.concatenate(([True], (rows[1:, :2] != ends).any(axis=1))))
    if len(starts) == len(rows):
        return rows
    result = rows[starts]
    result[:, 2] = np.add.reduceat(rows[:, 2], starts)
    return result


def checked(rows: Rows, staging_bytes: int, landing_bytes: int) -> Rows:
    """`rows` itself if every row lies within both regions. Raises TransportError, naming the first bad row."""
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype != np.uint64:
        raise TransportError(f"rows must be uint64 [N, 3], not {rows.dtype}{list(rows.shape)}")
    if not len(rows):
        raise TransportError("a write needs at least one row")
    length = rows[:, 2]
    good = length > 0
    for offset, size in ((rows[:, 0], staging_bytes), (rows[:, 1], landing_bytes)):
        # Not offset + length: that could wrap around. The difference may too, but only where length > size.
        good &= (length <= size) & (offset <= np.uint64(size) - length)
    if not good.all():
        bad = int(np.argmin(good))
        raise TransportError(
            f"row {bad} (staging, landing, bytes) = {rows[bad].tolist()} is empty or outside of "
            f"staging of {staging_bytes} and landing of {landing_bytes} bytes"
        )
    return rows


def operations(rows: Rows) -> list[Rows]:
    """Cuts checked rows into operations of at most OPERATION_BYTES bytes and OPERATION_ROWS rows, in order."""
    pieces: list[tuple[int, int, int]] = [
        (staging + at, landing + at, min(OPERATION_BYTES, length - at))
        for staging, landing, length in rows.tolist()
        for at in range(0, length, OPERATION_BYTES)
    ]
    groups: list[list[tuple[int, int, int]]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and (len(groups[-1]) == OPERATION_ROWS or size + piece[2] > OPERATION_BYTES):
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece[2]
    return [np.array(group, dtype=np.uint64) for group in groups]
