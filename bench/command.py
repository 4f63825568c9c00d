"""`baton bench`: options in, `bench.session` run, tables, JSON and pictures out. Thin; added to the command line by
`cluster.cli`. Heavy imports happen inside, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SCALE_HELP = "Lengths of {} times this; a fraction such as 1/32 is fine."

_URL = "http://127.0.0.1:8000"
Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        help="[NAME=]http://HOST:PORT of an OpenAI server, or grpc://HOST:PORT of Baton. Several: A B A B.",
        show_default=_URL,
    ),
]


def bench(
    context: typer.Context,
    url: Urls = None,
    trace: Annotated[
        str, typer.Option(help="A .jsonl (Mooncake) or .csv (Azure) file, or synthetic.")
    ] = "synthetic",
    slo: Annotated[str, typer.Option(help="ttft=500,itl=50 in ms; also tpot, e2e. See docs/bench.md.")] = "",
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second, in the time of the run.", show_default="the trace's own, or 1"),
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Instead: the trace's own times, so much faster.")
    ] = None,
    duration_s: Annotated[float, typer.Option("--duration", help="Seconds that are measured.")] = 60.0,
    warmup_s: Annotated[float, typer.Option("--warmup", help="Seconds before that, not counted.")] = 0.0,
    requests: Annotated[int, typer.Option(min=0, help="Instead of a duration: so many. 0: by duration.")] = 0,
    start_s: Annotated[
        float, typer.Option("--start", min=0.0, help="Begin at this second of the trace.")
    ] = 0.0,
    input_scale: Annotated[str, typer.Option(help=_SCALE_HELP.format("prompts"))] = "1",
    output_scale: Annotated[str, typer.Option(help=_SCALE_HELP.format("answers"))] = "1",
    max_input: Annotated[int, typer.Option(min=0, help="Drop longer prompts; after scaling. 0: keep.")] = 0,
    max_output: Annotated[int, typer.Option(min=0, help="Drop longer answers; after scaling. 0: keep.")] = 0,
    input_tokens: Annotated[
        str | None,
        typer.Option(
            help="synthetic: N, lognormal:MEAN:CV, exponential:MEAN, uniform:A:B.",
            show_default="lognormal:512:1",
        ),
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(help="synthetic: the same for answers.", show_default="lognormal:128:1")
    ] = None,
    arrivals: Annotated[
        str | None, typer.Option(help="synthetic: poisson, uniform or gamma:CV.", show_default="poisson")
    ] = None,
    prefix_groups: Annotated[int, typer.Option(min=0, help="synthetic: so many shared prefixes.")] = 0,
    prefix_tokens: Annotated[int, typer.Option(min=0, help="synthetic: of this length.")] = 0,
    prefix_share: Annotated[float, typer.Option(help="synthetic: share of requests that have one.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    salt: Annotated[
        str, typer.Option(help="Of the prompts' content.", show_default="drawn: nothing is cached")
    ] = "",
    api: Annotated[str, typer.Option(help="completions or chat, for HTTP.")] = "completions",
    model: Annotated[str, typer.Option(help="Empty: the first that the server lists.")] = "",
    prompts: Annotated[
        str, typer.Option(help="ids, text, or auto: ids where the server takes them.")
    ] = "auto",
    end_id: Annotated[int, typer.Option(min=200, help="Token ids of prompts are below this.")] = 1000,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Answers have the trace's length.")] = True,
    header: Annotated[
        list[str] | None,
        typer.Option(help="'Name: value', with every request; repeatable.", show_default=False),
    ] = None,
    vary_header: Annotated[
        str, typer.Option(help="'Name: a|b': sides that differ in this header only.")
    ] = "",
    body: Annotated[str, typer.Option(help="JSON object of more fields for every request.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How often each side runs, in turn.")] = 1,
    rates: Annotated[str, typer.Option(help="A sweep: 1,2,4 requests a second.")] = "",
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Search the highest rate within the SLO.")
    ] = False,
    attainment: Annotated[float, typer.Option(help="Share within the SLO that --find-rate wants.")] = 0.9,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one request.")] = 300.0,
    drain_s: Annotated[
        float, typer.Option("--drain", min=0.0, help="Seconds for what is open at the end.")
    ] = 300.0,
    max_open: Annotated[
        int, typer.Option(min=0, help="Hold back beyond so many open requests. 0: open loop.")
    ] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the whole report.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a PNG.", show_default=False)] = None,
    records: Annotated[
        Path | None, typer.Option(help="Write every request, one JSON object a line.", show_default=False)
    ] = None,
) -> None:
    """Loads a live server with a trace, open loop, and reports TTFT, ITL, TPOT, E2E and goodput.

    Works against any server with OpenAI's API. docs/bench.md defines every figure.
    """
    from bench import build
    from bench.door import Asking, DoorError
    from bench.figures import RateSearch, Slo
    from bench.plots import PlotError
    from bench.run import Wishes, run
    from bench.session import Limits
    from bench.workload import Workload

    try:
        objectives = Slo.parse(slo)
        made_up = build.MadeUp(
            input_tokens, output_tokens, arrivals, prefix_groups, prefix_tokens, prefix_share
        )
        workload = Workload(
            build.source(trace, made_up),
            seed=seed,
            input_scale=build.scale(input_scale),
            output_scale=build.scale(output_scale),
            start_s=start_s,
            duration_s=duration_s,
            warmup_s=warmup_s,
            requests=requests,
            max_input=max_input,
            max_output=max_output,
            own_times=rate is None and not rates and not find_rate,
        )
        asking = Asking(
            model=model,
            prompts=prompts,
            end_id=end_id,
            temperature=temperature,
            ignore_eos=ignore_eos,
            extra=build.fields(body),
            timeout_s=timeout_s,
        )
        first = build.rate(workload, rate, speedup)
        wishes = Wishes(
            sides=build.sides(url or [_URL], api, asking, header or [], vary_header),
            workload=workload,
            slo=objectives,
            limits=Limits(timeout_s, drain_s, max_open),
            rate=first,
            rounds=rounds,
            rates=build.rates(rates),
            search=RateSearch(first, attainment=attainment) if find_rate else None,
            salt=salt,
            json_file=json_file,
            plot=plot,
            records=records,
            options=build.told(context.params),
        )
        status = run(wishes)
    except (DoorError, PlotError, ValueError, OSError) as error:  # traces, lengths, objectives: ValueError
        typer.echo(f"baton: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(status)
