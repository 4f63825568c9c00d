"""What registered memory the transfer of one rank needs, and the transport over it.

    prefill rank   staging   [ buffer 0 | buffer 1 | buffer 2 | the KV pool, where it may be sent from directly | area ]
    decode rank    landing   [ slot 0 | slot 1 | ... | area ]

The areas are what links are measured with (`kvtransfer.preflight`), and nothing else uses them.

A rank's process opens it once, before its KV pool, which may get its memory from here (`storage`), and gives it to its
mover. Regions live as long as the process: nothing here may free or resize them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from kvtransfer.messages import KvSpec
from kvtransfer.plan import kv_heads, slot_bytes
from kvtransfer.preflight import AREA_BYTES
from kvtransfer.transports import Endpoint, open_transport

Gather = Literal["auto", "always", "never"]
Side = Literal["prefill", "decode"]

STAGING_BUFFERS = 3  # one being filled while others are in flight
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class TransferMemory:
    """`buffers` is how many chunks may be in flight, also those that are sent from the pool and leave theirs empty."""

    endpoint: Endpoint
    slot_bytes: int  # of a landing slot, or of a staging buffer
    slots: int
    buffers: int
    buffers_bytes: int  # of the staging region, before the pool
    area_at: int  # in the region of this side
    storage: torch.Tensor | None  # flat uint8 for the KV pool; None: it allocates by itself

    @staticmethod
    def open(
        kind: str,
        kv: KvSpec,
        rank: int,
        *,
        role: Side,
        slots: int,
        gather: str,
        incarnation: str,
        pool_bytes: int,
        device: str = "cpu",
        host: str = "127.0.0.1",
    ) -> TransferMemory:
        """Opens a transport of this kind over the regions that this rank needs; peers reach it at `host`.

        `slots` are a decode worker's. `pool_bytes` is what the KV pool takes, which is on `device`: only one on the
        CPU can be sent from without gathering. Raises TransportError, ValueError (also PlanError) for what cannot be.
        """
        sizes = Sizes.of(
            kv, rank, role=role, slots=slots, gather=gather, pool_bytes=pool_bytes if device == "cpu" else 0
        )
        endpoint = open_transport(
            kind, sizes.staging_bytes, sizes.landing_bytes, f"{incarnation}/{rank}", host
        )
        return TransferMemory.over(endpoint, sizes)

    @staticmethod
    def over(endpoint: Endpoint, sizes: Sizes) -> TransferMemory:
        """Over an endpoint that was opened with these sizes."""
        if (endpoint.staging.nbytes, endpoint.landing.nbytes) != (sizes.staging_bytes, sizes.landing_bytes):
            raise ValueError(
                f"regions of {endpoint.staging.nbytes} and {endpoint.landing.nbytes} bytes are not {sizes}"
            )
        pool = endpoint.staging[sizes.buffers_bytes :][: sizes.pool_bytes]
        return TransferMemory(
            endpoint=endpoint,
            slot_bytes=sizes.slot_bytes,
            slots=sizes.slots,
            buffers=sizes.buffers,
            buffers_bytes=sizes.buffers_bytes,
            area_at=max(sizes.staging_bytes, sizes.landing_bytes) - sizes.area_bytes,
            storage=torch.from_numpy(pool) if sizes.pool_bytes else None,
        )

    @property
    def name(self) -> str:
        return self.endpoint.name

    def describe(self) -> bytes:
        """What a peer's rank must know to write here."""
        return self.endpoint.describe()


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the regions of one rank are; see the module's drawing."""

    slot_bytes: int
    slots: int
    buffers: int
    buffers_bytes: int
    pool_bytes: int
    area_bytes: int = AREA_BYTES

    @property
    def staging_bytes(self) -> int:
        return self.buffers_bytes + self.pool_bytes + self.area_bytes if self.buffers else 0

    @property
    def landing_bytes(self) -> int:
        return self.slots * self.slot_bytes + self.area_bytes if self.slots else 0

    @staticmethod
    def of(
        kv: KvSpec,
        rank: int,
        *,
        role: Side,
        slots: int = 0,
        gather: str = "auto",
        pool_bytes: int = 0,
        buffers: int = STAGING_BUFFERS,
    ) -> Sizes:
        """Of a decode rank: its slots. Of a prefill rank: staging buffers unless it never gathers, and the KV pool
        where that may be sent from directly: if it must, or if its tokens lie together, which those of a rank with
        one kv head do. Raises ValueError for an option that cannot take effect."""
        slot = slot_bytes(kv, rank)
        if gather not in get_args(Gather):
            raise ValueError(f"gather={gather!r}: choose one of {', '.join(get_args(Gather))}")
        if role == "decode":
            return Sizes(slot, slots, 0, 0, 0)
        if gather == "never" and kv.wire_dtype:
            raise ValueError(
                f"gather='never' cannot send KV as {kv.wire_dtype}: use 'auto', or no wire_dtype"
            )
        if gather == "never" and not pool_bytes:
            raise ValueError("gather='never' needs the KV pool in the CPU's memory: use 'auto'")
        direct = gather == "never" or (
            gather == "auto" and not kv.wire_dtype and len(kv_heads(kv, rank)) == 1
        )
        gathered = 0 if gather == "never" else -(-buffers * slot // _PAGE) * _PAGE
        return Sizes(slot, 0, buffers, gathered, pool_bytes if direct else 0)
