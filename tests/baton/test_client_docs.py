"""The examples of docs/client.md run as they stand, but for the address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from baton import Completion
from tests.baton.scripted import Server, Step, finished, refuse, tokens

PAGE = Path(__file__).resolve().parents[2] / "docs" / "client.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
WHOLE: list[Step] = [tokens(0, 7), tokens(1, 8, 9), finished(3)]


def _run(example: str, *scripts: list[Step]) -> dict[str, Any]:
    with Server(*scripts) as server:
        told: dict[str, Any] = {}
        exec(example.replace("127.0.0.1:8001", server.address), told)  # noqa: S102 (our own page)
        assert server.calls
        return told


@pytest.mark.parametrize("example", EXAMPLES, ids=["generate", "stream", "asyncio", "errors"])
def test_examples_run(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = _run(example, WHOLE)
    answers = told.get("answers") or [told.get("answer") or told["stream"].completion]
    assert all(isinstance(answer, Completion) and answer.token_ids == [7, 8, 9] for answer in answers)
    assert "answers" not in told or len(answers) == 8


def test_the_example_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    example = EXAMPLES[-1]
    _run(example, [refuse("INVALID_ARGUMENT", "too hot", param="temperature")])
    assert capsys.readouterr().out == "mend temperature : too hot\n"
    _run(example, [refuse("INTERNAL", "oops")])
    assert capsys.readouterr().out.endswith(" INTERNAL: oops\n")
    told = _run(example, [refuse("RESOURCE_EXHAUSTED", "full", retry_s=0.01)])
    assert "answer" not in told
