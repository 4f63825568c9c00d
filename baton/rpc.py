"""How Baton's processes open gRPC channels and servers to each other: limits, keep-alive and the cluster token.

Every internal call carries the token; a call without it ends with UNAUTHENTICATED before any handler runs. Health,
reflection and the public services are open (their doors bind to loopback by default).
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

MAX_MESSAGE_BYTES = 64 << 20
INTERNAL_SERVICES = ("baton.v1.Worker", "baton.v1.Membership", "baton.v1.HandoffPeer")

# `ping_timeout_ms` is what makes a frozen peer show within a second or two; without it the keep-alive time-out is
# rounded up to a minute. Only for channels between our own processes: the server must allow such frequent pings.
_LIMITS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
_CHANNEL_OPTIONS = [
    *_LIMITS,
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Workers restart on new ports: a shared subchannel pool would hand a new link the old one's back-off.
    ("grpc.use_local_subchannel_pool", 1),
]
_SERVER_OPTIONS = [
    *_LIMITS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 200),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]

Metadata = Sequence[tuple[str, str]]


def credentials(token: str) -> Metadata:
    """Call metadata that proves membership of the cluster."""
    return (("authorization", f"Bearer {token}"),)


def channel(address: str) -> grpc.aio.Channel:
    """A channel to one of our own processes. Pass `metadata=credentials(token)` with each call."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def server(token: str) -> grpc.aio.Server:
    """A server whose internal services demand `token`; other services on it are open."""
    return grpc.aio.server(interceptors=[_TokenInterceptor(token)], options=_SERVER_OPTIONS)


class _TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    def __init__(self, token: str) -> None:
        if not token:
            raise ValueError("the cluster token is empty; internal calls could not be authenticated")
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or not details.method.lstrip("/").startswith(INTERNAL_SERVICES):
            return handler
        sent = dict(details.invocation_metadata or ()).get("authorization", "")
        if hmac.compare_digest(sent.encode(), self._expected):
            return handler
        return _refusal(handler)


def _refusal(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """A handler of the same cardinality (gRPC demands that) that ends every call with UNAUTHENTICATED."""

    async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong cluster token")

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(refuse, handler.request_deserializer, handler.response_serializer)
