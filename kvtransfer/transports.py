"""Opens an endpoint: allocates its two regions and puts the chosen transport over them.

Roles' processes call it once, in the thread that will own the endpoint. An unusable choice is an error that says why;
only `auto` chooses, and says what it chose.
"""

from __future__ import annotations

import logging
import mmap
from typing import Literal, Protocol, get_args

import numpy as np

from kvtransfer.transport import Region, Transport, TransportError

log = logging.getLogger(__name__)

TransportKind = Literal["auto", "nixl", "distributed", "shm"]


class Endpoint(Transport, Protocol):
    """A transport with the regions it was opened over."""

    staging: Region
    landing: Region
    devices: str  # what moves the bytes, as far as the transport tells: "cma/memory, tcp/lo"; once connected
    warning: str  # what is wrong with them: a faster way is there; else empty

    def close(self) -> None:
        """Ends it. Writes in flight are not stopped by this, and regions stay allocated."""


def open_transport(
    kind: str, staging_bytes: int, landing_bytes: int, incarnation: str, host: str = "127.0.0.1"
) -> Endpoint:
    """Opens an endpoint with regions of these sizes (0: none). Raises TransportError, ValueError for an unknown kind.

    `nixl`: between any two hosts, and the fastest that UCX finds. `distributed`: between any two hosts over TCP, by
    torch.distributed's gloo; it listens at `host`, by which peers must reach it. `shm`: only between processes of one
    host, needs nothing installed. `auto`: nixl where it can be used, else shm.
    """
    if kind not in get_args(TransportKind):
        raise ValueError(f"unknown transport {kind!r}: choose one of {', '.join(get_args(TransportKind))}")
    if staging_bytes < 0 or landing_bytes < 0:
        raise ValueError(f"staging_bytes={staging_bytes}, landing_bytes={landing_bytes}: negative")
    if kind == "shm":
        return _open_shm(staging_bytes, landing_bytes, incarnation)
    if kind == "distributed":
        return _open_distributed(staging_bytes, landing_bytes, incarnation, host)
    try:
        return _open_nixl(staging_bytes, landing_bytes, incarnation)
    except TransportError as error:
        if kind != "auto":
            raise
        log.warning("transport auto: shm, which only reaches processes of this host, because %s", error)
    return _open_shm(staging_bytes, landing_bytes, incarnation)


def allocate_region(size_bytes: int) -> Region:
    """Zeroed, page-aligned, every page present, for the life of the process (also when nobody holds it any more).

    A peer's late write into freed memory would hit whatever came to be there, or kill this process.
    """
    if not size_bytes:
        return np.zeros(0, dtype=np.uint8)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, AttributeError):  # a kernel without huge pages: slower first touch, nothing else
        pass
    region = np.frombuffer(memory, dtype=np.uint8)
    region[:] = 0
    _regions_for_life.append(memory)
    return region


_regions_for_life: list[mmap.mmap] = []


def _open_nixl(staging_bytes: int, landing_bytes: int, incarnation: str) -> Endpoint:
    from kvtransfer import nixl_transport

    nixl_transport.load()  # before anything is allocated for it
    return nixl_transport.NixlTransport(
        incarnation, allocate_region(staging_bytes), allocate_region(landing_bytes)
    )


def _open_distributed(staging_bytes: int, landing_bytes: int, incarnation: str, host: str) -> Endpoint:
    from kvtransfer.distributed_transport import DistributedTransport

    return DistributedTransport(
        incarnation, allocate_region(staging_bytes), allocate_region(landing_bytes), host
    )


def _open_shm(staging_bytes: int, landing_bytes: int, incarnation: str) -> Endpoint:
    from kvtransfer.shm_transport import ShmTransport

    return ShmTransport(incarnation, allocate_region(staging_bytes), landing_bytes)
