"""Who holds what in a worker, as operators ask for it: read from the role between two steps, and put on the wire.

The step loop calls `read`, the shell `told`. Nothing here runs unless somebody asks.
"""

from __future__ import annotations

import math
from operator import attrgetter

import msgspec

from baton.v1 import inference_pb2 as api
from engine.ledger import LedgerError
from worker.messages import LeaseEntry, LedgerRead, OwnerEntry, ReadLedger
from worker.role import Role
from worker.spec import WorkerSpec

OLDEST = 16  # owners and leases that are told of, unless asked otherwise
MOST = 4096  # at most, so that an answer fits into a message


def read(role: Role, ask: ReadLedger, now: float) -> LedgerRead:
    """Costs what is held; the scan of all blocks is made only at rest, when it holds nobody up."""
    broken = ""
    if role.at_rest:
        try:
            role.check()
        except LedgerError as error:
            broken = str(error)
    owners = sorted((owner for owner in role.owners() if owner.blocks), key=attrgetter("since"))
    leases = sorted(role.leases(), key=attrgetter("since"))
    return LedgerRead(
        call=ask.call,
        counts=role.load().ledger,
        at_rest=role.at_rest,
        checked=role.at_rest,
        broken=broken,
        owners=len(owners),
        oldest=[
            OwnerEntry(
                name=owner.name,
                kind=owner.kind,
                state=owner.state,
                blocks=len(owner.blocks),
                age_s=now - owner.since,
                left_s=None if owner.deadline == math.inf else owner.deadline - now,
            )
            for owner in owners[: ask.oldest]
        ],
        lease_count=len(leases),
        leases=[
            LeaseEntry(lease.peer, lease.handoff_id, lease.chunk, lease.slot, lease.state, now - lease.since)
            for lease in leases[: ask.oldest]
        ],
    )


def told(spec: WorkerSpec, found: LedgerRead, slot_bytes: int) -> api.WorkerLedger:
    """`slot_bytes`: of one slot, over all ranks."""
    return api.WorkerLedger(
        worker_id=spec.worker_id,
        role=spec.role,
        incarnation=spec.incarnation,
        counts=api.Ledger(**msgspec.structs.asdict(found.counts)),
        at_rest=found.at_rest,
        checked=found.checked,
        broken=found.broken,
        owners=found.owners,
        oldest=[api.BlockOwner(**msgspec.structs.asdict(owner)) for owner in found.oldest],
        lease_count=found.lease_count,
        leases=[api.HeldLease(**msgspec.structs.asdict(lease)) for lease in found.leases],
        quarantined_bytes=found.counts.slots_quarantined * slot_bytes,
    )
