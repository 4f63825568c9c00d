"""The benchmark for GPUs where there is none: tiny shapes end to end, and what it must survive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_bench, gpu_engine

ROOT = Path(__file__).resolve().parents[2]


def figure(value: float | None, **changes: Any) -> dict[str, Any]:
    made = {"key": "k", "name": "n", "value": value, "unit": "ms", "bar": 4.4, "stretch": 3.9, "limit": 3.5}
    return made | {"more_is_better": False, "note": "", "section_limit": False} | changes


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_smoke_form_measures_every_part_of_the_engine(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    names = ["limits", "decode", "prefill", "handoff", "deterministic"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--only", ",".join(names), "--json", str(file)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    assert [(section["name"], section["error"]) for section in report["sections"]] == [(n, "") for n in names]
    found = {each["key"]: each for section in report["sections"] for each in section["figures"]}
    wanted = ("decode_1", "decode_256", "host_256", "prefill_48", "handoff", "read", "copy", "gemm")
    assert all(found[key]["value"] > 0 for key in wanted), found
    assert found["hidden"]["value"] is not None  # below 0 where the prompt is too short to hide anything
    assert found["decode_256"]["of_limit"] > 0 and found["deterministic"]["value"] is None


def test_a_section_that_fails_says_why_and_the_next_one_goes_on() -> None:
    code = """
print("figure {}")
print("working")
print("failed OutOfMemoryError: 15 GiB")
print("done")
"""
    first, second = gpu.run_sections(script(code), ["a", "b"], 60)
    assert first.figures == [{}] and first.error == "OutOfMemoryError: 15 GiB"
    assert not second.figures and not second.error


def test_a_process_that_dies_or_hangs_costs_only_what_it_had_not_done() -> None:
    code = "import sys; print('done', flush=True); sys.exit('CUDA error: an illegal memory access')"
    first, second = gpu.run_sections(script(code), ["a", "b"], 60)
    assert not first.error
    assert second.error == "its process ended with 1: CUDA error: an illegal memory access"
    code = "import time; print('figure {}\\ndone\\nfigure {}', flush=True); time.sleep(600)"
    first, second = gpu.run_sections(script(code), ["a", "b"], 2)
    assert not first.error and second.figures == [{}] and second.error == "ran past its 2 s"


def test_bars_and_shares_look_the_right_way() -> None:
    assert [gpu.verdict(figure(value)) for value in (3.8, 4.4, 4.5, None)] == ["stretch", "bar", "below", ""]
    more = {"more_is_better": True, "bar": 14000.0, "stretch": 17000.0, "limit": 20000.0}
    assert [gpu.verdict(figure(value, **more)) for value in (17000, 15000, 9000)] == [
        "stretch",
        "bar",
        "below",
    ]
    assert gpu.verdict(figure(1.0, bar=None)) == ""
    assert gpu.reached(figure(7.0)) == 0.5 and gpu.reached(figure(10000.0, **more)) == 0.5
    assert gpu.reached(figure(None)) is None and gpu.reached(figure(7.0, limit=None)) is None


def test_idle_time_is_told_apart_between_steps_and_within_one() -> None:
    def event(ts: float, dur: float, name: str = "gemm", cat: str = "kernel") -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur}

    read = ("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy")
    events = [
        event(0, 10),
        event(4, 3),  # beside the first
        event(12, 5),  # 2 within
        event(20, 1, *read),  # 3 within
        event(71, 9),  # 50 between
        event(80, 1, *read),
        event(111, 4),  # 30 between
        event(115, 1, *read),
        event(0, 500, "step", "cpu_op"),
    ]
    between, within = gpu_engine.idle(events, 3)
    assert between == 40.0 and within == pytest.approx(5 / 3)
    with pytest.raises(ValueError, match="no work"):
        gpu_engine.idle([event(0, 1, "step", "cpu_op")], 1)
    with pytest.raises(ValueError, match="no tokens"):
        gpu_engine.idle([event(0, 1)], 1)


def test_the_model_is_llama_3_1_8b() -> None:
    shape = gpu_bench.LLAMA_8B
    assert shape.streamed + shape.head == pytest.approx(8.03e9, rel=0.001)
    assert 2 * shape.streamed == pytest.approx(15.01e9, rel=0.001) and shape.token_bytes == 128 << 10
