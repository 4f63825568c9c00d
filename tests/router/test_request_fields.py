"""Fields of a request that are not sampling: they reach the dispatcher from both doors, within limits."""

from __future__ import annotations

import pytest

from baton.v1 import inference_pb2 as api
from router.call import GenerateCall, check_sampling
from router.dispatch_api import Refused
from router.grpc_door import _call
from router.http_bodies import CompletionBody, parse


def test_priority_and_cache_salt_over_both_doors() -> None:
    over_grpc = _call(api.GenerateRequest(text="x", priority=-3, cache_salt="tenant"))
    body = parse(CompletionBody, b'{"prompt": "x", "priority": -3, "cache_salt": "tenant"}')
    (over_http,) = body.calls("r")
    for call in (over_grpc, over_http):
        assert (call.priority, call.salt) == (-3, "tenant")
    (absent,) = parse(CompletionBody, b'{"prompt": "x"}').calls("r")
    assert (absent.priority, absent.salt) == (0, "")


def test_targets_over_both_doors() -> None:
    over_grpc = _call(api.GenerateRequest(text="x", ttft_ms=300, itl_ms=20))
    (over_http,) = parse(CompletionBody, b'{"prompt": "x", "ttft_ms": 300, "itl_ms": 20}').calls("r")
    for call in (over_grpc, over_http):
        assert (call.ttft_ms, call.itl_ms) == (300, 20)
    assert (_call(api.GenerateRequest(text="x")).ttft_ms, GenerateCall().itl_ms) == (None, None)


@pytest.mark.parametrize("field", ["ttft_ms", "itl_ms", "deadline_ms"])
@pytest.mark.parametrize("value", [0, -5, 10**9])
def test_a_target_out_of_bounds_is_named(field: str, value: int) -> None:
    with pytest.raises(Refused, match=f"{field} must be between 1 and") as refused:
        check_sampling(GenerateCall(**{field: value}), 100)  # type: ignore[arg-type]
    assert refused.value.param == field


@pytest.mark.parametrize(
    "call",
    [
        GenerateCall(priority=1001),
        GenerateCall(priority=-1001),
        GenerateCall(salt="s" * 257),
        GenerateCall(user="u" * 257),
    ],
)
def test_limits_are_named(call: GenerateCall) -> None:
    with pytest.raises(Refused, match="priority|cache_salt|user") as refused:
        check_sampling(call, 100)
    assert refused.value.param in ("priority", "cache_salt", "user")
