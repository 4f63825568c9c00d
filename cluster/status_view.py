"""How `baton status` shows a deployment: as tables for people, as JSON for machines."""

from __future__ import annotations

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from baton.v1 import inference_pb2

_LEFT = ("alive", "address", "transport", "links", "sums", "at rest", "kind", "state", "writer")
_PIPE_COLUMNS = 200  # nothing is cut where nobody looks at a screen


def as_json(answer: Message) -> str:
    """Every field, zeros included, under its name in the proto file."""
    return str(
        MessageToJson(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    )


def show(
    answer: inference_pb2.StatusResponse,
    ledgers: inference_pb2.LedgerResponse | None = None,
    *,
    console: Console | None = None,
) -> None:
    """The router in one line, then a row for each worker; with `ledgers` who holds what, the oldest first."""
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
    if ledgers is not None:
        if ledgers.workers:
            _show_ledgers(
                sorted(ledgers.workers, key=lambda worker: (worker.role != "prefill", worker.worker_id)),
                console,
            )
    elif answer.workers:
        workers = sorted(answer.workers, key=lambda worker: (worker.role != "prefill", worker.worker_id))
        console.print(_workers(workers))


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
        "links",
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
            _links(worker),
            worker.address,
            str(worker.pid),
        )
    return table


def _links(worker: inference_pb2.WorkerStatus) -> str:
    """To each decode worker, in GB/s as measured when they were linked."""
    return (
        ", ".join(
            f"{link.worker_id} {link.bytes_per_s / 1e9:.3g} GB/s"
            if link.bytes_per_s
            else f"{link.worker_id} [yellow]?[/]"
            for link in worker.links
        )
        or "-"
    )


def _show_ledgers(workers: list[inference_pb2.WorkerLedger], console: Console) -> None:
    console.print(_ledger([worker for worker in workers if not worker.unreachable]))
    for worker in workers:
        if worker.unreachable:
            console.print(f"[red]{worker.worker_id} did not answer:[/] {escape(worker.unreachable)}")
        if worker.broken:
            console.print(f"[red]{worker.worker_id} is BROKEN:[/] {escape(worker.broken)}")
        if worker.owners:
            more = f", the {len(worker.oldest)} oldest" if worker.owners > len(worker.oldest) else ""
            console.print(f"\n{worker.worker_id}: {worker.owners} hold blocks{more}")
            console.print(_owners(worker))
        if worker.lease_count:
            more = f", the {len(worker.leases)} oldest" if worker.lease_count > len(worker.leases) else ""
            lost = (
                f"; {worker.quarantined_bytes / (1 << 20):.1f} MiB quarantined"
                if worker.quarantined_bytes
                else ""
            )
            console.print(f"\n{worker.worker_id}: {worker.lease_count} slots in use{more}{lost}")
            console.print(_leases(worker))


def _owners(worker: inference_pb2.WorkerLedger) -> Table:
    table = _table("owner", "kind", "state", "blocks", "age", "deadline in")
    for owner in worker.oldest:
        left = f"{owner.left_s:.1f} s" if owner.HasField("left_s") else "-"
        table.add_row(
            escape(owner.name), owner.kind, owner.state, str(owner.blocks), f"{owner.age_s:.1f} s", left
        )
    return table


def _leases(worker: inference_pb2.WorkerLedger) -> Table:
    table = _table("slot", "state", "age", "hand-off", "chunk", "writer")
    for lease in worker.leases:
        table.add_row(
            str(lease.slot),
            lease.state,
            f"{lease.age_s:.1f} s",
            str(lease.handoff_id),
            str(lease.chunk),
            lease.peer,
        )
    return table


def _ledger(workers: list[inference_pb2.WorkerLedger]) -> Table:
    """The sums are invariants; a row that breaks one is marked. At rest every block has been looked at."""
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
        "at rest",
    )
    for worker in workers:
        c = worker.counts
        blocks = c.blocks_free + c.blocks_cached + c.blocks_held + c.blocks_landing == c.blocks_total
        slots = c.slots_free + c.slots_leased + c.slots_quarantined == c.slots_total
        numbers = (
            c.blocks_total, c.blocks_free, c.blocks_cached, c.blocks_held, c.blocks_landing,
            c.slots_total, c.slots_free, c.slots_leased, c.slots_quarantined,
        )  # fmt: skip
        table.add_row(
            worker.worker_id,
            *map(str, numbers),
            "[green]ok[/]" if blocks and slots and not worker.broken else "[red]BROKEN[/]",
            "checked" if worker.checked else "no",
        )
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="left" if column in _LEFT else "right")
    return table
