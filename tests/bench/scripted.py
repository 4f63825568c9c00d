"""A small OpenAI server on a real socket whose every move is scripted by a test, down to half a stream and a reset."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

SSE = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class Asked:
    """One request, and the means to answer it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter
    closed: bool = False  # by us: the connection is not kept

    async def raw(self, data: str | bytes) -> None:
        self.writer.write(data.encode() if isinstance(data, str) else data)
        await self.writer.drain()

    async def plain(self, status: int, body: Any) -> None:
        """A whole answer."""
        text = json.dumps(body)
        await self.raw(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n{text}")

    async def events(self, *events: Any) -> None:
        for event in events:
            data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
            await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def token(self, text: str = "a", **more: Any) -> None:
        if "messages" in self.body:
            await self.events({"choices": [{"index": 0, "delta": {"content": text}, **more}]})
        else:
            await self.events({"choices": [{"index": 0, "text": text, **more}]})

    async def end(self, tokens: int, prompt_tokens: int = 7, **more: Any) -> None:
        """Reason, usage, [DONE]."""
        last = {"index": 0, "text": "", "delta": {}, "finish_reason": "length"}
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, **more}
        await self.events({"choices": [last]}, {"choices": [], "usage": usage}, "[DONE]")
        await self.raw("0\r\n\r\n")

    async def stream(self, tokens: int) -> None:
        """A good answer."""
        await self.raw(SSE)
        for _ in range(tokens):
            await self.token()
        await self.end(tokens)

    def close(self) -> None:
        self.closed = True
        self.writer.close()

    def reset(self) -> None:
        """RST instead of FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.closed = True
        self.writer.transport.abort()


Script = Callable[[Asked], Awaitable[None]]


@dataclass
class Server:
    port: int
    script: Script
    asked: list[Asked] = field(default_factory=list)
    gone: list[str] = field(
        default_factory=list
    )  # request ids whose client went away while they were answered
    connections: int = 0
    listener: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


async def well(asked: Asked) -> None:
    """A server that takes everything, ids too; each word and each id is a token."""
    if asked.path == "/v1/models":
        await asked.plain(200, {"data": [{"id": "m", "max_model_len": 4096}]})
    elif not asked.body.get("stream"):
        prompt = asked.body.get("prompt") or asked.body["messages"][0]["content"]
        count = len(prompt.split() if isinstance(prompt, str) else prompt)
        await asked.plain(200, {"choices": [{"text": "a"}], "usage": {"prompt_tokens": count}})
    else:
        await asked.stream(asked.body["max_tokens"])


@asynccontextmanager
async def scripted(script: Script = well) -> AsyncIterator[Server]:
    server = Server(0, script)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            while True:
                asked = await _read(reader, writer)
                server.asked.append(asked)
                answering = asyncio.ensure_future(server.script(asked))
                leaving = asyncio.ensure_future(
                    reader.read(1)
                )  # clients do not pipeline: bytes or an end mean it left
                await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    server.gone.append(asked.headers.get("x-request-id", ""))
                    answering.cancel()
                    await asyncio.gather(answering, return_exceptions=True)
                    return
                await answering
                if asked.closed:
                    leaving.cancel()
                    await asyncio.gather(leaving, return_exceptions=True)
                    return
                reader = _put_back(reader, await leaving)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server.listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    server.port = server.listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        server.listener.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _put_back(reader: asyncio.StreamReader, byte: bytes) -> asyncio.StreamReader:
    """The first byte of the next request, which was read to see whether the client left."""
    reader._buffer[:0] = byte  # type: ignore[attr-defined]
    return reader


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
    }
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Asked(head[0].split()[1], headers, json.loads(body) if body else {}, writer)
