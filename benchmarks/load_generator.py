"""What `baton bench` itself costs: CPU per streamed token, and how many streams one process keeps up with.

    python -m benchmarks.load_generator                       HTTP, against a server that only writes
    python -m benchmarks.load_generator --grpc 127.0.0.1:8001  against a Baton

The HTTP server is a process of its own that writes one event for each stream every `--every` milliseconds and does
nothing else, so that the generator is what is measured.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from bench.baton_door import GrpcDoor
from bench.door import Asking, Facts
from bench.figures import Slo, summarize
from bench.http_client import HttpClient
from bench.load import Job, Load, Target
from bench.openai_door import HttpTarget
from bench.prompts import TokenPrompts
from bench.record import Run
from bench.synthetic import Synthetic, generate
from bench.traces import Trace

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1795257912,'
    b'"model":"m","choices":[{"index":0,"text":" word","logprobs":null,"token_ids":[944],"finish_reason":null}],'
    b'"usage":null}\n\n'
)
LAST = b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
GROUPS = 16  # streams do not all speak at the same instant


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Writer(asyncio.Protocol):
    """One connection of the server: `left` events are still to be written."""

    def __init__(self, group: set[Writer]) -> None:
        self.group = group
        self.left = 0
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        if not end or (length and len(body) < int(length[1])):
            return
        self.received = b""
        wanted = re.search(rb'"max_tokens":\s*(\d+)', body)
        self.left = int(wanted[1]) if wanted else 1
        self.transport.write(HEAD)
        self.group.add(self)

    def connection_lost(self, _error: Exception | None) -> None:
        self.group.discard(self)

    def tick(self) -> None:
        self.left -= 1
        if self.left >= 0:
            self.transport.write(TOKEN)
        else:
            self.transport.write(END)
            self.group.discard(self)


TOKEN, END = chunk(EVENT), chunk(LAST) + b"0\r\n\r\n"


async def serve(every_s: float) -> None:
    """Prints its port and writes until its standard input closes."""
    groups: list[set[Writer]] = [set() for _ in range(GROUPS)]
    made = 0

    def connected() -> Writer:
        nonlocal made
        made += 1
        return Writer(groups[made % GROUPS])

    loop = asyncio.get_running_loop()
    server = await loop.create_server(connected, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    closed = asyncio.Event()
    loop.add_reader(sys.stdin, closed.set)
    due = loop.time()
    turn = 0
    while not closed.is_set():
        for writer in list(groups[turn % GROUPS]):
            writer.tick()
        turn += 1
        due += every_s / GROUPS
        await asyncio.sleep(max(0.0, due - loop.time()))


async def load(target: Target, trace: Trace) -> Run:
    jobs = [Job(request, request.arrival_s) for request in trace.requests]
    return await Load(target, jobs, timeout_s=120.0).run()


def streams_of(count: int, tokens: int) -> Trace:
    """So many streams, begun within a second."""
    shape = Synthetic(float(count), arrivals="uniform", input_tokens="32", output_tokens=str(tokens))
    return generate(shape, seed=0, duration_s=1.001)


async def over_http(url: str, count: int, tokens: int) -> Run:
    trace = streams_of(count, tokens)
    client = HttpClient(url, clock=time.perf_counter)
    facts = Facts(url, "completions", "m", end_id=1000)
    run = await load(HttpTarget(client, facts, Asking(), TokenPrompts(trace, 1000), "load"), trace)
    client.close()
    return run


async def over_grpc(address: str, count: int, tokens: int) -> Run:
    trace = streams_of(count, tokens)
    door = GrpcDoor(address, Asking(), clock=time.perf_counter)
    facts = await door.open()
    run = await load(door.target(facts.prompts(trace, str(time.time_ns())), "load"), trace)
    await door.close()
    return run


def main(
    streams: Annotated[str, typer.Option(help="Numbers of streams to try.")] = "50,100,200,400,800",
    tokens: Annotated[int, typer.Option(help="Of each stream.")] = 200,
    every_ms: Annotated[float, typer.Option("--every", help="Between two tokens of a stream.")] = 25.0,
    grpc: Annotated[str, typer.Option(help="HOST:PORT of a Baton, whose own speed is then part of it.")] = "",
    server: Annotated[bool, typer.Option("--server", hidden=True)] = False,
) -> None:
    """One row for each number of streams."""
    if server:
        uvloop.run(serve(every_ms / 1e3))
        return
    table = Table(
        "streams",
        "pieces",
        "errors",
        "us CPU/piece",
        "core",
        "lag p99 ms",
        "gap p50 ms",
        "gap p99 ms",
        box=None,
    )
    command = [sys.executable, "-m", "benchmarks.load_generator", "--server", "--every", str(every_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        url = f"http://127.0.0.1:{int(child.stdout.readline())}"
        for count in map(int, streams.split(",")):
            run = uvloop.run(over_grpc(grpc, count, tokens) if grpc else over_http(url, count, tokens))
            found = summarize(run, Slo(), warmup_s=0.0, window_s=1.0)
            pieces = sum(len(record.piece_times) for record in run.records)
            table.add_row(
                str(len(run.records)),
                str(pieces),
                str(found.requests - found.answered),
                f"{1e6 * run.cpu_s / max(1, pieces):.1f}",
                f"{run.cpu_s / (run.end - run.begin):.0%}",
                f"{found.lag_ms.p99:.1f}",
                f"{found.itl_ms.p50:.1f}",
                f"{found.itl_ms.p99:.1f}",
            )
        child.stdin.close()
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
