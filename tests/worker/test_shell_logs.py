"""What a worker's shell logs names the request, and what it remembers for that is forgotten with the request."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from engine.api import RequestEnd, RequestKey, StepOutput, Submit, Trace
from kvtransfer.messages import Begin, Done, Failed, Quiet
from prefill.shell import PrefillShell
from worker.messages import PeerLost, ToPeer
from worker.sessions import SessionOutbox, WorkerService
from worker.spec import WorkerSpec

Log = pytest.LogCaptureFixture


def _service() -> tuple[WorkerService, list[Any]]:
    sent: list[Any] = []
    spec = WorkerSpec(role="decode", worker_id="decode-0", incarnation="i", token="t", model_path="")
    return WorkerService(spec, sent.append, api.WorkerStatus), sent


def _submit(service: WorkerService, sent: list[Any], key: int) -> RequestKey:
    service._submit(SessionOutbox(1), pb.Submit(key=key, request_id=f"r{key}", prompt=[1, 2]))
    assert isinstance(sent[-1], Submit)
    return sent[-1].request


def test_a_failed_handoff_is_logged_with_its_request(caplog: Log) -> None:
    service, sent = _service()
    good, bad = _submit(service, sent, 1), _submit(service, sent, 2)
    trace = Trace(prefill_worker="prefill-0", remote_tokens=256, fallback="lost prefill-0")
    service.step_output(
        StepOutput(1, [], [RequestEnd(good, "stop", trace=Trace()), RequestEnd(bad, "stop", trace=trace)])
    )
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "request r2: the hand-off from prefill-0 failed, 256 of its prompt tokens came: lost prefill-0"
    )
    assert not service._request_ids


def test_a_choice_that_ends_is_not_the_request(caplog: Log) -> None:
    service, sent = _service()
    key = _submit(service, sent, 1)
    service.request_end(RequestEnd(key, "stop", more=1))
    service.request_end(RequestEnd(key, "error", "out of luck"))
    (record,) = caplog.records
    assert record.getMessage() == "request r1 failed: out of luck"
    assert not service._request_ids


class Links:
    """In the place of the streams to decode workers."""

    links: Any

    def __init__(self) -> None:
        self.links = self
        self.said: list[Any] = []

    def send(self, peer: str, epoch: int, message: Any) -> None:
        self.said.append(message)


def _prefill() -> tuple[PrefillShell, list[Any]]:
    spec = WorkerSpec(role="prefill", worker_id="prefill-0", incarnation="i", token="t", model_path="")
    shell = PrefillShell(spec)
    shell._handoffs = Links()  # type: ignore[assignment]
    sent: list[Any] = []
    shell.send = sent.append  # type: ignore[method-assign, assignment]
    return shell, sent


def _begin(shell: PrefillShell, handoff: int, *, peer: str = "d", epoch: int = 1) -> None:
    begin = Begin(handoff_id=handoff, request_id=f"r{handoff}", tokens=[1], start=0, deadline_s=1.0, salt="")
    shell._message(peer, epoch, begin)


def test_a_prefill_worker_names_the_request_that_it_fails(caplog: Log) -> None:
    shell, sent = _prefill()
    for handoff in (1, 2, 3):
        _begin(shell, handoff)
    shell.to_peer(ToPeer("d", 1, Failed(1, "short of KV blocks")))
    shell.to_peer(ToPeer("d", 1, Quiet(1, 1)))
    shell.to_peer(ToPeer("d", 1, Done(2, 0, 0.0, 0.0)))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "request r1: its hand-off failed: short of KV blocks"
    assert list(shell._request_ids.values()) == ["r3"]
    assert len(sent) == 3 and len(shell._handoffs.said) == 3  # type: ignore[attr-defined]


def test_a_lost_stream_takes_its_own_with_it() -> None:
    shell, sent = _prefill()
    _begin(shell, 1, epoch=1)
    _begin(shell, 2, epoch=2)  # the peer was quicker to dial again than we to notice the break
    _begin(shell, 3, peer="other")
    shell._lost("d", 1)
    assert list(shell._request_ids.values()) == ["r2", "r3"]
    assert sent[-1] == PeerLost("d", 1)
