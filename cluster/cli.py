"""The command line: `baton serve`, `generate`, `status`, `doctor`, `explain`, `replay`, `bench`, `simulate`, `plan`.

Parses, calls, prints.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bench.command import bench
from cluster.simulate import plan, simulate

GRPC = "127.0.0.1:8001"
HTTP = "127.0.0.1:8000"

app = typer.Typer(
    name="baton",
    help="Serves large language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

GrpcOption = Annotated[str, typer.Option("--grpc", "--url", help="HOST:PORT of the router's gRPC door.")]


def main() -> None:
    """The `baton` command."""
    app()


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; none: the defaults.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="SECTION.KEY=VALUE, over the file; may be repeated.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray to join: HOST:PORT of its head, or auto.", show_default=False),
    ] = None,
) -> None:
    """Starts a deployment and runs it until Ctrl-C or SIGTERM.

    Prints one line on standard output when everything is ready: baton ready http=HOST:PORT grpc=HOST:PORT
    """
    import os

    # Ray starts its processes with fork while our channels are open; gRPC's own fork handlers only complain of that.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from cluster.config import load
    from cluster.config_errors import ConfigError
    from cluster.serve import serve as run

    try:
        also = [f'cluster.address="{address}"'] if address is not None else []
        status = run(load(config, [*(overrides or ()), *also]))
    except ConfigError as error:
        _fail(str(error), 2)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a Ray start that was cut short leaves a thread that would never let the interpreter end.
    os._exit(status)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    grpc_address: GrpcOption = GRPC,
    model: Annotated[str, typer.Option(help="Empty: the one that is served.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 = greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0 = off.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A stop string; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="As a chat message, over HTTP.")] = False,
    http_address: Annotated[
        str, typer.Option("--http", help="HOST:PORT of the HTTP door, for --chat.")
    ] = HTTP,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds for the whole answer.")
    ] = 300.0,
) -> None:
    """Streams one answer to standard output, then one line about it to standard error."""
    from cluster import client

    ask = client.Ask(
        prompt=sys.stdin.read() if prompt == "-" else prompt,
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        timeout_s=timeout_s,
    )
    try:
        line = client.chat(http_address, ask, _write) if chat else client.generate(grpc_address, ask, _write)
    except client.ClientError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("cancelled", 130)
    _write("\n")
    print(line, file=sys.stderr)


@app.command()
def status(
    grpc_address: GrpcOption = GRPC,
    as_json: Annotated[bool, typer.Option("--json", help="The whole answer as JSON.")] = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Where every block and landing slot is, and who holds it.")
    ] = False,
    oldest: Annotated[
        int, typer.Option(min=1, help="With --ledger: so many owners and leases of each worker.")
    ] = 16,
) -> None:
    """Shows the router and its workers. Exits with 1 when nothing answers."""
    from cluster import client, status_view

    try:
        answer = client.status(grpc_address)
        held = client.ledgers(grpc_address, oldest) if ledger else None
    except client.ClientError as error:
        _fail(str(error), 1)
    if as_json:
        print(status_view.as_json(held or answer))
    else:
        status_view.show(answer, held)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; none: the defaults.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="SECTION.KEY=VALUE, over the file; may be repeated.", show_default=False),
    ] = None,
    running: Annotated[
        bool, typer.Option("--running", help="The deployment is up: its ports need not be free.")
    ] = False,
) -> None:
    """Looks at this machine, tries the transports, says what helps. Exits with 1 when something needed is broken."""
    from rich.console import Console

    from cluster import doctor as doctors

    with Console(stderr=True).status("looking around, trying transports"):
        findings = list(doctors.examine(config, overrides or [], ports=not running))
    doctors.show(findings)
    raise typer.Exit(doctors.status(findings))


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="As in the answer, its headers and the log.")],
    grpc_address: GrpcOption = GRPC,
    as_json: Annotated[bool, typer.Option("--json", help="The whole answer as JSON.")] = False,
) -> None:
    """Shows why a request was sent where it was, and what came of it. Exits with 1 when nothing is known of it."""
    from cluster import client, explain_view, status_view

    try:
        told = client.explain(grpc_address, request_id)
    except client.ClientError as error:
        _fail(str(error), 1)
    if as_json:
        print(status_view.as_json(told))
    else:
        explain_view.show(told, explain_view.console())


@app.command()
def replay(
    log: Annotated[Path, typer.Argument(help="A file that `router.decision_log` wrote.")],
    policy: Annotated[
        str, typer.Option(help="A policy; empty: each record's own, which must decide the same.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Repeats recorded decisions, under another policy or their own. With their own it exits with 1 if any differs."""
    import json

    from cluster import explain_view
    from router.decision_file import DecisionFileError, read
    from router.explain import replay as repeat
    from router.policies import find

    compared = explain_view.Comparison(policy or "their own policy")
    try:
        if policy:
            find(policy)
        for record in read(log):
            for pair in repeat([record], find(policy or record.policy)):
                compared.add(*pair)
    except (OSError, DecisionFileError) as error:
        _fail(str(error), 1)
    except ValueError as error:
        _fail(f"--policy {policy}: {error}", 2)
    if as_json:
        print(json.dumps(compared.as_dict()))
    else:
        compared.show(explain_view.console())
    if not policy and compared.equal < compared.decisions:
        raise typer.Exit(1)


app.command()(bench)
app.command()(simulate)
app.command()(plan)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _fail(message: str, status: int) -> NoReturn:
    print(f"baton: {message}", file=sys.stderr)
    raise typer.Exit(status)


if __name__ == "__main__":
    main()
