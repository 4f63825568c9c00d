"""The router process: both front doors over one dispatcher, and the life of the process.

`python -m router` runs it; see `router.spec` for how it is told what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import uvicorn
from google.protobuf.json_format import MessageToJson
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from baton import RELEASE, rpc
from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc, worker_pb2_grpc
from router.account import Account
from router.decision_file import DecisionFile
from router.dispatch import WorkerDispatcher
from router.dispatch_api import RefusalKind, Refused
from router.explain import explanation
from router.generation import Generation
from router.grpc_door import add_public_services
from router.http_answers import error_body
from router.http_door import create_app
from router.ledgers import LEDGERS_SERVICE, Ledgers
from router.metrics import Collector
from router.request_log import log_request, set_up_logging
from router.spec import RouterSpec, RouterStarted
from router.text import TextCodec

log = logging.getLogger("baton.router")

GRACE_S = 2
DECISIONS_SERVICE = "baton.v1.Decisions"


class CannotListen(RuntimeError):
    """A door's address cannot be bound, or a file not be opened; says which, why and what to do."""


class Router:
    """One router: start, wait, stop."""

    def __init__(self, spec: RouterSpec) -> None:
        self.spec = spec
        self.dispatcher = WorkerDispatcher(spec)
        self.generation = Generation(
            TextCodec.load(spec.model_path),
            self.dispatcher,
            served_name=spec.served_name,
            max_model_len=spec.max_model_len,
            on_end=self._request_ended,
        )
        self._decision_file: DecisionFile | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self._collector())
        ProcessCollector(registry=self._registry)
        self._grpc: grpc.aio.Server | None = None
        self._http: _HttpServer | None = None
        self._http_task: asyncio.Task[None] | None = None

    async def start(self) -> RouterStarted:
        """Opens both doors. Raises CannotListen."""
        self._open_decision_file()
        grpc_host, grpc_port = _split(self.spec.grpc, "router.grpc")
        self._grpc = rpc.server(self.spec.token)
        add_public_services(
            self._grpc,
            self.generation,
            self.dispatcher.status,
            also_served=[DECISIONS_SERVICE, LEDGERS_SERVICE],
        )
        inference_pb2_grpc.add_DecisionsServicer_to_server(self, self._grpc)
        ledgers = Ledgers(lambda: self.dispatcher.status().workers, self.spec.token)
        inference_pb2_grpc.add_LedgersServicer_to_server(ledgers, self._grpc)
        worker_pb2_grpc.add_MembershipServicer_to_server(self.dispatcher, self._grpc)
        try:
            port = self._grpc.add_insecure_port(f"{grpc_host}:{grpc_port}")
        except RuntimeError as error:
            raise CannotListen(_advice(self.spec.grpc, "router.grpc", str(error))) from None
        await self._grpc.start()
        listener = _listen(self.spec.http)
        config = uvicorn.Config(
            create_app(
                self.generation,
                extra_routes=[
                    Route("/metrics", self._metrics),
                    Route("/decisions/{request_id:path}", self._explained),
                ],
            ),
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
            backlog=2048,
        )
        self._http = _HttpServer(config)
        self._http_task = asyncio.create_task(self._http.serve(sockets=[listener]))
        http_host, http_port = listener.getsockname()[:2]
        return RouterStarted(http=f"{http_host}:{http_port}", grpc=f"{grpc_host}:{port}", pid=os.getpid())

    def _request_ended(self, account: Account) -> None:
        self.dispatcher.metrics.ended(account)
        self.dispatcher.decisions.ended(account)
        log_request(account)

    def _open_decision_file(self) -> None:
        if not self.spec.decision_log:
            return
        try:
            self._decision_file = DecisionFile(Path(self.spec.decision_log), self.spec.decision_log_bytes)
        except OSError as error:
            raise CannotListen(
                f"router.decision_log: cannot write {self.spec.decision_log} ({error.strerror}); give another path"
            ) from None
        self.dispatcher.decisions.write = self._decision_file.write

    async def Explain(self, request: api.ExplainRequest, context: Any) -> api.Explanation:
        """`baton.v1.Decisions`."""
        record = self.dispatcher.decisions.find(request.request_id)
        if record is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, _unknown(request.request_id))
        assert record is not None
        return explanation(record)

    async def _explained(self, request: Request) -> Response:
        """/decisions/REQUEST_ID, as JSON."""
        request_id = request.path_params["request_id"]
        record = self.dispatcher.decisions.find(request_id)
        if record is None:
            refused = Refused(RefusalKind.NOT_FOUND, _unknown(request_id), param="request_id")
            return Response(error_body(refused), 404, media_type="application/json")
        told = MessageToJson(explanation(record), preserving_proto_field_name=True)
        return Response(told, media_type="application/json")

    def _collector(self) -> Collector:
        return Collector(
            self.dispatcher.metrics,
            self.dispatcher.workers,
            lambda: self.dispatcher.active,
            lambda: self.dispatcher.queued,
            self.dispatcher.index,
            restarts=self.spec.restarts,
            build={
                "release": RELEASE,
                "router": self.spec.router_id,
                "model": self.spec.served_name,
                "policy": self.spec.policy,
            },
        )

    async def _metrics(self, request: Request) -> Response:
        """/metrics, in Prometheus' text or OpenMetrics as the scraper asks."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), media_type=content_type)

    async def stop(self) -> None:
        """Closes the doors; requests under way get a moment to end."""
        if self._http is not None:
            self._http.should_exit = True
        if self._grpc is not None:
            await self._grpc.stop(GRACE_S)
        if self._http_task is not None:
            await asyncio.wait({self._http_task}, timeout=2 * GRACE_S)
        await self.dispatcher.close()
        self.dispatcher.decisions.close()
        if self._decision_file is not None:
            await asyncio.to_thread(self._decision_file.close)


class _HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the router's, not uvicorn's."""
        yield


def _unknown(request_id: str) -> str:
    return f"this router remembers no request {request_id!r}: it never had it, or router.decisions_mib is too small"


def _split(address: str, key: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise CannotListen(f"{key}: {address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _listen(address: str) -> socket.socket:
    host, port = _split(address, "router.http")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise CannotListen(_advice(address, "router.http", error.strerror or str(error))) from None


def _advice(address: str, key: str, error: str) -> str:
    return (
        f"{key}: cannot listen on {address} ({error}): is another server running there? Choose another port."
    )


async def _serve(spec: RouterSpec, stop: asyncio.Event) -> int:
    router = Router(spec)
    try:
        started = await router.start()
    except CannotListen as error:
        log.error("%s", error)
        await router.stop()
        return 2
    sys.stdout.write(msgspec.json.encode(started).decode() + "\n")
    sys.stdout.flush()
    await stop.wait()
    await router.stop()
    return 0


async def _main() -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is the supervisor's to handle
    line = await loop.run_in_executor(None, sys.stdin.readline)
    spec = msgspec.json.decode(line, type=RouterSpec)
    set_up_logging(spec.router_id, spec.log_format)

    async def until_orphaned() -> None:
        # Whoever started us closes our standard input when it dies, however it dies.
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while await reader.read(4096):
            pass
        stop.set()

    orphaned = asyncio.create_task(until_orphaned())
    try:
        return await _serve(spec, stop)
    finally:
        orphaned.cancel()


def main() -> None:
    import uvloop

    os._exit(uvloop.run(_main()))
