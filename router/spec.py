"""Everything that a router process is told when it is started (JSON between processes).

Started as `python -m router`, the spec as one line of JSON on standard input; prints one line of JSON
(`RouterStarted`) on standard output when both doors listen, and ends when its standard input closes or on SIGTERM.
Who is in the cluster it learns from `Membership.SetMembers` on its gRPC port (token required).
"""

from __future__ import annotations

from typing import Literal

import msgspec


class RouterSpec(msgspec.Struct, frozen=True, kw_only=True):
    router_id: str = "router-0"
    token: str
    http: str = "127.0.0.1:8000"
    grpc: str = "127.0.0.1:8001"
    model_path: str
    served_name: str
    max_model_len: int
    policy: str = "cost"
    ttft_s: float = 1.0  # what a request is to be served with when it does not say
    itl_s: float = 0.1
    local_below_tokens: int = 256
    max_prefill_waiting: int = 8  # remote only while fewer hand-offs wait at the prefill worker
    decisions_bytes: int = 32 << 20  # of decisions that can be explained
    decision_log: str = ""  # a file with all of them; empty: none
    decision_log_bytes: int = 256 << 20
    tenants: dict[str, float] = {}  # weights; who is not named weighs 1
    worker_queue: int = 32  # requests that may wait at a decode worker; the others wait here
    max_queued: int = 512  # here, at most
    max_queued_s: float = 60.0  # so long
    max_active: int = 1024  # requests in this router; beyond that RESOURCE_EXHAUSTED
    prefix_index_entries: int = 1_000_000  # blocks at workers that the prefix index keeps at most
    log_format: Literal["text", "json"] = "text"
    restarts: int = 0  # how often this router was started again by its supervisor


class RouterStarted(msgspec.Struct, frozen=True, kw_only=True):
    http: str
    grpc: str
    pid: int
