"""The decode worker's rank process: `python -m decode.rank ARGUMENTS` (started by its shell)."""

from __future__ import annotations

from decode.role import DecodeRole
from engine.ledger import BlockLedger, SlotLedger
from engine.scheduler import Limits
from kvtransfer.messages import Hello
from worker.rank import main
from worker.role import Role
from worker.spec import WorkerSpec


def make_role(spec: WorkerSpec, hello: Hello, blocks: BlockLedger, limits: Limits) -> Role:
    return DecodeRole(
        hello,
        blocks,
        SlotLedger(spec.slots),
        limits,
        max_waiting=spec.max_waiting,
        handoff_timeout_s=spec.handoff_timeout_s,
    )


if __name__ == "__main__":
    main(make_role)
