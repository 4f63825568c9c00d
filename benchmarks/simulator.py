"""The simulator against a live deployment, and how quick it is.

`live`: starts the demo model (plain launcher, one prefill and one decode worker), sends the same arrivals twice with
`baton bench` (what two live runs differ by is the measure), reads what its workers have learned of their steps, and
simulates those arrivals with it. `speed`: virtual over CPU seconds, for some sizes.

    python benchmarks/simulator.py live --rate 4 --duration 60
    python benchmarks/simulator.py speed --trace conversation.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
START_S, STOP_S = 180.0, 30.0
FIGURES = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("itl_ms", "p50"), ("itl_ms", "p99"))
SETTINGS = ("cluster.launcher=plain", "router.http=127.0.0.1:0", "router.grpc=127.0.0.1:0")


def live(options: argparse.Namespace) -> None:
    """Prints a table, and JSON on request."""
    from bench.build import SYNTHETIC
    from cluster import client
    from cluster.simulate_config import load_cluster

    folder = Path(tempfile.mkdtemp(prefix="baton-simulator-"))
    config = ROOT / "deploy" / "local-1p1d.yaml"
    extra = [
        part for setting in (*SETTINGS, f"router.policy={options.policy}") for part in ("--set", setting)
    ]
    baton = [sys.executable, "-m", "cluster.cli"]
    server = subprocess.Popen(
        [*baton, "serve", str(config), *extra], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        http, grpc = _ready(server)
        load = [
            "--trace",
            options.trace or SYNTHETIC,
            "--rate",
            str(options.rate),
            "--seed",
            str(options.seed),
        ]
        load += ["--duration", str(options.duration), "--warmup", str(options.warmup), "--slo", options.slo]
        if options.trace:
            load += ["--input-scale", options.input_scale, "--output-scale", options.output_scale]
        else:
            load += ["--input-tokens", "lognormal:300:0.8", "--output-tokens", "lognormal:40:0.5"]
        runs = []
        for number in range(options.runs):
            file = folder / f"live-{number}.json"
            subprocess.run(
                [*baton, "bench", "--url", f"http://{http}", *load, "--json", str(file)], cwd=ROOT, check=True
            )
            runs.append(json.loads(file.read_text())["runs"][0]["summary"])
        spec = load_cluster(config, [f"router.policy={options.policy}"], status=client.status(grpc))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(STOP_S)
    print(f"profile: {spec.profile}", file=sys.stderr)
    spec = replace(spec, profile=replace(spec.profile, message_s=options.message_ms / 1e3))
    simulated = _simulated(spec, options)
    print(f"{'figure':12} {'live':>10} {'live again':>10} {'spread':>8} {'simulated':>10} {'difference':>10}")
    for name, quantile in FIGURES:
        found = [run[name][quantile] for run in runs]
        mean = sum(found) / len(found)
        ours = simulated[name][quantile]
        spread = max(found) / min(found) - 1
        print(
            f"{name.removesuffix('_ms') + ' ' + quantile:12} {found[0]:8.1f} ms {found[-1]:7.1f} ms {spread:8.0%} "
            f"{ours:7.1f} ms {ours / mean - 1:+10.0%}"
        )
    for label, one in (("live", runs[0]), ("simulated", simulated)):
        print(
            f"{label}: prefilled {one['prefilled']}, attainment {one['attainment']:.3f}, load {os.getloadavg()[0]:.1f}"
        )


def _ready(server: subprocess.Popen[str]) -> tuple[str, str]:
    """The addresses that the deployment prints when it is ready."""
    assert server.stdout is not None
    until = time.monotonic() + START_S
    for line in server.stdout:
        found = re.search(r"baton ready http=(\S+) grpc=(\S+)", line)
        if found is not None:
            return found[1], found[2]
        if time.monotonic() > until:
            break
    raise SystemExit("the deployment did not start")


def _simulated(spec: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The same arrivals and lengths under virtual time."""
    import msgspec

    from bench import build
    from bench.figures import Slo
    from bench.workload import Workload
    from simulation.serving.cluster import ServingCluster
    from simulation.serving.results import result

    made_up = build.MadeUp() if options.trace else build.MadeUp("lognormal:300:0.8", "lognormal:40:0.5")
    workload = Workload(
        build.source(options.trace or build.SYNTHETIC, made_up),
        seed=options.seed,
        input_scale=build.scale(options.input_scale) if options.trace else 1.0,
        output_scale=build.scale(options.output_scale) if options.trace else 1.0,
        duration_s=options.duration,
        warmup_s=options.warmup,
    )
    schedule = workload.schedule(options.rate)
    outcome = ServingCluster(spec, schedule, seed=options.seed).run()
    told = result(options.policy, options.rate, spec, schedule, outcome, Slo.parse(options.slo), options.seed)
    found: dict[str, Any] = msgspec.to_builtins(told.summary)
    return found


def speed(options: argparse.Namespace) -> None:
    """Virtual seconds for each second of CPU, without reading the trace and summing up."""
    from bench.traces import load
    from bench.workload import Workload
    from cluster.simulate_config import load_cluster
    from simulation.serving.cluster import ServingCluster

    config = ROOT / "deploy" / "simulate" / "h200-8b.yaml"
    trace = load(Path(options.trace))
    print(f"load {os.getloadavg()[0]:.1f}; workers, rate, requests, virtual s, CPU s, virtual / CPU")
    for workers, rate, requests in (
        (16, trace.rate, 600),
        (16, 4 * trace.rate, 1200),
        (1000, 60 * trace.rate, 2000),
    ):
        spec = load_cluster(config, [f"{role}.replicas={workers // 2}" for role in ("prefill", "decode")])
        if workers > 100:  # less memory for the books of a thousand ledgers
            spec = replace(spec, prefill=_small(spec.prefill), decode=_small(spec.decode))
        schedule = Workload(trace, requests=requests).schedule(rate)
        best = 0.0
        for _ in range(options.runs):
            cluster = ServingCluster(spec, schedule)
            begun = time.process_time()
            outcome = cluster.run()
            spent = time.process_time() - begun
            best = max(best, outcome.end_s / spent)
        print(
            f"{workers:6} {rate:7.2f} {requests:6} {outcome.end_s:8.0f} {outcome.end_s / best:8.2f} {best:8.0f}"
        )


def _small(pool: Any) -> Any:
    return replace(pool, block_size=512)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("live", "speed"))
    parser.add_argument("--trace", default="")
    parser.add_argument("--rate", type=float, default=3.0)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--warmup", type=float, default=10.0)
    parser.add_argument("--input-scale", default="1/32")
    parser.add_argument("--output-scale", default="1/16")
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--slo", default="ttft=1000,itl=100")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--message-ms", type=float, default=1.0)
    options = parser.parse_args()
    (live if options.what == "live" else speed)(options)


if __name__ == "__main__":
    main()
