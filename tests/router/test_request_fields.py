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


@pytest.mark.parametrize(
    "call", [GenerateCall(priority=1001), GenerateCall(priority=-1001), GenerateCall(salt="s" * 257)]
)
def test_limits_are_named(call: GenerateCall) -> None:
    with pytest.raises(Refused, match="priority|cache_salt") as refused:
        check_sampling(call, 100)
    assert refused.value.param in ("priority", "cache_salt")
