"""The router puts the workers' ledgers together; one that does not answer is told of, and holds nobody up."""

from __future__ import annotations

from typing import Any

import pytest

from baton import rpc
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2_grpc
from cluster import status_view
from router.ledgers import Ledgers

TOKEN = "a token"


class Worker(worker_pb2_grpc.WorkerServicer):
    async def ReadLedger(self, request: api.LedgerRequest, context: Any) -> api.WorkerLedger:
        counts = api.Ledger(blocks_free=7, blocks_held=3, blocks_total=10, slots_quarantined=1, slots_total=1)
        owner = api.BlockOwner(name="r[1]", kind="request", state="decoding", blocks=3, age_s=1.5)
        lease = api.HeldLease(peer="p1", handoff_id=4, chunk=2, slot=0, state="quarantined", age_s=9.0)
        return api.WorkerLedger(
            worker_id="decode-0",
            role="decode",
            counts=counts,
            owners=request.oldest,
            oldest=[owner],
            lease_count=1,
            leases=[lease],
            quarantined_bytes=3 << 20,
        )


@pytest.fixture
async def answer() -> api.LedgerResponse:
    server = rpc.server(TOKEN)
    worker_pb2_grpc.add_WorkerServicer_to_server(Worker(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        workers = [
            api.WorkerStatus(worker_id="prefill-0", role="prefill", address="127.0.0.1:1"),
            api.WorkerStatus(worker_id="decode-0", role="decode", address=f"127.0.0.1:{port}"),
        ]
        return await Ledgers(lambda: workers, TOKEN).Read(api.LedgerRequest(oldest=5), None)
    finally:
        await server.stop(None)


async def test_all_workers_answer_or_are_named(answer: api.LedgerResponse) -> None:
    found, silent = answer.workers
    assert (found.worker_id, found.owners, found.oldest[0].blocks) == ("decode-0", 5, 3)
    assert silent.worker_id == "prefill-0" and silent.unreachable.startswith("UNAVAILABLE")


async def test_it_is_shown(answer: api.LedgerResponse, capsys: pytest.CaptureFixture[str]) -> None:
    status_view.show(api.StatusResponse(router="router-0"), answer)
    shown = capsys.readouterr().out
    assert "prefill-0 did not answer: UNAVAILABLE" in shown
    assert "decode-0: 5 hold blocks, the 1 oldest" in shown and "r[1]" in shown
    assert "1 slots in use; 3.0 MiB quarantined" in shown
    broken = api.WorkerLedger(worker_id="decode-1", broken="block 3 has 0 owners, the books say 1")
    status_view.show(api.StatusResponse(), api.LedgerResponse(workers=[broken]))
    shown = capsys.readouterr().out
    assert "BROKEN" in shown and "block 3 has 0 owners" in shown
