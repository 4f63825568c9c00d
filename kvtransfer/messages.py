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
    """The KV of one worker, all its ranks together. What may differ between two that hand off, and how the hand-off
    is cut then, is for `kvtransfer.plan` to say."""

    model: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_size: int
    chunk_tokens: int  # the most that a landing slot (or a staging buffer) of this side holds
    tensor_parallel: int = 1
    wire_dtype: str = ""  # as KV crosses: "" = as stored, "int8", "fp8_e4m3"
    groups: tuple[KvGroup, ...] = ()  # cover each layer once; () is one group of all layers, "full"

    @property
    def token_bytes(self) -> int:
        """Bytes of KV of one token as stored, all layers and heads, keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Hello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    worker_id: str
    incarnation: str
    kv: KvSpec
    transport: str
    endpoints: list[bytes]  # by rank
    epoch: int = 0
    protocol: int = PROTOCOL
    release: str = ""
    capabilities: list[str] = []
    slot_count: int = 0  # of each rank; a lease on slot s is one on slot s of every rank
    slot_bytes: list[int] = []  # by rank


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
    size_bytes: int  # of all pieces
    digests: list[bytes]  # of each piece, in the order of the plan


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


# ---- jobs for the movers and their reports ---------------------------------------------------------------------
#
# A worker has one mover for each rank. Every job goes to all of them, each does its part of it, and their reports are
# joined to one (`kvtransfer.join`): roles never see ranks.


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Make the worker of this hello (its incarnation is the `peer` of what follows) reachable; gives `Connected`."""

    hello: Hello


class Disconnect(msgspec.Struct, frozen=True, tag=True):
    """Forget `peer` once nothing is in flight to it."""

    peer: str


class SendChunk(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Write the rank's pieces of tokens first_token .. first_token+tokens-1 into the slots of the peer's ranks.

    `blocks`: the sequence's block ids from the block that holds position `blocks_start` on. `seed` commits to the
    prefix; each piece's digest is seeded with it and with what the piece is. Gives `Sent` when all has settled.
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
    """Copy the rank's pieces of a landed chunk out of `slot`, verify the digests of the copy, scatter it into
    `blocks`; gives `Copied`. `peer` and `chunk` tell the plan."""

    peer: str
    handoff_id: int
    lease_id: int
    chunk: int
    slot: int
    blocks: list[int]
    blocks_start: int
    first_token: int
    tokens: int
    seed: int
    size_bytes: int
    digests: list[bytes]


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Is `peer` certainly gone, with nothing of it still to arrive? Reported by `Probed`."""

    peer: str


MoverJob = Connect | Disconnect | SendChunk | CopyOut | Probe


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """`latency_s`: from posting to settling 4 KiB, median. `bytes_per_s`: of the best large write. 0 with `error`."""

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    moved_bytes: int = 0
    error: str = ""

    @property
    def gb_per_s(self) -> float:
        return self.bytes_per_s / 1e9


class Connected(msgspec.Struct, frozen=True, tag=True):
    """`measured`: how fast this worker can write to it, by the slowest pair of ranks; None where it does not write."""

    peer: str
    error: str = ""
    measured: Measured | None = None
    devices: str = ""  # what moves the bytes, as far as the transport tells
    warning: str = ""  # what is wrong with these devices


class Sent(msgspec.Struct, frozen=True, tag=True):
    """The write of one chunk has settled: its source blocks and its lease are no longer in use."""

    peer: str  # hand-off ids are unique for each decode incarnation only
    handoff_id: int
    lease_id: int
    chunk: int
    size_bytes: int
    error: str = ""
    epoch: int = 0  # of the lease
    pieces: list[int] = []  # those of this rank, as indices into the plan's order
    digests: list[bytes] = []  # of each of `pieces`; after joining, of all pieces in order


class Copied(msgspec.Struct, frozen=True, tag=True):
    handoff_id: int
    lease_id: int
    verified: bool


class Probed(msgspec.Struct, frozen=True, tag=True):
    peer: str
    gone: bool


MoverReport = Connected | Sent | Copied | Probed
