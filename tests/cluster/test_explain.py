"""`baton explain` and `baton replay`, as far as they go without a server."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster import explain_view
from cluster.cli import app
from router.account import Account
from router.decision_file import FrameEncoder
from router.decisions import DecisionLog, Record
from router.explain import explanation
from tests.router.test_decisions import decide


@pytest.fixture
def records() -> list[Record]:
    log = DecisionLog(1 << 30)
    return [decide(log, "always-remote", 7, number)[1] for number in range(12)]


@pytest.fixture
def log(tmp_path: Path, records: list[Record]) -> str:
    encoder = FrameEncoder()
    path = tmp_path / "decisions.log"
    path.write_bytes(b"".join(encoder.frames(record) for record in records))
    return str(path)


def test_a_decision_is_shown_with_its_candidates_and_its_end(records: list[Record]) -> None:
    record = next(one for one in records if one.decision.prefill_worker is not None)
    account = Account(record.request_id, decision=record.decision, arrived=0.0)
    account.first_token, account.ended, account.outcome = 0.25, 1.0, "stop"
    log = DecisionLog(1 << 30)
    log._records[record.request_id] = record
    log.ended(account)
    text = io.StringIO()
    explain_view.show(explanation(record), Console(width=250, file=text))
    for word in (record.request_id, "always-remote", "remote: always", record.view_digest, "->", "(itself)"):
        assert word in text.getvalue()
    assert "ended: stop; first token after 250.0 ms" in text.getvalue()


def test_a_replay_under_the_same_policy_is_the_same(log: str) -> None:
    result = CliRunner().invoke(app, ["replay", log])
    assert result.exit_code == 0, result.output
    assert "12 decisions, 12 the same" in result.output


def test_a_replay_under_another_policy_tells_what_changes(log: str, records: list[Record]) -> None:
    remote = sum(one.decision.prefill_worker is not None for one in records)
    result = CliRunner().invoke(app, ["replay", log, "--policy", "always-local", "--json"])
    told = json.loads(result.output)
    assert result.exit_code == 0
    assert (told["decisions"], told["equal"]) == (12, 12 - remote)
    assert told["kinds"]["remote -> local"] == remote
    assert CliRunner().invoke(app, ["replay", log, "--policy", "always-local"]).output.count("r") > remote


def test_a_replay_fails_when_a_policy_does_not_decide_as_it_did(
    log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from router import policies

    monkeypatch.setitem(policies.POLICIES, "always-remote", policies.always_local)
    assert CliRunner().invoke(app, ["replay", log]).exit_code == 1


def test_mistakes_are_named(log: str, tmp_path: Path) -> None:
    wrong = CliRunner().invoke(app, ["replay", log, "--policy", "no-such"])
    assert wrong.exit_code == 2 and "must be one of cost" in wrong.output
    missing = CliRunner().invoke(app, ["replay", str(tmp_path / "missing.log")])
    assert missing.exit_code == 1 and "missing.log" in missing.output
    nobody = CliRunner().invoke(app, ["explain", "r1", "--grpc", "127.0.0.1:1"])
    assert nobody.exit_code == 1 and "nothing listens" in nobody.output
