"""Why a request was sent where it was, asked of a router over both doors; and the file it leaves."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import httpx
import pytest

from baton.v1 import inference_pb2 as api
from router.decision_file import read
from router.explain import replay, same
from router.policies import find
from tests.router.test_dispatch import HandWorker
from tests.router.test_metrics import _answer, deployed


async def test_a_decision_is_explained_over_both_doors_and_written(tmp_path: Path) -> None:
    log = tmp_path / "decisions.log"
    async with deployed(tmp_path / "model", HandWorker(_answer), decision_log=str(log), policy="cost") as at:
        await at.ask(request_id="asked", text="the quick brown fox", ttft_ms=300)
        told = await at.decisions.Explain(api.ExplainRequest(request_id="asked"), timeout=10)
        assert (told.request_id, told.policy) == ("asked", "cost")
        assert 0 < told.ttft_target_s <= 0.3, "what was left of it when it was decided"
        assert told.decode_worker == "decode-0" and told.reason.startswith("local")
        assert [one.chosen for one in told.candidates] == [True]
        assert told.outcome.outcome == "length" and told.outcome.ttft_s > 0
        with pytest.raises(grpc.aio.AioRpcError, match="remembers no request 'other'") as refused:
            await at.decisions.Explain(api.ExplainRequest(request_id="other"), timeout=10)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        async with httpx.AsyncClient(base_url=f"http://{at.http}") as http:
            body = (await http.get("/decisions/asked")).json()
            assert body["view_digest"] == told.view_digest
            assert body["candidates"][0]["decode_worker"] == "decode-0"
            missing = await http.get("/decisions/other")
            assert missing.status_code == 404 and "other" in missing.json()["error"]["message"]
    (record,) = read(log)
    assert record.outcome is not None and record.outcome.generated_tokens == 4
    assert record.view_digest == told.view_digest
    ((_, again),) = replay([record], find(record.policy))
    assert same(record.decision, again)
