"""Clients of a running Baton over gRPC: `Client`, `AsyncClient`. Imported lazily as `from baton import Client`.

    with Client("127.0.0.1:8001") as client:
        print(client.generate("Once upon a time", max_tokens=32).text)

Thin shells around `baton.conversation`: it says what to send, when to ask again and what of a response is new.
Neither torch nor numpy, nor any other room of the project.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.completion import Completion, Delta
from baton.conversation import Conversation, Retry, Sampling, make_request
from baton.errors import DeadlineExceeded, Unavailable, from_rpc
from baton.rpc import MAX_MESSAGE_BYTES
from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:8001"
_ASK_S = 5.0  # models, status, health
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A router whose machine is gone shows within half a minute, however long the answer may take.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # gRPC's own pauses between dials, seconds to minutes long, would make ours pointless.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_chance = random.SystemRandom().random


def _draw_seed() -> int:
    return secrets.randbits(63)


class _Base:
    """What both clients are made with."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
        timeout_s: float = 300.0,
        retry: Retry | None = None,
    ) -> None:
        """`address`: HOST:PORT of a router's gRPC door. `credentials`: e.g. grpc.ssl_channel_credentials(), for TLS.

        `options`: further gRPC channel options. `timeout_s`: for a whole answer, calls and pauses together.
        """
        self.address = address
        self._credentials = credentials
        self._options = [*_OPTIONS, *options]
        self._timeout_s = timeout_s
        self._retry = retry or Retry()
        self._opening = threading.Lock()
        self._channel: Any = None

    def _opened(self, rpc: Any) -> Any:
        """The channel, of `grpc` or `grpc.aio`; opened when first needed: one of aio belongs to the loop that runs."""
        with self._opening:
            if self._channel is None and self._credentials is None:
                self._channel = rpc.insecure_channel(self.address, options=self._options)
            elif self._channel is None:
                self._channel = rpc.secure_channel(self.address, self._credentials, options=self._options)
            return self._channel

    def _taken(self) -> Any:
        """The channel, to be closed; None when none is open."""
        with self._opening:
            channel, self._channel = self._channel, None
            return channel

    def _conversation(
        self,
        prompt: str | Sequence[int],
        request_id: str,
        model: str,
        timeout_s: float | None,
        sampling: Sampling,
    ) -> Conversation:
        request = make_request(prompt, request_id, model, sampling, _draw_seed)
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        return Conversation(request, deadline=deadline, retry=self._retry, chance=_chance)


class _Answer:
    """What both streams have: one conversation, and the call that it is in."""

    def __init__(self, stub: inference_pb2_grpc.InferenceStub, conversation: Conversation) -> None:
        self._stub = stub
        self._conversation = conversation
        self._call: Any = None
        self._over = False
        self._ready: deque[Delta] = deque()  # of one response, not taken yet

    @property
    def request_id(self) -> str:
        return self._conversation.request.request_id

    @property
    def completion(self) -> Completion:
        """The whole answer. RuntimeError before the stream has ended."""
        if self._conversation.completion is None:
            raise RuntimeError("the answer is not complete: read the stream to its end first")
        return self._conversation.completion

    def _current_call(self) -> Any:
        if self._call is None:
            timeout_s = self._conversation.begin_call(time.monotonic())
            self._call = self._stub.Generate(self._conversation.request, timeout=timeout_s)
        return self._call

    def _failed(self, error: Any) -> float:
        """The pause before the next call. Raises what ends the stream."""
        self._call = None
        return self._conversation.call_failed(from_rpc(error, self.request_id), time.monotonic())

    def _end(self) -> None:
        """Nothing more comes; a call that is not over is cancelled."""
        self._over = True
        self._ready.clear()
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


class Stream(_Answer):
    """The deltas of one answer. `close`, or leaving its `with` block, cancels what is not complete."""

    def __init__(self, stub: inference_pb2_grpc.InferenceStub, conversation: Conversation) -> None:
        super().__init__(stub, conversation)
        self._closed = threading.Event()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        if self._ready:
            return self._ready.popleft()
        if not self._over and (delta := self._next()) is not None:
            return delta
        raise StopIteration

    def _next(self) -> Delta | None:
        try:
            while not self._closed.is_set():
                try:
                    call = self._current_call()
                    if self._closed.is_set():  # since we looked: `close` may have missed this call
                        break
                    response = next(call, None)
                except grpc.RpcError as error:
                    if self._closed.is_set() or self._conversation.completion is not None:
                        break
                    self._closed.wait(self._failed(error))
                    continue
                if response is None:
                    self._conversation.call_ended()
                    break
                self._ready.extend(self._conversation.take(response))
                if self._ready:
                    return self._ready.popleft()
        except BaseException:
            self._end()
            raise
        self._end()
        return None

    def close(self) -> None:
        """Cancels the request unless it is complete. Any thread may call it: the reader's loop ends then."""
        self._closed.set()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(_Answer):
    """The same for asyncio. `aclose`, leaving its `async with` block or cancelling the reader cancels the request."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._ready:
            return self._ready.popleft()
        if not self._over and (delta := await self._next()) is not None:
            return delta
        raise StopAsyncIteration

    async def _next(self) -> Delta | None:
        try:
            while not self._over:
                try:
                    response = await self._current_call().read()
                except grpc.aio.AioRpcError as error:
                    if self._over or self._conversation.completion is not None:
                        break
                    await asyncio.sleep(self._failed(error))
                    continue
                if response is grpc.aio.EOF:
                    self._conversation.call_ended()
                    break
                self._ready.extend(self._conversation.take(response))
                if self._ready:
                    return self._ready.popleft()
        except BaseException:
            self._end()
            raise
        self._end()
        return None

    async def aclose(self) -> None:
        """Cancels the request unless it is complete."""
        self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Client(_Base):
    """A client for threads: any of them may call any method at any time. Close it, or use it in `with`."""

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """The whole answer to a text or to token ids. Raises BatonError, see `baton.errors`."""
        conversation = self._conversation(prompt, request_id, model, timeout_s, sampling)
        with Stream(self._stub, conversation) as stream:
            for _ in stream:
                pass
            return stream.completion

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Its deltas as they come; the call is made when the first is asked for. Use it in `with`."""
        return Stream(self._stub, self._conversation(prompt, request_id, model, timeout_s, sampling))

    def models(self) -> list[api.Model]:
        return list(self._ask(self._stub.Models, api.ModelsRequest()).models)

    def status(self) -> api.StatusResponse:
        """The router and its workers: queues, ledgers, counters."""
        answer = self._ask(self._stub.Status, api.StatusRequest())
        assert isinstance(answer, api.StatusResponse)
        return answer

    def health(self) -> bool:
        """True when a request would be answered now; False also when nothing answers at all."""
        stub = health_pb2_grpc.HealthStub(self._opened(grpc))
        try:
            return _serving(self._ask(stub.Check, health_pb2.HealthCheckRequest()))
        except (Unavailable, DeadlineExceeded):
            return False

    def close(self) -> None:
        """Ends what is under way."""
        channel = self._taken()
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _stub(self) -> inference_pb2_grpc.InferenceStub:
        return inference_pb2_grpc.InferenceStub(self._opened(grpc))

    def _ask(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=_ASK_S)
        except grpc.RpcError as error:
            raise from_rpc(error) from None


class AsyncClient(_Base):
    """The same for asyncio; one event loop each."""

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """The whole answer to a text or to token ids. Raises BatonError, see `baton.errors`."""
        conversation = self._conversation(prompt, request_id, model, timeout_s, sampling)
        async with AsyncStream(self._stub, conversation) as stream:
            async for _ in stream:
                pass
            return stream.completion

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        """Its deltas as they come; the call is made when the first is asked for. Use it in `async with`."""
        return AsyncStream(self._stub, self._conversation(prompt, request_id, model, timeout_s, sampling))

    async def models(self) -> list[api.Model]:
        return list((await self._ask(self._stub.Models, api.ModelsRequest())).models)

    async def status(self) -> api.StatusResponse:
        """The router and its workers: queues, ledgers, counters."""
        answer = await self._ask(self._stub.Status, api.StatusRequest())
        assert isinstance(answer, api.StatusResponse)
        return answer

    async def health(self) -> bool:
        """True when a request would be answered now; False also when nothing answers at all."""
        stub = health_pb2_grpc.HealthStub(self._opened(grpc.aio))
        try:
            return _serving(await self._ask(stub.Check, health_pb2.HealthCheckRequest()))
        except (Unavailable, DeadlineExceeded):
            return False

    async def close(self) -> None:
        """Ends what is under way."""
        channel = self._taken()
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _stub(self) -> inference_pb2_grpc.InferenceStub:
        return inference_pb2_grpc.InferenceStub(self._opened(grpc.aio))

    async def _ask(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=_ASK_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None


def _serving(answer: health_pb2.HealthCheckResponse) -> bool:
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
