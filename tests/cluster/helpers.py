"""What the tests of this room share: a model folder to misbehave by, waiting with a limit, and finding processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

LIMIT_S = 40.0  # generous: the machine may be busy; a test that passes never waits that long

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}


def make_model(folder: Path) -> Path:
    """A folder that the configuration accepts; the fakes look there for their faults."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


T = TypeVar("T")


async def eventually(probe: Callable[[], T], what: str, limit_s: float = LIMIT_S) -> T:
    """The first true answer of `probe`; fails when there is none in time."""
    deadline = time.monotonic() + limit_s
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.02)
    return answer


def carrying(variable: str, value: str) -> list[int]:
    """Running processes that were started with this environment variable, zombies left out."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                entries = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"{variable}={value}".encode() in entries:
                found.append(int(name))
    return found


def running(pid: int) -> bool:
    """True while the process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def members(folder: Path, who: str) -> dict[str, Any]:
    """The newest list that this fake was told: {"version", "members": {worker_id: incarnation}, "restarts": {}}."""
    try:
        told: dict[str, Any] = json.loads((folder / f"members-{who}.json").read_text())
    except FileNotFoundError:
        return {"version": 0, "members": {}}
    return told


def clear_away(process: subprocess.Popen[bytes], variable: str, value: str) -> None:
    """Kills a `baton serve` and waits for its guard to do its work; kills what is left all the same."""
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    deadline = time.monotonic() + LIMIT_S
    while carrying(variable, value) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in carrying(variable, value):
        os.kill(pid, signal.SIGKILL)
