"""/metrics of a whole router over real sockets, before a worker made by hand; and what the numbers mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton import rpc
from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc, worker_pb2_grpc
from baton.v1 import worker_pb2 as pb
from router.account import Account
from router.metrics import Histogram, RequestMetrics
from router.server import Router
from router.spec import RouterSpec
from tests.router.echo import byte_level_tokenizer, until, write_model
from tests.router.test_dispatch import TOKEN, HandWorker

STATUS = api.WorkerStatus(
    worker_id="decode-0",
    role="decode",
    alive=True,
    step=41,
    running=3,
    waiting=2,
    waiting_tokens=100,
    handoffs=1,
    ledger=api.Ledger(
        blocks_free=5, blocks_cached=4, blocks_held=3, blocks_landing=2, blocks_total=14, slots_free=6,
        slots_leased=1, slots_quarantined=1, slots_total=8,
    ),
    counters={"fallbacks": 7, "preemptions": 0},
)  # fmt: skip
TRACE = api.Trace(
    cached_tokens=16, remote_tokens=32, handoff_bytes=4096, queue_s=0.03, handoff_s=0.25, ttft_s=0.3
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scraped:
    """One scrape; `scraped("name", label="value")` is a sample."""

    def __init__(self, text: str) -> None:
        self.types = {}
        self.samples: Samples = {}
        for family in text_string_to_metric_families(text):
            self.types[family.name] = family.type
            for sample in family.samples:
                at = sample.name, frozenset(sample.labels.items())
                assert at not in self.samples, f"{at} twice"
                self.samples[at] = sample.value

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))


class Deployment:
    def __init__(self, router: Router, worker: HandWorker, http: str, channel: Any) -> None:
        self.router = router
        self.worker = worker
        self.http = http
        self.stub = inference_pb2_grpc.InferenceStub(channel)
        self.decisions = inference_pb2_grpc.DecisionsStub(channel)

    async def scrape(self, accept: str = "") -> Scraped:
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://{self.http}/metrics", headers={"accept": accept})
        assert answer.status_code == 200
        return Scraped(answer.text)

    async def ask(self, **request: Any) -> list[api.GenerateResponse]:
        call = self.stub.Generate(api.GenerateRequest(**request), timeout=10)
        return [response async for response in call]


@asynccontextmanager
async def deployed(folder: Path, worker: HandWorker, **settings: Any) -> AsyncIterator[Deployment]:
    write_model(folder, byte_level_tokenizer())
    server = rpc.server(TOKEN)
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    spec = RouterSpec(
        token=TOKEN,
        http="127.0.0.1:0",
        grpc="127.0.0.1:0",
        model_path=str(folder),
        served_name="m",
        max_model_len=200,
        restarts=2,
        **{"policy": "threshold", "local_below_tokens": 8, **settings},
    )
    router = Router(spec)
    started = await router.start()
    members = [
        pb.Member(
            worker_id="decode-0", role="decode", incarnation="i", address=f"127.0.0.1:{port}", restarts=3
        ),
        pb.Member(worker_id="prefill-0", role="prefill", incarnation="j", address="127.0.0.1:9"),
    ]
    await router.dispatcher.SetMembers(pb.Members(version=1, members=members), None)
    await until(lambda: router.dispatcher.ready, 20)
    try:
        async with grpc.aio.insecure_channel(started.grpc) as channel:
            yield Deployment(router, worker, started.http, channel)
    finally:
        await router.stop()
        await server.stop(None)


def _answer(submit: pb.Submit) -> list[pb.FromWorker]:
    """Four tokens in three messages; the third carries two."""
    key = submit.key
    entries = [
        pb.TokenEntry(key=key, first_index=at, ids=ids) for at, ids in ((0, [9]), (1, [10]), (2, [11, 12]))
    ]
    end = pb.RequestEnd(key=key, reason="length", trace=TRACE)
    return [
        *(pb.FromWorker(tokens=[entry]) for entry in entries),
        pb.FromWorker(ends=[end], status=STATUS, step=41),
    ]


async def test_a_request_is_counted(tmp_path: Path) -> None:
    async with deployed(tmp_path, HandWorker(_answer)) as one:
        before = await one.scrape()
        assert before("baton_prompt_tokens_total") == 0
        assert before("baton_requests_total", outcome="length") is None
        for _ in range(2):
            await one.ask(token_ids=api.TokenIds(ids=[1, 2, 3]))
        now = await one.scrape()
        assert now("baton_requests_total", outcome="length") == 2
        assert now("baton_decisions_total", kind="local", reason="short") == 2
        assert now("baton_prompt_tokens_total") == 6
        assert now("baton_generation_tokens_total") == 8
        assert now("baton_cached_prompt_tokens_total") == 32
        assert now("baton_remote_prompt_tokens_total") == 64
        assert now("baton_handoff_bytes_total") == 8192
        for name, count in {
            "time_to_first_token": 2,
            "inter_token_latency": 6,
            "e2e_request_latency": 2,
            "request_queue_time": 2,
            "handoff": 2,
        }.items():
            assert now.types[f"baton_{name}_seconds"] == "histogram"
            assert now(f"baton_{name}_seconds_count") == count
            assert now(f"baton_{name}_seconds_bucket", le="+Inf") == count
        assert now("baton_request_queue_time_seconds_bucket", le="0.02") == 0
        assert now("baton_request_queue_time_seconds_bucket", le="0.05") == 2
        assert now("baton_handoff_seconds_sum") == pytest.approx(0.5)


async def test_every_end_has_an_outcome(tmp_path: Path) -> None:
    def script(submit: pb.Submit) -> list[pb.FromWorker]:
        ends = {1: ("no_room", False), 2: ("error", False), 3: ("", False), 4: ("stop", True)}
        reason, trace = ends[submit.prompt[0]]
        if not reason:
            return [pb.FromWorker(tokens=[pb.TokenEntry(key=submit.key, first_index=0, ids=[9])])]
        return [
            pb.FromWorker(ends=[pb.RequestEnd(key=submit.key, reason=reason, trace=TRACE if trace else None)])
        ]

    async with deployed(tmp_path, HandWorker(script)) as one:
        for first in (1, 2):
            with pytest.raises(grpc.aio.AioRpcError):
                await one.ask(token_ids=api.TokenIds(ids=[first]))
        with pytest.raises(grpc.aio.AioRpcError):
            await one.ask(text="x", sampling=api.SamplingParams(top_p=2.0))
        with pytest.raises(grpc.aio.AioRpcError):
            await one.ask(text="x", model="another")
        await one.ask(token_ids=api.TokenIds(ids=[4]))
        call = one.stub.Generate(api.GenerateRequest(token_ids=api.TokenIds(ids=[3])), timeout=10)
        await call.read()
        assert (await one.scrape())("baton_active_requests") == 1
        call.cancel()
        await until(lambda: not one.router.dispatcher.active)
        await until(lambda: one.router.dispatcher.metrics.outcomes["cancelled"] == 1)
        now = await one.scrape()
        for outcome in ("no_room", "internal", "invalid", "not_found", "stop", "cancelled"):
            assert now("baton_requests_total", outcome=outcome) == 1, outcome
        assert now("baton_e2e_request_latency_seconds_count") == 1, "only of whole answers"
        assert now("baton_prompt_tokens_total") == 4, "of those that reached a worker"


async def test_a_cancelled_request_still_counts_what_its_worker_did(tmp_path: Path) -> None:
    """A stop string ends the answer here before the worker knows; its trace comes later."""
    worker = HandWorker(lambda s: [pb.FromWorker(tokens=[pb.TokenEntry(key=s.key, first_index=0, ids=[9])])])
    async with deployed(tmp_path, worker) as one:
        call = one.stub.Generate(api.GenerateRequest(text="x"), timeout=10)
        await call.read()
        call.cancel()
        await until(lambda: bool(worker.cancels))
        end = pb.RequestEnd(key=worker.cancels[0], reason="cancelled", trace=TRACE)
        worker._outbox.put_nowait(pb.FromWorker(ends=[end]))
        await until(lambda: one.router.dispatcher.metrics.handoff_bytes == 4096)


async def test_workers_as_they_last_reported(tmp_path: Path) -> None:
    async with deployed(tmp_path, HandWorker(_answer)) as one:
        await one.ask(text="x")
        now = await one.scrape()
        decode = {"worker": "decode-0", "role": "decode"}
        assert now("baton_worker_up", **decode) == 1
        assert now("baton_worker_up", worker="prefill-0", role="prefill") == 0
        assert now("baton_worker_restarts_total", **decode) == 3
        assert now("baton_worker_steps_total", **decode) == 41
        gauges = {"running": 3, "waiting": 2, "waiting_tokens": 100, "handoffs": 1}
        assert {name: now(f"baton_worker_{name}", **decode) for name in gauges} == gauges
        blocks = {"free": 5, "cached": 4, "held": 3, "landing": 2}
        assert {s: now("baton_worker_kv_blocks", **decode, state=s) for s in blocks} == blocks
        slots = {"free": 6, "leased": 1, "quarantined": 1}
        assert {s: now("baton_worker_landing_slots", **decode, state=s) for s in slots} == slots
        assert now("baton_worker_fallbacks_total", **decode) == 7
        assert now.types["baton_worker_fallbacks"] == "counter"
        assert now("baton_worker_running", worker="prefill-0", role="prefill") is None, (
            "nothing is known of it"
        )
        assert now("baton_router_restarts_total") == 2
        (build,) = (labels for name, labels in now.samples if name == "baton_build_info")
        assert {"model", "policy", "release", "router"} == {name for name, _ in build}
        assert now("process_resident_memory_bytes")


async def test_every_metric_is_documented(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    async with deployed(tmp_path, HandWorker(_answer)) as one:
        await one.ask(text="x")
        for name, kind in (await one.scrape()).types.items():
            counted = name.startswith("baton_worker_") and name.rpartition("_")[2] in (
                "fallbacks",
                "preemptions",
            )
            if counted:
                assert f"`{name.removeprefix('baton_worker_')}`" in page
            elif name.startswith("baton_worker_") and kind == "gauge":
                assert f"`{name}`" in page or f"`{name.removeprefix('baton_worker')}`" in page, name
            elif name.startswith("baton_"):
                assert f"`{name}{'_total' * (kind == 'counter')}`" in page, name


async def test_openmetrics_is_spoken_too(tmp_path: Path) -> None:
    async with deployed(tmp_path, HandWorker(_answer)) as one, httpx.AsyncClient() as client:
        answer = await client.get(
            f"http://{one.http}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
        )
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert answer.text.endswith("# EOF\n")
        plain = await client.get(f"http://{one.http}/metrics")
        assert plain.headers["content-type"].startswith("text/plain")


def test_two_routers_in_one_process_share_nothing() -> None:
    one, other = RequestMetrics(), RequestMetrics()
    one.whole.observe(1.0)
    assert not sum(other.whole.counts)


def test_histogram() -> None:
    histogram = Histogram((0.1, 1.0))
    for value, times in ((0.05, 1), (0.1, 1), (0.5, 3), (7.0, 1)):
        histogram.observe(value, times)
    (family,) = [histogram.family("h", "")]
    values = {(sample.name, sample.labels.get("le")): sample.value for sample in family.samples}
    assert values == {
        ("h_bucket", "0.1"): 2,  # a bound belongs to its bucket
        ("h_bucket", "1.0"): 5,
        ("h_bucket", "+Inf"): 6,
        ("h_count", None): 6,
        ("h_sum", None): pytest.approx(8.65),
    }


def test_time_between_tokens_is_shared_out_and_kept_by_choice() -> None:
    metrics = RequestMetrics()
    account = Account(arrived=10.0)
    for choice, count, now in ((0, 1, 11.0), (1, 1, 11.0), (0, 2, 11.3), (1, 1, 11.4)):
        metrics.tokens(account, choice, count, now)
    assert metrics.first_token.total == pytest.approx(1.0) and sum(metrics.first_token.counts) == 1
    assert sum(metrics.between_tokens.counts) == 3
    assert metrics.between_tokens.total == pytest.approx(0.3 + 0.4)
    assert metrics.between_tokens.counts[metrics.between_tokens.bounds.index(0.2)] == 2, "0.15 s each"
    assert account.generated_tokens == 5


async def test_the_end_is_told_once() -> None:
    told: list[str] = []
    for error in (None, GeneratorExit(), asyncio.CancelledError(), ValueError("x")):
        try:
            with Account("r", lambda account: told.append(account.outcome)):
                if error is not None:
                    raise error
        except BaseException as raised:
            assert raised is error
    assert told == ["cancelled", "cancelled", "cancelled", "internal"]
