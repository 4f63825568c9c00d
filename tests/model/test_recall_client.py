"""The recall benchmark's HTTP side, against a server of twenty lines whose answers are known."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recall


class Words:
    """A tokenizer for tests that need no model: a token per character quad."""

    def encode(self, text: str) -> list[str]:
        """Pieces of four characters."""
        return [text[start : start + 4] for start in range(0, len(text), 4)]


class Handler(BaseHTTPRequestHandler):
    """Finds the value behind the name asked for; fails every request about a code."""

    def do_POST(self) -> None:
        """Answer one chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text, question = body["messages"][0]["content"].rsplit("\n", 1)
        words = question.strip("?.").split()
        name = words[-2] if words[-1] == "have" else words[-1]
        sentence = text[text.index(f" {name}") :].replace(";", ".").split(".")[0]
        reply = f"The word of {name} is {sentence.split()[-1]}."
        self.reply({"choices": [{"message": {"content": reply}}]}, 500 if "code" in question else 200)

    def do_GET(self) -> None:
        """List one model."""
        self.reply({"data": [{"id": "stub"}]}, 200)

    def reply(self, content: dict[str, Any], status: int) -> None:
        """Send JSON."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    """The address of the stub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_right_wrong_and_failed_are_told_apart(url: str) -> None:
    """Words come back right, codes come back as errors; both are counted, and an error is never right."""
    questions = recall.make_questions(4, (128, 256), 10, Words())
    assert recall.first_model(url) == "stub"
    asyncio.run(recall.ask_server(url, "stub", questions, 4))
    codes = [question for question in questions if question.expected.isdigit()]
    words = [question for question in questions if not question.expected.isdigit()]
    assert codes and words
    assert all("500" in question.error and not question.right for question in codes)
    assert recall.accuracy(words) == 1.0, [(q.expected, q.reply) for q in words]


def test_results_are_shown(url: str, tmp_path: Path) -> None:
    """The table has a row per length, and the picture is written."""
    questions = recall.make_questions(4, (128, 256), 5, Words())
    asyncio.run(recall.ask_server(url, "stub", questions, 4))
    assert recall.result_table(questions).row_count == 2
    recall.draw_heat_map(questions, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_asks_the_same() -> None:
    """Two runs can be compared question by question."""
    first, second = (recall.make_questions(9, (128,), 5, Words()) for _ in range(2))
    assert [q.messages for q in first] == [q.messages for q in second]
    assert [q.messages for q in first] != [q.messages for q in recall.make_questions(10, (128,), 5, Words())]
