"""Named moments of a hand-off at which a process can be made to kill or stop itself: for tests, never in production.

A worker that was started with a folder of fail points (`WorkerSpec.failpoints`, which a deployment takes from the
environment variable BATON_FAILPOINTS) looks there each time that it comes to one. Whoever comes first claims a file
ROLE.POINT that says "kill" or "stop", renames it to ROLE.POINT.PID.claimed, and gets that signal at that very place.
Without a folder a point costs one comparison, and nothing can be armed.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

import numpy as np

from kvtransfer.messages import Credit, Done
from kvtransfer.transport import Rows, Settled, Transport, TransportError

log = logging.getLogger(__name__)

VARIABLE = "BATON_FAILPOINTS"
# In a prefill worker, in the order of a chunk's life.
SENDING = (
    "at-credit",  # a credit has come
    "before-chunk",  # nothing of the chunk is gathered
    "in-chunk",  # half of its bytes are in the slot
    "after-last-byte",  # all its writes have settled
    "before-chunk-done",
    "after-chunk-done",
    "at-close",  # all chunks are announced, Done is not
)
# In a decode worker.
RECEIVING = (
    "at-credit",  # leases are granted, and not sent
    "copying-out",  # the copies are verified, no block is written
    "at-close",  # Done has come
)
_HALF_S = 1.0  # for half a chunk to settle

_folder: Path | None = None
_role = ""


def arm(folder: str, role: str) -> None:
    """From now on this process looks into `folder`; empty: it does not."""
    global _folder, _role
    _folder, _role = (Path(folder) if folder else None), role
    if folder:
        log.warning("fail points in %s may kill this process", folder)


def reached(point: str) -> None:
    """Strikes when this point was armed."""
    if _folder is not None and (how := claimed(point)):
        strike(how)


def saw(message: object) -> None:
    """A control message comes, or is about to leave."""
    if _folder is not None:
        if isinstance(message, Credit):
            reached("at-credit")
        elif isinstance(message, Done):
            reached("at-close")


def half_written(endpoint: Transport, peer: str, rows: Rows, slot: int) -> list[Settled]:
    """When "in-chunk" was armed: writes the first half of a chunk's rows to their slot, waits for it, strikes.

    Returns what else has settled meanwhile, for the case that the process goes on.
    """
    others: list[Settled] = []
    if _folder is None or not (how := claimed("in-chunk")):
        return others
    half = rows[: (len(rows) + 1) // 2].copy()
    if len(rows) == 1:
        half[0, 2] = max(1, int(half[0, 2]) // 2)
    try:
        ticket = endpoint.write(peer, half + np.array([0, slot, 0], dtype=np.uint64))
    except TransportError:
        strike(how)
        return others
    until = time.monotonic() + _HALF_S
    landed = False
    while time.monotonic() < until and not landed:
        for settled in endpoint.poll():
            if settled.ticket == ticket:
                landed = True
            else:
                others.append(settled)
        time.sleep(0.0005)
    strike(how)
    return others


def claimed(point: str) -> str:
    """What is to happen here; empty: nothing, or somebody else was first."""
    assert _folder is not None
    armed = _folder / f"{_role}.{point}"
    mine = armed.with_name(f"{armed.name}.{os.getpid()}.claimed")
    try:
        armed.rename(mine)
    except FileNotFoundError:
        return ""
    return mine.read_text().strip()


def strike(how: str) -> None:
    """Kills or stops this process. A stopped one goes on from here."""
    os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
