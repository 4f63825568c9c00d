"""`baton simulate` and `baton plan`: options in, virtual clusters run, tables, JSON and pictures out. Thin.

Heavy imports happen inside, so that `--help` answers at once.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from bench.figures import Slo
    from bench.workload import Workload
    from simulation.serving.cluster import ClusterSpec, Failure
    from simulation.serving.results import PolicyResult

POLICIES = "cost,threshold,always-remote,always-local,colocated"

ConfigArgument = Annotated[
    Path, typer.Argument(help="A deployment with a section `simulate`.", metavar="CONFIG")
]
TraceOption = Annotated[str, typer.Option(help="A .jsonl (Mooncake) or .csv (Azure) file, or synthetic.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE, over the file.", show_default=False)
]
ProfileOption = Annotated[
    str,
    typer.Option(
        "--profile-from",
        help="What steps take: HOST:PORT of a running deployment, or a worker's saved file.",
        show_default="the section simulate",
    ),
]
DurationOption = Annotated[float, typer.Option("--duration", min=0.001, help="Virtual seconds of arrivals.")]
ScaleOption = Annotated[str, typer.Option(help="Lengths times this; a fraction such as 1/32 is fine.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of arrivals, lengths, spreads of steps and failures.")]
SloOption = Annotated[
    str,
    typer.Option(
        help="ttft=1000,itl=50 in ms; also tpot, e2e.", show_default="the deployment's ttft_ms, itl_ms"
    ),
]


def simulate(
    config: ConfigArgument,
    trace: TraceOption,
    policies: Annotated[str, typer.Option(help="Policies, with commas; also threshold:TOKENS.")] = POLICIES,
    slo: SloOption = "",
    rate: Annotated[
        float | None, typer.Option(help="Requests a second.", show_default="the trace's own")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Instead: the trace's own times, so much faster.")
    ] = None,
    rates: Annotated[str, typer.Option(help="A sweep: 1,2,4 requests a second.")] = "",
    duration_s: DurationOption = 300.0,
    warmup_s: Annotated[float, typer.Option("--warmup", min=0.0, help="Seconds before, not counted.")] = 0.0,
    start_s: Annotated[float, typer.Option("--start", min=0.0, help="Begin here in the trace.")] = 0.0,
    input_scale: ScaleOption = "1",
    output_scale: ScaleOption = "1",
    failures: Annotated[
        str, typer.Option(help="WORKER@S+DOWN,... in seconds, such as decode-1@30+20; or mtbf=S,down=S.")
    ] = "",
    seed: SeedOption = 0,
    profile_from: ProfileOption = "",
    overrides: SetOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results.", show_default=False)
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw a picture.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page.", show_default=False)] = None,
) -> None:
    """Serves a trace by a deployment under virtual time, under several policies, and reports what each would reach.

    The same policy, view, prefix index, scheduler and block code as in the server; only steps and links are modelled.
    docs/simulate.md says what is and what is not.
    """
    from bench import build
    from cluster.client import ClientError
    from simulation.serving import report, results

    try:
        if png is not None or html is not None:
            _plotting()
        spec = _cluster(config, overrides, profile_from)
        workload = replace(
            _workload(trace, seed, input_scale, output_scale, start_s),
            duration_s=duration_s,
            warmup_s=warmup_s,
            own_times=rate is None and not rates,
        )
        asked = build.rates(rates) or [build.rate(workload, rate, speedup)]
        goal = _slo(slo, spec)
        pairs = [(name, each) for name in _names(policies) for each in asked]
        found = [_run(spec, workload, name, each, goal, failures, seed) for name, each in pairs]
        report.show(found, _console())
        if json_file is not None:
            json_file.write_bytes(results.to_json(found))
        if png is not None:
            report.draw(found, png)
        if html is not None:
            html.write_text(report.page(found), encoding="utf-8")
    except (
        ValueError,
        OSError,
        ClientError,
    ) as error:  # configurations, traces, lengths, objectives: ValueError
        typer.echo(f"baton: {error}", err=True)
        raise typer.Exit(2) from None


def plan(
    config: ConfigArgument,
    trace: TraceOption,
    gpus: Annotated[int, typer.Option(min=1, help="Devices to use.")],
    slo: SloOption = "",
    attainment: Annotated[float, typer.Option(help="Share of requests that is to be within the SLO.")] = 0.9,
    tensor_parallel: Annotated[str, typer.Option("--tp", help="Sizes to try.")] = "1,2,4,8",
    requests: Annotated[
        int, typer.Option(min=10, help="So many of the trace, the same ones at every rate.")
    ] = 1000,
    start_s: Annotated[float, typer.Option("--start", min=0.0, help="Begin here in the trace.")] = 0.0,
    input_scale: ScaleOption = "1",
    output_scale: ScaleOption = "1",
    seed: SeedOption = 0,
    profile_from: ProfileOption = "",
    overrides: SetOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the table.", show_default=False)
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw a picture.", show_default=False)] = None,
) -> None:
    """Finds how to split devices into prefill and decode workers for a workload and an SLO, or that one should not."""
    from cluster.client import ClientError
    from simulation.serving import plan as plans
    from simulation.serving import report

    try:
        if png is not None:
            _plotting()
        spec = _cluster(config, overrides, profile_from)
        goal = plans.Goal(
            replace(_workload(trace, seed, input_scale, output_scale, start_s), requests=requests),
            _slo(slo, spec),
            gpus,
            attainment,
            seed,
            _sizes(tensor_parallel),
        )
        with _bar("planning") as (progress, task):

            def told(split: plans.Split, done: int, count: int) -> None:
                progress.update(task, completed=done, total=count, description=split.name)

            found = plans.search(spec, goal, told)
        out = _console()
        report.show_plan(found, out)
        said = plans.verdict(found)
        kind = "derived, not measured" if spec.profile.derived else "measured"
        out.print(
            f"{said}\n{spec.profile.name} ({kind}), {goal.slo}, {attainment:.0%} of requests", soft_wrap=True
        )
        if json_file is not None:
            json_file.write_bytes(plans.to_json(found, said))
        if png is not None:
            report.draw_plan(found, f"{spec.profile.name} ({kind}), {gpus} devices, {goal.slo}", png)
    except (ValueError, OSError, ClientError) as error:
        typer.echo(f"baton: {error}", err=True)
        raise typer.Exit(2) from None


# ---- from words to values ----------------------------------------------------------------------------------------


def _cluster(config: Path, overrides: list[str] | None, profile_from: str) -> ClusterSpec:
    from cluster import client
    from cluster.simulate_config import load_cluster

    if profile_from and not Path(profile_from).exists() and re.fullmatch(r"\S+:\d{1,5}", profile_from):
        return load_cluster(
            config, overrides or [], status=client.status(profile_from.removeprefix("grpc://"))
        )
    return load_cluster(config, overrides or [], costs=Path(profile_from) if profile_from else None)


def _workload(trace: str, seed: int, input_scale: str, output_scale: str, start_s: float) -> Workload:
    from bench import build
    from bench.workload import Workload

    return Workload(
        build.source(trace, build.MadeUp()),
        seed=seed,
        input_scale=build.scale(input_scale),
        output_scale=build.scale(output_scale),
        start_s=start_s,
    )


def _names(policies: str) -> list[str]:
    found = [name.strip() for name in policies.split(",") if name.strip()]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"--policies {policies!r}: write names with commas, each once, such as {POLICIES}")
    return found


def _sizes(text: str) -> tuple[int, ...]:
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if any(each < 1 or each & (each - 1) for each in found):
        raise ValueError(f"--tp {text!r}: write powers of two with commas, such as 1,2,4,8")
    return tuple(dict.fromkeys(found))


def _slo(text: str, spec: ClusterSpec) -> Slo:
    """What is given, else what the deployment is to keep."""
    from bench.figures import Slo

    return Slo.parse(text) if text else Slo(ttft=spec.front.ttft_s, itl=spec.front.itl_s)


def _failures(text: str, spec: ClusterSpec, until_s: float, seed: int) -> tuple[Failure, ...]:
    """`decode-1@30+20,prefill-0@50+5`, or `mtbf=600,down=30`: of every worker, drawn from the seed."""
    from simulation.serving.cluster import Failure

    parts = [part.strip() for part in text.split(",") if part.strip()]
    drawn = re.fullmatch(r"mtbf=([\d.]+),down=([\d.]+)", ",".join(parts))
    if drawn is not None:
        mean_s, down_s = float(drawn[1]), float(drawn[2])
        if not mean_s > 0:
            raise ValueError(f"--failures {text!r}: mtbf must be above 0")
        chance, found = random.Random(seed), []
        for role, pool in (("decode", spec.decode), ("prefill", spec.prefill)):
            for number in range(pool.workers):
                at_s = chance.expovariate(1 / mean_s)
                while at_s < until_s:
                    found.append(Failure(f"{role}-{number}", at_s, down_s))
                    at_s += down_s + chance.expovariate(1 / mean_s)
        return tuple(found)
    told = []
    for part in parts:
        match = re.fullmatch(r"([\w-]+)@([\d.]+)\+([\d.]+)", part)
        if match is None:
            raise ValueError(
                f"--failures {part!r}: write WORKER@SECONDS+SECONDS DOWN, such as decode-1@30+20, or mtbf=600,down=30"
            )
        told.append(Failure(match[1], float(match[2]), float(match[3])))
    return tuple(told)


# ---- runs --------------------------------------------------------------------------------------------------------


def _run(
    spec: ClusterSpec, workload: Workload, policy: str, rate: float, slo: Slo, failures: str, seed: int
) -> PolicyResult:
    from simulation.serving.cluster import ServingCluster
    from simulation.serving.results import result

    under = spec.under(policy)
    # The policy aims at what is measured.
    front = replace(under.front, ttft_s=slo.ttft or under.front.ttft_s, itl_s=slo.itl or under.front.itl_s)
    under = replace(under, front=front)
    schedule = workload.schedule(rate)
    broken = _failures(failures, under, schedule.trace.span_s, seed)
    begun = time.process_time()
    with _bar(f"{policy} {rate:.3g}/s") as (progress, task):
        progress.update(task, total=len(schedule.jobs))
        cluster = ServingCluster(under, schedule, seed=seed, failures=broken)
        outcome = cluster.run(lambda over: progress.update(task, completed=over))
    spent = time.process_time() - begun
    typer.echo(
        f"{policy} at {rate:.3g}/s: {outcome.end_s:.0f} s of {len(outcome.workers)} workers in {spent:.1f} s of CPU, "
        f"{outcome.end_s / max(spent, 1e-9):.0f} times real time",
        err=True,
    )
    return result(policy, rate, under, schedule, outcome, slo, seed)


@contextmanager
def _bar(label: str) -> Iterator[tuple[Progress, TaskID]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(label, total=None)


def _console() -> Console:
    from bench.report import console

    return console()


def _plotting() -> None:
    from bench import plots

    try:
        plots.check()
    except plots.PlotError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
