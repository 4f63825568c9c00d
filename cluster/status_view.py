"""How `baton status` shows a deployment: as tables for people, as JSON for machines."""

from __future__ import annotations

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from baton.v1 import inference_pb2

_PIPE_COLUMNS = 200  # nothing is cut where nobody looks at a screen


def as_json(answer: Message) -> str:
    """Every field, zeros included, under its name in the proto file."""
    return str(
        MessageToJson(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    )


def show(answer: inference_pb2.StatusResponse, *, ledger: bool, console: Console | None = None) -> None:
    """The router in one line, then a row for each worker."""
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_PIPE_COLUMNS)
    ready = "[green]ready[/]" if answer.ready else "[yellow]not ready[/]"
    console.print(
        f"{answer.router or 'router'} {answer.release}: {ready}, policy {answer.policy or '-'}, "
        f"{answer.active_requests} active requests, {len(answer.workers)} workers{_index(answer)}",
        soft_wrap=True,
    )
    if answer.workers:
        workers = sorted(answer.workers, key=lambda worker: (worker.role != "prefill", worker.worker_id))
        console.print(_ledger(workers) if ledger else _workers(workers))


def _index(answer: inference_pb2.StatusResponse) -> str:
    """Nothing for a router of a release that has no index."""
    if not answer.HasField("prefix_index"):
        return ""
    index = answer.prefix_index
    hits = f", {100 * index.hits / index.lookups:.0f}% hits" if index.lookups else ""
    return f", prefix index of {index.entries} blocks{hits}"


def _workers(workers: list[inference_pb2.WorkerStatus]) -> Table:
    table = _table(
        "worker",
        "tp",
        "alive",
        "waiting",
        "running",
        "hand-offs",
        "KV used",
        "step",
        "transport",
        "address",
        "pid",
    )
    for worker in workers:
        counts = worker.ledger
        used = counts.blocks_total - counts.blocks_free - counts.blocks_cached
        table.add_row(
            worker.worker_id,
            str(max(1, len(worker.engine_pids))),
            "[green]yes[/]" if worker.alive else "[red]no[/]",
            f"{worker.waiting} ({worker.waiting_tokens} tok)" if worker.waiting else "0",
            str(worker.running),
            str(worker.handoffs),
            f"{100 * used / counts.blocks_total:.0f}%" if counts.blocks_total else "-",
            str(worker.step),
            worker.transport or "-",
            worker.address,
            str(worker.pid),
        )
    return table


def _ledger(workers: list[inference_pb2.WorkerStatus]) -> Table:
    """The sums are invariants; a row that breaks one is marked."""
    table = _table(
        "worker",
        "blocks",
        "free",
        "cached",
        "held",
        "landing",
        "slots",
        "free",
        "leased",
        "quarantined",
        "sums",
    )
    for worker in workers:
        c = worker.ledger
        blocks = c.blocks_free + c.blocks_cached + c.blocks_held + c.blocks_landing == c.blocks_total
        slots = c.slots_free + c.slots_leased + c.slots_quarantined == c.slots_total
        numbers = (
            c.blocks_total, c.blocks_free, c.blocks_cached, c.blocks_held, c.blocks_landing,
            c.slots_total, c.slots_free, c.slots_leased, c.slots_quarantined,
        )  # fmt: skip
        table.add_row(
            worker.worker_id, *map(str, numbers), "[green]ok[/]" if blocks and slots else "[red]BROKEN[/]"
        )
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("alive", "address", "transport", "sums") else "right"
        )
    return table
