"""What a decode and a prefill worker say to each other, and what a role asks of its mover: plain structs.

The control messages mirror `proto/baton/v1/worker.proto`, where the fields are documented; `kvtransfer.wire`
converts. Jobs and reports go between a role (pure) and the mover thread of its process. Durations travel, never
timestamps.
"""

from __future__ import annotations

import msgspec

PROTOCOL = 1


class KvGroup(msgspec.Struct, frozen=True):
    """Layers whose KV is of one kind: "full", or "window" with attention to the last `window` tokens only."""

    kind: str
    layers: tuple[int, ...]
    window: int = 0


class KvSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What both sides must agree on before KV is moved (block sizes may differ)."""

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_size: int
    chunk_tokens: int
    groups: tuple[KvGroup, ...] = ()  # cover each layer once; () is one group of all layers, "full"

    @property
    def token_bytes(self) -> int:
        """Bytes of KV of one token, all layers, keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Hello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    worker_id: str
    incarnation: str
    kv: KvSpec
    transport: str
    endpoint: bytes
    epoch: int = 0
    protocol: int = PROTOCOL
    release: str = ""
    capabilities: list[str] = []
    slot_count: int = 0
    slot_bytes: int = 0


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """The right to write chunk `chunk` of one hand-off into slot `slot`, for `deadline_s` from receipt."""

    lease_id: int
    epoch: int
    chunk: int
    slot: int
    deadline_s: float


class Linked(msgspec.Struct, frozen=True, tag=True):
    """The prefill worker's transport can write into the decode worker's slots: hand-offs may begin."""


class Begin(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    handoff_id: int
    request_id: str
    tokens: list[int]
    start: int
    deadline_s: float
    salt: str = ""
    priority: int = 0  # less is more urgent


class Credit(msgspec.Struct, frozen=True, tag=True):
    handoff_id: int
    leases: list[Lease]


class Abort(msgspec.Struct, frozen=True, tag=True):
    handoff_id: int
    reason: str


class ChunkDone(msgspec.Struct, frozen=True, tag=True):
    handoff_id: int
    lease_id: int
    epoch: int
    chunk: int
    size_bytes: int
    digest: bytes


class Done(msgspec.Struct, frozen=True, tag=True):
    handoff_id: int
    cached_tokens: int
    queue_s: float
    compute_s: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    handoff_id: int
    reason: str


class Quiet(msgspec.Struct, frozen=True, tag=True):
    """No write of this hand-off (0: of any hand-off of epochs up to `epoch`) is in flight, none will be posted."""

    handoff_id: int
    epoch: int


ControlMessage = Hello | Linked | Begin | Credit | Abort | ChunkDone | Done | Failed | Quiet


# ---- jobs for the mover and its reports ------------------------------------------------------------------------


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Make `peer` (an incarnation) reachable; answered by `Connected`."""

    peer: str
    endpoint: bytes


class Disconnect(msgspec.Struct, frozen=True, tag=True):
    """Forget `peer` once nothing is in flight to it."""

    peer: str


class SendChunk(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Gather tokens first_token .. first_token+tokens-1 of `blocks` (the sequence's block ids from the block that
    holds position `blocks_start` on) into the wire layout, digest them with `seed`, write them into the peer's slot.

    When the write has settled well, `ChunkDone` leaves at once on the control stream (from the mover's thread, so
    that a long step does not hold it up) and `Sent` is reported to the role.
    """

    peer: str
    handoff_id: int
    lease: Lease
    blocks: list[int]
    blocks_start: int
    first_token: int
    tokens: int
    seed: int


class CopyOut(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Copy a landed chunk out of `slot`, verify the digest of the copy, scatter it into `blocks`; gives `Copied`."""

    handoff_id: int
    lease_id: int
    slot: int
    blocks: list[int]
    blocks_start: int
    first_token: int
    tokens: int
    seed: int
    size_bytes: int
    digest: bytes


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Is `peer` certainly gone, with nothing of it still to arrive? Reported by `Probed`."""

    peer: str


MoverJob = Connect | Disconnect | SendChunk | CopyOut | Probe


class Connected(msgspec.Struct, frozen=True, tag=True):
    peer: str
    error: str = ""


class Sent(msgspec.Struct, frozen=True, tag=True):
    """The write of one chunk has settled: its source blocks and its lease are no longer in use."""

    peer: str  # hand-off ids are unique for each decode incarnation only
    handoff_id: int
    lease_id: int
    chunk: int
    size_bytes: int
    error: str = ""


class Copied(msgspec.Struct, frozen=True, tag=True):
    handoff_id: int
    lease_id: int
    verified: bool


class Probed(msgspec.Struct, frozen=True, tag=True):
    peer: str
    gone: bool


MoverReport = Connected | Sent | Copied | Probed
