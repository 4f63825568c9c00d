"""Fail points: each file strikes once, only its role and its place; without a folder nothing can."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from kvtransfer import failpoints
from kvtransfer.loopback import LoopbackFabric
from kvtransfer.messages import Abort, Credit, Done


@pytest.fixture
def struck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that this process would have got; points are armed in `tmp_path`, for a prefill worker."""
    monkeypatch.setattr(failpoints, "_folder", tmp_path)
    monkeypatch.setattr(failpoints, "_role", "prefill")
    signals: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append(number))
    return signals


def test_a_file_strikes_once(struck: list[int], tmp_path: Path) -> None:
    (tmp_path / "prefill.before-chunk").write_text("kill\n")
    failpoints.reached("after-last-byte")
    assert not struck
    failpoints.reached("before-chunk")
    failpoints.reached("before-chunk")
    assert struck == [signal.SIGKILL]
    assert [path.name for path in tmp_path.iterdir()] == [f"prefill.before-chunk.{os.getpid()}.claimed"]


def test_another_roles_point_is_not_ours(struck: list[int], tmp_path: Path) -> None:
    (tmp_path / "decode.at-close").write_text("stop")
    failpoints.saw(Done(1, 0, 0.0, 0.0))
    assert not struck


def test_messages_are_points(struck: list[int], tmp_path: Path) -> None:
    for message, point in ((Credit(1, []), "at-credit"), (Done(1, 0, 0.0, 0.0), "at-close")):
        (tmp_path / f"prefill.{point}").write_text("stop")
        failpoints.saw(Abort(1, "no"))
        failpoints.saw(message)
    assert struck == [signal.SIGSTOP, signal.SIGSTOP]


def test_half_a_chunk_is_written(struck: list[int], tmp_path: Path) -> None:
    fabric = LoopbackFabric(0)
    sender, receiver = (
        fabric.open("sender", staging_bytes=64, landing_bytes=0),
        fabric.open("receiver", staging_bytes=0, landing_bytes=64),
    )
    sender.connect("receiver", receiver.describe())
    sender.staging[:] = np.arange(1, 65)
    rows = np.array([[0, 0, 16], [16, 16, 16]], dtype=np.uint64)
    assert not failpoints.half_written(sender, "receiver", rows, 32)
    assert not receiver.landing.any()
    (tmp_path / "prefill.in-chunk").write_text("kill")
    failpoints.half_written(sender, "receiver", rows, 32)
    assert struck == [signal.SIGKILL]
    assert receiver.landing[32:48].tolist() == list(range(1, 17)) and not receiver.landing[48:].any()
    (tmp_path / "prefill.in-chunk").write_text("kill")
    failpoints.half_written(sender, "receiver", rows[:1], 0)
    assert receiver.landing[:8].all() and not receiver.landing[8:16].any()


def test_without_a_folder_nothing_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failpoints.arm("", "prefill")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefill.before-chunk").write_text("kill")
    failpoints.reached("before-chunk")
    failpoints.saw(Done(1, 0, 0.0, 0.0))
    assert (tmp_path / "prefill.before-chunk").exists()
