"""The HTTP front door: OpenAI's API, streamed (server-sent events) or not, and /health.

`create_app` makes the ASGI application that the router runs under uvicorn. It translates and decides nothing: bodies
are in `router.http_bodies`, answers in `router.http_answers`, checks in `router.generation`. When a client goes away,
while it waits or in the middle of a stream, its generators are closed, which cancels its requests everywhere.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from router.call import MAX_CHOICES
from router.dispatch_api import RefusalKind, Refused
from router.generation import ChoiceEnd, GenerateCall, Generation, TextDelta, TextEnd, TextEvent, TextPrompt
from router.http_answers import DONE, Answers, Collected, error_body, error_json
from router.http_bodies import ChatBody, CompletionBody, parse

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 20
BODY_TIMEOUT_S = 60.0

Result = TypeVar("Result")


class _Unacceptable(Exception):
    """The request did not get as far as a body."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def create_app(
    generation: Generation,
    *,
    extra_routes: Sequence[BaseRoute] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> Starlette:
    """The ASGI application. `extra_routes`: what the router's main adds, e.g. /metrics and the status page."""
    door = _Door(generation, max_body_bytes, body_timeout_s)
    routes = [
        Route("/v1/completions", door.completions, methods=["POST"]),
        Route("/v1/chat/completions", door.chat, methods=["POST"]),
        Route("/v1/models", door.models),
        Route("/v1/models/{model:path}", door.model),
        Route("/health", door.health),
        *extra_routes,
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_exception})


class _Door:
    def __init__(self, generation: Generation, max_body_bytes: int, body_timeout_s: float) -> None:
        self._generation = generation
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._created = int(time.time())

    async def health(self, _request: Request) -> Response:
        ready = self._generation.ready
        return _json(
            msgspec.json.encode({"status": "ready" if ready else "not ready"}), 200 if ready else 503
        )

    async def models(self, _request: Request) -> Response:
        return _json(msgspec.json.encode({"object": "list", "data": [self._describe()]}))

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self._generation.model.name:
            return _refusal(
                Refused(RefusalKind.NOT_FOUND, f"the model {name!r} does not exist", param="model"), {}
            )
        return _json(msgspec.json.encode(self._describe()))

    def _describe(self) -> dict[str, Any]:
        model = self._generation.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "baton",
            "max_model_len": model.max_model_len,
        }

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionBody)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatBody)

    async def _answer(self, request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        headers = {"X-Request-Id": request_id}
        try:
            body = parse(kind, await self._body(request))
            calls = body.calls(request_id)
            for call in calls:
                call.user = call.user or request.headers.get("x-baton-tenant", "")
            answers = Answers(
                chat=kind is ChatBody,
                request_id=request_id,
                model=self._generation.model.name,
                created=int(time.time()),
                with_ids=bool(body.return_token_ids),
                with_usage=body.include_usage,
                with_logprobs=calls[0].logprobs is not None,
                token_bytes=self._generation.token_bytes,
            )
            if not body.stream:
                collected = await _while_connected(request.receive, self._collect(calls))
                return _json(answers.whole(collected), headers=headers)
            n = [call.n or 1 for call in calls]
            return _EventStream(answers, self._events(calls), n, body.include_usage, headers)
        except _Unacceptable as error:
            return _error(error.status, str(error), headers)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return _refusal(_as_refused(error), headers)

    async def _body(self, request: Request) -> bytes:
        """Reads the body, bounded in size and time."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > self._max_body_bytes:
                        raise _Unacceptable(
                            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                            f"the body is larger than {self._max_body_bytes} bytes",
                        )
        except TimeoutError:
            raise _Unacceptable(HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive in time") from None
        return b"".join(parts)

    async def _collect(self, calls: list[GenerateCall]) -> list[Collected]:
        # A number that is out of bounds is refused before anything is collected.
        collected = [Collected(call.n if call.n and 0 < call.n <= MAX_CHOICES else 1) for call in calls]
        async with aclosing(self._events(calls)) as events:
            async for index, event in events:
                collected[index].add(event)
        return collected

    async def _events(self, calls: list[GenerateCall]) -> AsyncGenerator[tuple[int, TextEvent], None]:
        """The events of all calls as they come, with the number of their call. One refusal ends them all."""
        if len(calls) == 1:
            async with aclosing(self._generation.generate(calls[0])) as events:
                async for event in events:
                    yield 0, event
            return
        # A queue as long as the list is wide: a client that reads slowly holds up the workers' streams, not memory.
        queue: asyncio.Queue[tuple[int, TextEvent] | BaseException] = asyncio.Queue(maxsize=len(calls))
        tasks = [asyncio.create_task(self._pump(index, call, queue)) for index, call in enumerate(calls)]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                running -= isinstance(item[1], TextEnd)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self, index: int, call: GenerateCall, queue: asyncio.Queue[tuple[int, TextEvent] | BaseException]
    ) -> None:
        try:
            async with aclosing(self._generation.generate(call)) as events:
                async for event in events:
                    await queue.put((index, event))
        except Exception as error:
            await queue.put(error)


class _EventStream(Response):
    """Server-sent events. A response of its own: Starlette's would close the generator only when it is collected."""

    def __init__(
        self,
        answers: Answers,
        events: AsyncGenerator[tuple[int, TextEvent], None],
        n: list[int],
        with_usage: bool,
        headers: dict[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**headers, "Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        self._answers = answers
        self._events = events
        self._n = n  # choices of each call
        self._with_usage = with_usage
        self._extra_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _while_connected(receive, self._run(scope, receive, send))
        except (ClientDisconnect, OSError):
            pass  # nobody is there to be told; the events are closed

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            # The first event decides between an answer and an error with a status of its own.
            try:
                first = await anext(events)
            except Exception as error:
                await _refusal(_as_refused(error), self._extra_headers)(scope, receive, send)
                return
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            await _send_part(send, b"".join(self._answers.role(index) for index in range(sum(self._n))))
            await self._send_events(first, events, send)
            await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _send_events(
        self, first: tuple[int, TextEvent], events: AsyncGenerator[tuple[int, TextEvent], None], send: Send
    ) -> None:
        answers = self._answers
        ends: list[TextEnd] = []
        await _send_part(send, self._encoded(*first, ends))
        while True:
            try:
                index, event = await anext(events)
            except StopAsyncIteration:
                break
            except Exception as error:
                # The status line is gone; OpenAI's clients raise when they read this.
                await _send_part(send, b"data: " + error_body(_as_refused(error)) + b"\n\n")
                return
            await _send_part(send, self._encoded(index, event, ends))
        if self._with_usage:
            await _send_part(send, answers.usage(ends))

    def _encoded(self, call: int, event: TextEvent, ends: list[TextEnd]) -> bytes:
        first = call * self._n[0]  # choice of this call: all calls of a request have as many
        if isinstance(event, TextDelta):
            return self._answers.delta(first + event.choice, event)
        if isinstance(event, TextPrompt):
            return b"".join(self._answers.prompt(first + choice, event) for choice in range(self._n[call]))
        if isinstance(event, ChoiceEnd):
            return self._answers.end(first + event.choice, event, None)
        ends.append(event)
        last = event.choices[-1]
        return self._answers.end(first + last.choice, last, event)


async def _send_part(send: Send, part: bytes) -> None:
    if part:
        await send({"type": "http.response.body", "body": part, "more_body": True})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Runs `work`, cancelling it when the client goes away. Raises ClientDisconnect then."""
    running = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise ClientDisconnect
        return await running
    finally:
        running.cancel()
        watching.cancel()
        # Waits, so that cancelling has reached the dispatcher when this returns.
        await asyncio.gather(running, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_refused(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    log.error("a request failed", exc_info=error)
    return Refused(RefusalKind.INTERNAL, f"internal error: {type(error).__name__}")


def _refusal(refused: Refused, headers: dict[str, str]) -> Response:
    retry = math.ceil(refused.retry_after_s)
    if retry > 0 or refused.kind is RefusalKind.NO_ROOM:
        headers = {**headers, "Retry-After": str(max(1, retry))}
    return _json(error_body(refused), refused.kind.http_status, headers)


def _error(status: HTTPStatus | int, message: str, headers: dict[str, str]) -> Response:
    return _json(error_json(message, "invalid_request_error", None, None), int(status), headers)


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


async def _http_exception(_request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))
