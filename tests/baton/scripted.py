"""An Inference server on a real socket that says what a test wrote down, and one way to drive both clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from baton import AsyncClient, Client, Completion, Delta, Retry
from baton.v1 import inference_pb2 as api

QUICK = Retry(calls=4, first_s=0.01, longest_s=0.05)
Step = api.GenerateResponse | bytes | Callable[["Call"], None]


class Call:
    """One Generate call as the server sees it."""

    def __init__(self, request: api.GenerateRequest, context: Any) -> None:
        self.request = request
        self.context = context
        self.ended = threading.Event()
        context.add_callback(self.ended.set)


def tokens(first: int, *ids: int, text: str | None = None) -> api.GenerateResponse:
    """Token n is the text "n ", unless said otherwise."""
    said = "".join(f"{token_id} " for token_id in ids) if text is None else text
    return api.GenerateResponse(tokens=api.Tokens(first_index=first, ids=ids, text=said))


def finished(count: int, reason: str = "stop", text: str = "") -> api.GenerateResponse:
    trace = api.Trace(prefilled="remote", cached_tokens=2, decode_worker="decode-0")
    return api.GenerateResponse(
        finished=api.Finished(reason=reason, prompt_tokens=5, completion_tokens=count, trace=trace, text=text)
    )


def refuse(code: str, message: str = "because", *, retry_s: float = 0.0, param: str = "") -> Step:
    """Ends the call with a status as the router makes it."""

    def act(call: Call) -> None:
        details = []
        if retry_s:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(retry_s * 1e9))
            details.append(retry)
        if param:
            violation = error_details_pb2.BadRequest.FieldViolation(field=param)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        status = status_pb2.Status(code=code_pb2.Code.Value(code), message=message, details=packed)
        call.context.abort_with_status(rpc_status.to_status(status))

    return act


def hang(call: Call) -> None:
    """Until the client goes away."""
    assert call.ended.wait(20)


class Server(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Plays `scripts`, one for each call, the last one again and again. `port` 0: any free one."""

    def __init__(self, *scripts: Sequence[Step], port: int = 0) -> None:
        self.scripts = list(scripts)
        self.calls: list[Call] = []
        self.serving = True
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        unary = grpc.unary_unary_rpc_method_handler
        handlers = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._generate, api.GenerateRequest.FromString, _bytes
            ),
            "Models": unary(
                lambda *_: api.ModelsResponse(models=[api.Model(name="m")]), None, response_serializer=_bytes
            ),
            "Status": unary(lambda *_: api.StatusResponse(router="r"), None, response_serializer=_bytes),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("baton.v1.Inference", handlers),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def _generate(self, request: api.GenerateRequest, context: Any) -> Iterator[api.GenerateResponse | bytes]:
        call = Call(request, context)
        with self._lock:
            script = self.scripts[min(len(self.calls), len(self.scripts) - 1)]
            self.calls.append(call)
        for step in script:
            if callable(step):
                step(call)
            else:
                yield step

    def Check(self, request: object, context: object) -> health_pb2.HealthCheckResponse:
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self.serving else status.NOT_SERVING)

    def stop(self) -> None:
        """At once: connections break in the middle of what they carry."""
        self._server.stop(0).wait(10)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _bytes(message: Any) -> bytes:
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())


class Driver:
    """Asks through one of the two clients, and returns when the answer is over."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def generate(self, address: str, prompt: Any = "p", **asked: Any) -> Completion:
        if self.kind == "sync":
            with Client(address, retry=QUICK) as client:
                return client.generate(prompt, **asked)

        async def ask() -> Completion:
            async with AsyncClient(address, retry=QUICK) as client:
                return await client.generate(prompt, **asked)

        return asyncio.run(ask())

    def stream(
        self,
        address: str,
        prompt: Any = "p",
        *,
        seen: Callable[[Delta], None] = lambda _: None,
        **asked: Any,
    ) -> tuple[list[Delta], Completion]:
        """`seen` is called with each delta as it comes."""
        deltas: list[Delta] = []
        if self.kind == "sync":
            with Client(address, retry=QUICK) as client, client.stream(prompt, **asked) as stream:
                for delta in stream:
                    deltas.append(delta)
                    seen(delta)
                return deltas, stream.completion

        async def ask() -> tuple[list[Delta], Completion]:
            async with AsyncClient(address, retry=QUICK) as client:
                async with client.stream(prompt, **asked) as stream:
                    async for delta in stream:
                        deltas.append(delta)
                        seen(delta)
                    return deltas, stream.completion

        return asyncio.run(ask())

    def leave_after_one(self, address: str) -> Delta:
        """Reads one delta and goes away; the client stays open until then."""
        if self.kind == "sync":
            with Client(address) as client, client.stream("p") as stream:
                return next(stream)

        async def ask() -> Delta:
            async with AsyncClient(address) as client:
                async with client.stream("p") as stream:
                    return await anext(stream)

        return asyncio.run(ask())

    def look(self, address: str) -> tuple[list[str], str, bool]:
        """Names of models, of the router, and whether it is healthy."""
        if self.kind == "sync":
            with Client(address) as client:
                return [model.name for model in client.models()], client.status().router, client.health()

        async def ask() -> tuple[list[str], str, bool]:
            async with AsyncClient(address) as client:
                names = [model.name for model in await client.models()]
                return names, (await client.status()).router, await client.health()

        return asyncio.run(ask())
