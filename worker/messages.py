"""What a worker's shell and its rank process say over their ring. Pure structs; MessagePack on the ring."""

from __future__ import annotations

import msgspec

from engine.api import Cancel, KvEvents, LedgerCounts, Load, RequestEnd, StepOutput, Submit
from kvtransfer.messages import ControlMessage, Hello


class PeerUp(msgspec.Struct, frozen=True, tag=True):
    """A control stream is open and the peer has said hello on it."""

    hello: Hello


class PeerLost(msgspec.Struct, frozen=True, tag=True):
    """The control stream of `epoch` with this incarnation broke: its leases are over."""

    peer: str
    epoch: int


class FromPeer(msgspec.Struct, frozen=True, tag=True):
    peer: str
    epoch: int
    message: ControlMessage


class SessionLost(msgspec.Struct, frozen=True, tag=True):
    """A router's stream broke: nobody waits for its requests any more."""

    session: int


class ToPeer(msgspec.Struct, frozen=True, tag=True):
    peer: str
    epoch: int
    message: ControlMessage


class PeerRefused(msgspec.Struct, frozen=True, tag=True):
    """KV cannot be exchanged with this peer, and why (both values are named)."""

    peer: str
    reason: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine has loaded its model; `hello` is what the shell says to peers (with an epoch of its own)."""

    hello: Hello
    blocks: int
    pids: list[int]  # of the ranks' processes


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on; the worker ends with this reason."""

    reason: str


class ReadLedger(msgspec.Struct, frozen=True, tag=True):
    """Somebody wants to know who holds what; `call` names the answer."""

    call: int
    oldest: int


class OwnerEntry(msgspec.Struct, frozen=True):
    """See `worker.role.Owner`. `left_s` None: no deadline of its own."""

    name: str
    kind: str
    state: str
    blocks: int
    age_s: float
    left_s: float | None


class LeaseEntry(msgspec.Struct, frozen=True):
    """See `worker.role.HeldLease`."""

    peer: str
    handoff_id: int
    chunk: int
    slot: int
    state: str
    age_s: float


class LedgerRead(msgspec.Struct, frozen=True, tag=True):
    """The answer to `ReadLedger`. `checked`: at rest, so every block was looked at; `broken`: what was wrong."""

    call: int
    counts: LedgerCounts
    at_rest: bool
    checked: bool
    broken: str
    owners: int
    oldest: list[OwnerEntry]
    lease_count: int
    leases: list[LeaseEntry]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish the step, check the ledger, end."""


ToEngine = Submit | Cancel | SessionLost | PeerUp | PeerLost | FromPeer | ReadLedger | Shutdown
FromEngine = Ready | StepOutput | RequestEnd | Load | KvEvents | ToPeer | PeerRefused | LedgerRead | Fatal
