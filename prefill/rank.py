"""The prefill worker's rank process: `python -m prefill.rank ARGUMENTS` (started by its shell)."""

from __future__ import annotations

from engine.ledger import BlockLedger
from engine.scheduler import Limits
from kvtransfer.messages import Hello
from prefill.role import PrefillRole
from worker.rank import main
from worker.role import Role
from worker.spec import WorkerSpec


def make_role(spec: WorkerSpec, hello: Hello, blocks: BlockLedger, limits: Limits) -> Role:
    return PrefillRole(hello, blocks, limits, max_waiting=spec.max_waiting, min_bandwidth=spec.min_bandwidth)


if __name__ == "__main__":
    main(make_role)
