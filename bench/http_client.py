"""A small HTTP/1.1 client on asyncio that tells the time of every piece of an answer. Called by `bench.openai_door`.

Bytes are read and stamped in the protocol's callback, so that no task is woken for a streamed token; only the end of
an answer wakes its waiter. Connections are kept and used again; a kept one that turns out closed before anything was
answered is replaced once. No proxies and no redirects: what is measured is the server that was named.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from bench.http1 import AnswerReader, BadAnswer

CONNECT_S = 10.0
MAX_KEPT = 1024
Clock = Callable[[], float]


class HttpFailure(Exception):
    """No whole answer. `kind` is one of `bench.record.ERRORS`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Sink(Protocol):
    """Takes an answer as it comes. May raise HttpFailure or BadAnswer, which ends the exchange."""

    def head(self, status: int, headers: dict[str, str]) -> None: ...

    def body(self, now: float, data: bytes) -> bool:
        """True: that was all that matters, and the rest of the answer is only read to its end."""
        ...


@dataclass
class Whole:
    """A sink that keeps the whole body."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers = status, headers

    def body(self, _now: float, data: bytes) -> bool:
        self.parts.append(data)
        return False


class HttpClient:
    """All connections to one origin, e.g. http://127.0.0.1:8000 or https://host/base. One event loop."""

    def __init__(self, url: str, *, clock: Clock, headers: dict[str, str] | None = None) -> None:
        """`headers` go with every request. Raises ValueError for what is no URL of a server."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is no address of a server; write http://HOST:PORT")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/")
        self._clock = clock
        more = {"Host": parts.netloc.rpartition("@")[2], "Accept-Encoding": "identity", **(headers or {})}
        for name, value in more.items():
            if any(char in name + value for char in "\r\n") or not name.isascii() or ":" in name:
                raise ValueError(f"{name!r}: {value!r} is no header")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        self._kept: list[_Connection] = []
        self.redials = 0  # kept connections that turned out closed when a request had been written

    def encode(self, method: str, path: str, body: bytes, headers: str = "") -> bytes:
        """A request as bytes. `headers`: more lines, each with its end."""
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._headers}{headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode("latin-1") + b"\r\n" + body

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Sends and reads until the answer's end. Raises HttpFailure.

        Cancelling it closes the connection.
        """
        kept = self._take()
        while True:
            connection = kept or await self._connect()
            try:
                await connection.exchange(request, sink)
            except _Stale:
                if kept is None:
                    raise HttpFailure("reset", "the server closed the connection without an answer") from None
                kept = None  # it was closed while it was kept, most likely: once more, on a fresh one
                self.redials += 1
                continue
            if connection.usable and len(self._kept) < MAX_KEPT:
                self._kept.append(connection)
            else:
                connection.close()
            return

    async def fetch(
        self, method: str, path: str, body: bytes = b"", *, timeout_s: float
    ) -> tuple[int, bytes]:
        """Status and body of one small request. Raises HttpFailure."""
        sink = Whole()
        try:
            async with asyncio.timeout(timeout_s):
                await self.exchange(self.encode(method, path, body), sink)
        except TimeoutError:
            raise HttpFailure("timeout", f"{method} {path} was not answered within {timeout_s:g} s") from None
        return sink.status, b"".join(sink.parts)

    def close(self) -> None:
        for connection in self._kept:
            connection.close()
        self._kept.clear()

    def _take(self) -> _Connection | None:
        while self._kept:
            connection = self._kept.pop()
            if connection.usable:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._clock), self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise HttpFailure("connect", f"no connection within {CONNECT_S:g} s") from None
        except OSError as error:  # refused, unknown host, TLS
            raise HttpFailure("connect", str(error)) from None
        return connection


class _Stale(Exception):
    """The connection ended before any byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection and the exchange on it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: Any = None  # asyncio.Transport
        self._reader = AnswerReader()
        self._sink: Sink | None = None
        self._told_head = False
        self._enough = False
        self._ended: asyncio.Future[None] | None = None
        self._lost: Exception | None = None
        self._open = False

    @property
    def usable(self) -> bool:
        return self._open and self._ended is None

    async def exchange(self, request: bytes, sink: Sink) -> None:
        self._reader, self._sink, self._told_head, self._enough = AnswerReader(), sink, False, False
        self._ended = ended = asyncio.get_running_loop().create_future()
        try:
            if not self._open:
                raise _Stale
            self._transport.write(request)
            await ended
            if not self._reader.keep_alive:
                self.close()
        except BaseException:
            self.close()
            raise
        finally:
            self._ended = self._sink = None

    def close(self) -> None:
        """At once: what was not read is of no interest."""
        self._open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._open = transport, True

    def data_received(self, data: bytes) -> None:
        now = self._clock()
        if self._ended is None or self._ended.done():  # nobody asked for it
            self.close()
            return
        try:
            self._take(now, data)
        except HttpFailure as failure:
            self._end(failure)
        except BadAnswer as error:
            self._end(HttpFailure("bad_answer", str(error)))
        except Exception as error:  # a defect of the sink must end its exchange, not hang it
            self._end(error)

    def _take(self, now: float, data: bytes) -> None:
        assert self._sink is not None
        body = self._reader.feed(data)
        if not self._told_head and self._reader.status:
            self._told_head = True
            self._sink.head(self._reader.status, self._reader.headers)
        if body and not self._enough:
            self._enough = self._sink.body(now, body)
        if self._reader.complete:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._open = False
        if self._ended is None or self._ended.done():
            return
        if self._reader.end_of_connection():
            self._end(None)
        elif not self._told_head and not isinstance(error, ssl.SSLError):
            self._end(_Stale())
        elif error is not None:
            self._end(HttpFailure("reset", f"{type(error).__name__}: {error}"))
        else:
            self._end(HttpFailure("broken_stream", "the connection was closed in the middle of the answer"))

    def _end(self, error: Exception | None) -> None:
        ended = self._ended
        if ended is None or ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)
