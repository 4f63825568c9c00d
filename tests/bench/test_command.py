"""`baton bench` as people run it: mistakes are told before anything is sent, reports are written, Ctrl-C is obeyed."""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from bench.report import SCHEMA, Report
from cluster.cli import app
from tests.bench.scripted import SSE, Asked, Script, Server, scripted, well

SMALL = ("--input-tokens", "uniform:20:60", "--output-tokens", "4", "--rate", "200", "--requests", "12")


@contextmanager
def serving(script: Script = well) -> Iterator[Server]:
    """A scripted server on a thread of its own: the command has its own event loop."""
    ready: list[Server] = []
    started = threading.Event()
    over: list[asyncio.Event] = []

    async def serve() -> None:
        over.append(asyncio.Event())
        async with scripted(script) as server:
            ready.append(server)
            started.set()
            await over[0].wait()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(10)
    try:
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(over[0].set)
        thread.join(10)
        loop.close()


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_one_run_writes_what_was_asked_for(tmp_path: Path) -> None:
    with serving() as server:
        files = {name: tmp_path / name for name in ("r.json", "p.png", "all.jsonl")}
        result = bench(
            "--url", server.url, *SMALL, "--slo", "ttft=9000,itl=9000", "--header", "Authorization: Bearer secret",
            "--json", files["r.json"], "--plot", files["p.png"], "--records", files["all.jsonl"],
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    for part in ("prompts of token ids below 1000", "goodput/s", "TTFT", "TPOT", "100.0%", "x0.25"):
        assert part in result.output
    report = msgspec.json.decode(files["r.json"].read_bytes(), type=Report)
    assert report.schema == SCHEMA and report.options["requests"] == 12 and report.servers["A"].model == "m"
    assert report.options["header"] == ["Authorization"] and b"secret" not in files["r.json"].read_bytes()
    summary = report.runs[0].summary
    assert (summary.requests, summary.answered, summary.output_tokens) == (12, 12, 48)
    assert report.runs[0].generator.cpu_s > 0
    rows = [json.loads(line) for line in files["all.jsonl"].read_text().splitlines()]
    assert len(rows) == 12 and all(len(row["piece_s"]) == 4 and not row["error"] for row in rows)
    assert files["p.png"].read_bytes().startswith(b"\x89PNG")


def test_sides_by_a_header_take_turns(tmp_path: Path) -> None:
    with serving() as server:
        result = bench(
            "--url", server.url, *SMALL, "--vary-header", "X-Policy: cost|threshold", "--rounds", "2"
        )
        seen = [asked.headers.get("x-policy") for asked in server.asked if asked.body.get("stream")]
    assert result.exit_code == 0, result.output
    assert seen == [policy for _ in range(2) for policy in ("cost",) * 12 + ("threshold",) * 12]
    assert "against cost" in result.output and "2 rounds are too few" in result.output


def test_a_search_and_a_sweep_draw_their_rates(tmp_path: Path) -> None:
    with serving() as server:
        found = bench(
            "--url", server.url, "--input-tokens", "20", "--output-tokens", "2", "--requests", "3", "--rate", "100",
            "--slo", "e2e=60000", "--rates", "100,200", "--plot", tmp_path / "p.png",
        )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "100/s" in found.output and "200/s" in found.output
    assert (tmp_path / "p.png").stat().st_size > 1000


async def full(asked: Asked) -> None:
    if asked.body.get("stream"):
        await asked.plain(429, {"error": {"message": "come [back] later"}})
    else:
        await well(asked)


def test_a_run_without_any_answer_fails() -> None:
    with serving(full) as server:
        result = bench("--url", server.url, *SMALL)
    assert result.exit_code == 1
    assert "no_room 12" in result.output and "come [back] later" in result.output


def test_ctrl_c_ends_it_with_a_report(tmp_path: Path) -> None:
    hanging = 0

    async def hang(asked: Asked) -> None:
        nonlocal hanging
        if not asked.body.get("stream"):
            await well(asked)
            return
        hanging += 1
        if hanging == 12:
            os.kill(os.getpid(), signal.SIGINT)
        await asked.raw(SSE)
        await asked.token()
        await asyncio.Event().wait()

    before = signal.getsignal(signal.SIGINT)
    with serving(hang) as server:
        result = bench("--url", server.url, *SMALL, "--json", tmp_path / "r.json")
    assert signal.getsignal(signal.SIGINT) is before
    assert result.exit_code == 130, result.output
    assert "interrupted" in result.output and "cancelled 12" in result.output
    assert json.loads((tmp_path / "r.json").read_text())["runs"][0]["interrupted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slo", "ttf=3"], "'ttf=3' is no objective"),
        (["--trace", "no.jsonl"], "no.jsonl"),
        (["--trace", "trace.bin"], "'.bin' is unknown"),
        (["--trace", "{trace}", "--arrivals", "poisson"], "are for --trace synthetic"),
        (["--trace", "{trace}", "--duration", "99"], "it lasts 4.0 s at 0.5 requests/s"),
        (["--input-tokens", "many"], "'many' is no distribution of lengths"),
        (["--rate", "1", "--speedup", "2"], "give one"),
        (["--speedup", "2"], "use --rate instead of --speedup"),
        (["--rate", "0"], "must be above 0, not 0.0"),
        (["--rates", "1,x"], "write requests a second with commas"),
        (["--rates", "1,2", "--find-rate"], "go alone"),
        (["--find-rate"], "--find-rate needs --slo"),
        (["--find-rate", "--slo", "ttft=5", "--rounds", "3"], "go alone"),
        (["--find-rate", "--slo", "ttft=5", "--attainment", "2"], "the attainment in (0, 1]"),
        (["--input-scale", "1/0"], "'1/0' is no scale of lengths"),
        (["--body", "[]"], "is no JSON object"),
        (["--api", "edits"], "there are completions, chat"),
        (["--prompts", "poems"], "there are auto, ids, text"),
        (["--header", "nothing"], "'nothing' is no header; write 'Name: value'"),
        (["--vary-header", "X: a"], "with two values or more"),
        (["--vary-header", "X: a|b", "--url", "http://a", "--url", "http://b"], "give only one"),
        (["--url", "grpc://h:1", "--header", "A: b"], "no effect over gRPC"),
        (["--url", "x=http://a", "--url", "x=http://b"], "two sides have the same name"),
        (["--url", "localhost:8000"], "is no address of a server"),
        (["--json", "/no/such/folder/r.json"], "there is no folder /no/such/folder"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(tmp_path: Path, arguments: list[str], message: str) -> None:
    trace = tmp_path / "t.csv"
    rows = "".join(f"2023-11-16 18:15:0{second},10,5\n" for second in (0, 2))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    result = bench(*(argument.replace("{trace}", str(trace)) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_without_matplotlib_a_picture_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    result = bench("--url", "http://127.0.0.1:9", "--plot", tmp_path / "p.png")
    assert result.exit_code == 2 and "--plot needs matplotlib: pip install matplotlib" in result.output
