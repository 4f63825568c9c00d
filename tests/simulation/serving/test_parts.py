"""Names, profiles, the plan's bound and what the command line makes of a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from baton.v1 import inference_pb2 as api
from bench.figures import Slo
from bench.prompts import TokenPrompts
from bench.synthetic import Synthetic
from bench.traces import Trace, TraceRequest
from bench.workload import Workload
from cluster.cli import app
from cluster.config_errors import ConfigError
from cluster.simulate_config import load_cluster
from engine.api import Spread
from engine.prefix import names
from simulation.serving.names import NamedHints, TraceNames, names_of
from simulation.serving.plan import Goal, Split, bound, deployment, search, shared_share, splits, verdict
from simulation.serving.profiles import noise
from tests.simulation.serving.clusters import cluster, profile, run

DEPLOY = Path(__file__).resolve().parents[3] / "deploy" / "simulate"


# ---- names -------------------------------------------------------------------------------------------------------


@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 60), st.lists(st.integers(0, 2), max_size=6)), min_size=2, max_size=6
    ),
    block_tokens=st.sampled_from([4.0, 7.5, 16.0]),
    block_size=st.sampled_from([2, 4, 16]),
)
def test_names_are_equal_where_real_ones_are(
    prompts: list[tuple[int, list[int]]], block_tokens: float, block_size: int
) -> None:
    requests = tuple(
        TraceRequest(number, 0.0, tokens, 1, tuple(blocks)) for number, (tokens, blocks) in enumerate(prompts)
    )
    trace = Trace("test", requests, 1.0, block_tokens)
    ours = TraceNames(trace, block_size)
    build = TokenPrompts(trace, end_id=1 << 31).build
    real = [list(names(build(request), block_size)) for request in requests]
    made = [names_of(ours.hints(request)) for request in requests]
    assert [len(one) for one in made] == [len(one) for one in real]
    for first in range(len(requests)):
        for second in range(first):
            equal = [a == b for a, b in zip(real[first], real[second], strict=False)]
            assert [a == b for a, b in zip(made[first], made[second], strict=False)] == equal
            chains = [
                NamedHints({block_size: ours}, requests[at]).chain(block_size) for at in (first, second)
            ]
            assert chains[0].common_end(chains[1], 0) == sum(equal)


# ---- profiles ----------------------------------------------------------------------------------------------------


def test_noise_has_the_quantiles_and_an_order_of_its_own() -> None:
    drawn = noise(Spread(1.0, 1.3, 2.0), seed=1)
    assert np.quantile(drawn, (0.5, 0.9, 0.99)) == pytest.approx((1.0, 1.3, 2.0), rel=0.01)
    assert sorted(noise(Spread(1.0, 1.3, 2.0), seed=2)) == sorted(drawn)
    assert (noise(Spread(1.0, 1.3, 2.0), seed=2) != drawn).any()
    assert (noise(Spread(1.0, 1.0, 1.0), seed=1) == 1).all()


def test_tensor_parallelism_divides_steps_and_adds_collectives() -> None:
    device = profile(doubling_efficiency=0.8, collective_s=1e-3, memory_gib=10.0, weights_gib=16.0)
    one, four = device.costs(1), device.costs(4)
    assert four.token_s == pytest.approx(one.token_s / 1.6**2)
    assert four.base_s == pytest.approx(one.base_s / 1.6**2 + 1e-3)
    assert device.handoff(4, 2)[1] == pytest.approx(device.handoff_byte_s / 2)
    assert device.kv_gib(1) < 0 < device.kv_gib(2)
    with pytest.raises(ValueError, match="memory_gib"):
        profile().kv_gib(1)
    with pytest.raises(ValueError, match="doubling_efficiency"):
        profile(doubling_efficiency=0.4)


# ---- plans -------------------------------------------------------------------------------------------------------

DEVICE = profile(memory_gib=1.0, weights_gib=0.5)
LONG = Synthetic(1.0, input_tokens="uniform:600:900", output_tokens="30")
SHORT = Synthetic(1.0, input_tokens="uniform:10:30", output_tokens="60")


def goal(source: Synthetic, slo: str, gpus: int = 3) -> Goal:
    return Goal(Workload(source, requests=60), Slo.parse(slo), gpus, tensor_parallel=(1,))


def test_splits_use_every_device_once() -> None:
    found = list(splits(DEVICE, 4, (1, 2, 8)))
    assert all(split.gpus == 4 for split in found)
    assert len({split.name for split in found}) == len(found)
    assert {split.name for split in found if not split.prefill} == {"4 mixed tp1", "2 mixed tp2"}
    assert "2P tp1 + 1D tp2" in {split.name for split in found}
    large = profile(memory_gib=1.0, weights_gib=1.5)
    assert all(split.decode_tp == 2 for split in splits(large, 4, (1, 2)))


def test_no_simulated_rate_exceeds_its_bound() -> None:
    found = search(cluster(device=DEVICE), goal(LONG, "ttft=500,itl=40"))
    simulated = [split for split in found if split.result is not None]
    assert simulated
    assert all(split.rate <= 1.05 * split.bound for split in simulated)
    assert all(split.note for split in found if split.result is None)
    assert found[0].rate == max(split.rate for split in found)


@pytest.mark.parametrize("shape", [(0, 1), (1, 1), (0, 3), (2, 1)])
@pytest.mark.parametrize("source", [LONG, SHORT], ids=["long", "short"])
def test_nothing_is_quicker_than_the_bound_and_it_is_near(shape: tuple[int, int], source: Synthetic) -> None:
    """All requests at once: what the deployment can do at most."""
    trace = Workload(source, requests=200).schedule(1e4)
    split = Split(shape[0], 1, shape[1], 1)
    spec = cluster(*shape, device=DEVICE)
    most = bound(split, spec, trace.trace, Slo())
    outcome = run(deployment(split, spec), trace)
    assert all(record.ok for record in outcome.run.records)
    assert 0.4 * most < 200 / outcome.end_s < 1.05 * most


def test_a_plan_says_when_colocation_is_better() -> None:
    """Hardly anything to prefill and a target for gaps that mixed steps keep too: nothing is gained by a split."""
    found = search(cluster(device=DEVICE), goal(SHORT, "ttft=500,itl=40"))
    assert verdict(found).startswith("colocation is as good or better here")
    # Gaps that any prefill beside them breaks: only a split keeps them.
    found = search(cluster(device=DEVICE), goal(LONG, "ttft=800,itl=9"))
    assert found[0].prefill and verdict(found).startswith("best: ")
    with pytest.raises(ValueError, match="fits on no split"):
        search(cluster(device=profile(memory_gib=1.0, weights_gib=99.0)), goal(SHORT, "ttft=500"))


def test_what_is_shared_counts_once() -> None:
    requests = (
        TraceRequest(0, 0.0, 128, 1, (1, 2)),
        TraceRequest(1, 0.0, 128, 1, (1, 3)),
        TraceRequest(2, 0.0, 64, 1, (3,)),  # 3 was seen, but in another place of another prefix
    )
    trace = Trace("test", requests, 1.0, 64)
    assert shared_share(trace) == pytest.approx((64 + 64) / 320)
    alone = next(splits(DEVICE, 1, (1,)))
    assert bound(alone, cluster(device=DEVICE), trace, Slo(itl=1e-3)) == 0.0
    assert deployment(alone, cluster(device=DEVICE)).decode.kv_bytes == (1 << 30) // 2


# ---- files and the command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_say_that_they_are_derived(file: Path) -> None:
    spec = load_cluster(file, [])
    assert spec.profile.derived and spec.ranks >= 8
    assert spec.profile.kv_gib(spec.decode.tensor_parallel) > 0


def test_what_is_wrong_with_a_file_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text("decode: {replicas: 2}\n")
    with pytest.raises(ConfigError, match="has no section `simulate`"):
        load_cluster(bare, [])
    text = (DEPLOY / "h200-8b.yaml").read_text()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("handoff_gbps: 320", "handoff_gpbs: 320"))
    with pytest.raises(ConfigError, match="did you mean"):
        load_cluster(wrong, [])
    with pytest.raises(ConfigError, match="h200-8b"):
        load_cluster(DEPLOY / "h200-8b.yaml", ["decode.replicas=0"])


def test_profiles_come_from_status_and_from_a_workers_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("prefill: {replicas: 1}\n")
    costs = api.WorkerCosts(base_s=1e-3, token_s=2e-4, decode_spread=[1.0, 1.1, 1.4], seen=9)
    costs.handoffs.add(peer="prefill-0", latency_s=0.02, byte_s=3e-10, seen=4)
    decode = api.WorkerStatus(role="decode", alive=True, costs=costs, queue=api.WorkerQueue(token_bytes=512))
    prefill = api.WorkerStatus(role="prefill", alive=True, costs=api.WorkerCosts(base_s=2e-3, seen=1))
    device = load_cluster(config, [], status=api.StatusResponse(workers=[decode, prefill])).profile
    assert (device.step.base_s, device.costs(1, "prefill").base_s) == (1e-3, 2e-3)
    assert (device.kv_token_bytes, device.handoff(1, 1)) == (512, (0.02, 3e-10))
    assert device.decode_spread.p99 == pytest.approx(1.4) and not device.derived
    with pytest.raises(ConfigError, match="no decode worker there has measured"):
        load_cluster(config, [], status=api.StatusResponse(workers=[prefill]))
    saved = tmp_path / "demo-cpu.json"
    saved.write_text('{"step": {"base_s": 0.005}, "seen": 12}')
    assert load_cluster(config, [], costs=saved).profile.step.base_s == 0.005
    saved.write_text("{")
    with pytest.raises(ConfigError, match="demo-cpu.json"):
        load_cluster(config, [], costs=saved)


def _trace(path: Path) -> Path:
    rows = [
        {
            "timestamp": 200 * number,
            "input_length": 700,
            "output_length": 20,
            "hash_ids": [number % 3, number],
        }
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_simulate_writes_a_list_of_policies_and_the_same_one_again(tmp_path: Path) -> None:
    trace = _trace(tmp_path / "t.jsonl")
    arguments = ["simulate", str(DEPLOY / "h200-8b.yaml"), "--trace", str(trace), "--duration", "5"]
    written = []
    for number in range(2):
        file = tmp_path / f"{number}.json"
        done = CliRunner().invoke(
            app, [*arguments, "--policies", "cost,threshold:9,colocated", "--seed", "3", "--json", str(file)]
        )
        assert done.exit_code == 0, done.output
        written.append(file.read_bytes())
    assert written[0] == written[1]
    found = json.loads(written[0])
    assert [one["policy"] for one in found] == ["cost", "threshold:9", "colocated"]
    for one in found:
        assert one["goodput_rps"] > 0 and one["derived"] is True
        assert one["ttft_p99_ms"] >= one["ttft_p50_ms"] > 0 and one["itl_p99_ms"] > 0
        assert len(one["decisions"]) == one["summary"]["requests"]
        assert 0 <= one["remote_share"] <= 1
        assert one["cost_per_million_output_tokens_usd"] > one["cost_per_million_tokens_usd"] > 0
    assert found[2]["workers"] == {"decode": 8} and found[2]["remote_share"] == 0


def test_simulate_draws_and_breaks_workers(tmp_path: Path) -> None:
    trace = _trace(tmp_path / "t.jsonl")
    png, page = tmp_path / "a.png", tmp_path / "a.html"
    done = CliRunner().invoke(
        app,
        [
            "simulate",
            str(DEPLOY / "h200-8b.yaml"),
            "--trace",
            str(trace),
            "--duration",
            "5",
            "--policies",
            "cost",
            "--failures",
            "decode-1@1+2,prefill-0@2+1",
            "--png",
            str(png),
            "--html",
            str(page),
        ],
    )
    assert done.exit_code == 0, done.output
    assert png.read_bytes().startswith(b"\x89PNG") and "DERIVED" not in page.read_text()
    assert "derived, not measured" in page.read_text()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--failures", "decode-1"], "WORKER@SECONDS"),
        (["--failures", "decode-77@1+1"], "no worker 'decode-77'"),
        (["--policies", "cost,cost"], "each once"),
        (["--rate", "1", "--speedup", "2"], "give one"),
        (["--slo", "tft=3"], "no objective"),
    ],
)
def test_mistakes_on_the_command_line_are_named(tmp_path: Path, option: list[str], said: str) -> None:
    trace = _trace(tmp_path / "t.jsonl")
    done = CliRunner().invoke(
        app, ["simulate", str(DEPLOY / "h200-8b.yaml"), "--trace", str(trace), "--duration", "5", *option]
    )
    assert done.exit_code == 2 and said in done.output


def test_plan_prints_splits_and_a_verdict(tmp_path: Path) -> None:
    trace, file, png = _trace(tmp_path / "t.jsonl"), tmp_path / "p.json", tmp_path / "p.png"
    done = CliRunner().invoke(
        app,
        [
            *("plan", str(DEPLOY / "h200-8b.yaml"), "--trace", str(trace), "--gpus", "2", "--tp", "1"),
            *("--requests", "20", "--slo", "ttft=2000,itl=50", "--json", str(file), "--png", str(png)),
        ],
    )
    assert done.exit_code == 0, done.output
    told = json.loads(file.read_bytes())
    assert told["verdict"] in done.output.replace("\n", " ")
    assert {(one["prefill"], one["decode"]) for one in told["splits"]} == {(0, 2), (1, 1)}
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_decode_worker_has_the_last_word() -> None:
    """The router believes what it heard; the worker looks: a decision may become another, and both are told."""
    source = Synthetic(
        6.0, input_tokens="uniform:50:900", output_tokens="20", prefix_groups=2, prefix_tokens=512
    )
    outcome = run(cluster(1, 1), Workload(source, duration_s=5.0).schedule(6.0))
    assert all(one.became in ("local", "remote", "mixed", "cached") for one in outcome.decisions)
