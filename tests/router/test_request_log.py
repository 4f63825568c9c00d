"""The one line that each request leaves in the router's log, for people and for machines."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc
from engine.api import Trace
from router.account import Account
from router.dispatch_api import RefusalKind, Refused
from router.policy import Decision
from router.request_log import JsonFormatter, RequestLine
from router.spec import RouterSpec, RouterStarted
from tests.router.echo import byte_level_tokenizer, write_model

TRACE = Trace(
    prefilled="mixed",
    prefill_worker="prefill-0",
    cached_tokens=16,
    remote_tokens=32,
    handoff_bytes=4096,
    queue_s=0.0300001,
    handoff_s=0.25,
    prefill_s=0.01,
    ttft_s=0.3,
    decode_s=1.5,
    fallback="lost prefill-0",
)


def _finished() -> Account:
    decision = Decision("decode-0", "prefill-0", "remote: 60 tokens >= 8", 8, "long")
    account = Account(
        "r1", arrived=10.0, prompt_tokens=61, generated_tokens=7, decision=decision, trace=TRACE
    )
    account.outcome, account.first_token, account.ended = "stop", 10.5, 12.0
    return account


def _refused() -> Account:
    account = Account("r2", arrived=10.0)
    try:
        with account:
            raise Refused(RefusalKind.INVALID, "top_p must be above 0", param="top_p")
    except Refused:
        return account


def _json(message: object, **record: Any) -> dict[str, Any]:
    made = logging.LogRecord("baton.requests", logging.INFO, __file__, 1, message, (), record.get("exc_info"))
    line = JsonFormatter("router-7").format(made)
    assert "\n" not in line
    told: dict[str, Any] = json.loads(line)
    return told


def test_a_finished_request_for_machines() -> None:
    told = _json(RequestLine(_finished()))
    assert told.pop("time").endswith("+00:00")
    assert told == {
        "level": "INFO",
        "logger": "baton.requests",
        "router": "router-7",
        "event": "request",
        "request_id": "r1",
        "outcome": "stop",
        "detail": "",
        "decision": "remote: 60 tokens >= 8",
        "decode_worker": "decode-0",
        "prefill_worker": "prefill-0",
        "prefilled": "mixed",
        "fallback": "lost prefill-0",
        "prompt_tokens": 61,
        "cached_tokens": 16,
        "remote_tokens": 32,
        "generated_tokens": 7,
        "handoff_bytes": 4096,
        "e2e_s": 2.0,
        "ttft_s": 0.5,
        "queue_s": 0.03,
        "handoff_s": 0.25,
        "prefill_s": 0.01,
        "decode_s": 1.5,
    }


def test_a_refused_request_for_machines() -> None:
    told = _json(RequestLine(_refused()))
    assert (told["request_id"], told["outcome"], told["detail"]) == ("r2", "invalid", "top_p must be above 0")
    unknown = ("decision", "decode_worker", "prefilled", "cached_tokens", "queue_s", "ttft_s")
    assert all(told[name] is None for name in unknown)


def test_other_records_are_json_too() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        told = _json("it broke", exc_info=sys.exc_info())
    assert told["message"] == "it broke" and "ValueError: broken" in told["exception"]


def test_for_people() -> None:
    line = str(RequestLine(_finished()))
    assert line == (
        "request r1: stop; 61 + 7 tokens; 2.000 s; TTFT 0.500 s; on decode-0, remote: 60 tokens >= 8; "
        "16 cached, 32 handed off in 0.250 s; fell back: lost prefill-0"
    )
    assert str(RequestLine(_refused())).endswith("top_p must be above 0")


def test_a_client_cannot_write_lines_of_its_own() -> None:
    account = _refused()
    account.request_id = "x\nrequest r9: stop\x1b[2J" + 1000 * "y"
    account.detail = "the model 'a\r\nb' does not exist"
    line = str(RequestLine(account))
    assert line.isprintable() and len(line) < 400
    assert _json(RequestLine(account))["request_id"] == account.request_id[:128]


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_a_router_process_logs_to_standard_error(tmp_path: Path, log_format: str) -> None:
    """Nothing but RouterStarted comes on standard output; without a worker the request is refused."""
    write_model(tmp_path, byte_level_tokenizer())
    spec = RouterSpec(
        token="t",
        http="127.0.0.1:0",
        grpc="127.0.0.1:0",
        model_path=str(tmp_path),
        served_name="m",
        max_model_len=100,
        log_format=log_format,  # type: ignore[arg-type]
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(spec) + b"\n")
        started = msgspec.json.decode(
            await asyncio.wait_for(process.stdout.readline(), 60), type=RouterStarted
        )
        async with grpc.aio.insecure_channel(started.grpc) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                request = api.GenerateRequest(text="x", request_id="r1")
                await inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=20).read()
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        process.stdin.close()
        out, err = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
    assert out == b""
    (line,) = [line for line in err.decode().splitlines() if "r1" in line]
    if log_format == "json":
        told = json.loads(line)
        assert (told["event"], told["request_id"], told["outcome"]) == ("request", "r1", "unavailable")
        assert told["router"] == "router-0"
    else:
        assert "router-0 INFO request r1: unavailable; 2 + 0 tokens" in line
