"""A served HTTP door and its clients, for the tests of the door (the fixture `served` is in conftest.py)."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from router.dispatch_api import Prompt
from router.generation import Generation
from router.http_door import create_app
from router.text import TextCodec
from tests.router.echo import EchoDispatcher, make_generation, until

MAX_BODY = 20_000
TEXT = "the quick brown 🙂 fox"


class Served:
    def __init__(
        self,
        dispatcher: EchoDispatcher,
        generation: Generation,
        codec: TextCodec,
        port: int,
        http: httpx.AsyncClient,
    ) -> None:
        self.dispatcher = dispatcher
        self.generation = generation
        self.codec = codec
        self.port = port
        self.http = http

    @functools.cached_property
    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="none",
            max_retries=0,
            timeout=10,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),  # loading certificates takes long
        )

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def completion(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", **body)

    async def events(self, path: str, **body: Any) -> list[Any]:
        """All events of a stream, decoded; the last must be [DONE], which is left out."""
        response = await self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert data.pop() == "[DONE]"
        return [json.loads(event) for event in data]


async def extra(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("added")


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Served]:
    dispatcher = EchoDispatcher()
    generation, codec = make_generation(tmp_path, dispatcher)
    app = create_app(
        generation, extra_routes=[Route("/extra", extra)], max_body_bytes=MAX_BODY, body_timeout_s=0.5
    )
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    # Without `serve`, which takes the signals of the process and looks at its flags ten times a second.
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, verify=False) as http:
        one = Served(dispatcher, generation, codec, port, http)
        yield one
        if "openai" in vars(one):
            await one.openai.close()
    # Nor `shutdown`, which sleeps for a tenth of a second.
    for listener in server.servers:
        listener.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    await until(lambda: not server.server_state.connections)


def says(codec: TextCodec, text: str) -> Any:
    """A script for the dispatcher."""

    def script(_prompt: Prompt) -> list[int]:
        return codec.encode(text, add_special_tokens=False)

    return script
