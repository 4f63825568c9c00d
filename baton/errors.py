"""What can go wrong with a request, as a client of Baton meets it; raised by `baton.client`.

All are BatonError. `request_id` finds the request in the logs of the router and the workers.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]


class BatonError(Exception):
    """No answer, or not the whole of it."""

    def __init__(self, message: str, *, request_id: str = "") -> None:
        super().__init__(message)
        self.request_id = request_id


class InvalidRequest(BatonError):
    """The request cannot be answered as it is. `param` names the offending field where the server said it."""

    def __init__(self, message: str, *, request_id: str = "", param: str = "") -> None:
        super().__init__(message, request_id=request_id)
        self.param = param


class Unavailable(BatonError):
    """Nothing answers now: no router, no worker, or one was lost. `retry_after_s`: the server's advice, 0 = none."""

    def __init__(self, message: str, *, request_id: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after_s = retry_after_s


class NoRoom(BatonError):
    """The server is full. Asking again after `retry_after_s` makes sense."""

    def __init__(self, message: str, *, request_id: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(BatonError):
    """The answer was not complete within `timeout_s`."""


class BrokenAnswer(BatonError):
    """What the server sent is no answer: not Baton's protocol, or two attempts at one answer that differ."""


def from_rpc(error: Any, request_id: str = "") -> BatonError:
    """The typed error for a grpc.RpcError that is also a call (sync), or an AioRpcError."""
    code, message = error.code(), str(error.details() or "")
    param, retry_after_s = _details(error)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.NOT_FOUND | grpc.StatusCode.OUT_OF_RANGE:
            return InvalidRequest(message, request_id=request_id, param=param)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return NoRoom(message, request_id=request_id, retry_after_s=retry_after_s)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(message, request_id=request_id, retry_after_s=retry_after_s)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(message, request_id=request_id)
        case grpc.StatusCode.CANCELLED:  # not by us: a server that stops ends its calls so
            return Unavailable(f"the server cancelled the request: {message}", request_id=request_id)
    return BatonError(f"{code.name}: {message}", request_id=request_id)


def _details(error: Any) -> tuple[str, float]:
    """Field and back-off from the rich status, see google/rpc/error_details.proto; nothing where there is none."""
    param, retry_after_s = "", 0.0
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        try:
            status = status_pb2.Status.FromString(value)
            retry, bad = error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
            for detail in status.details:
                if detail.Unpack(retry):
                    retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
                elif detail.Unpack(bad) and bad.field_violations:
                    param = bad.field_violations[0].field
        except DecodeError:
            break  # the status itself is worth more than what came beside it
    return param, retry_after_s
