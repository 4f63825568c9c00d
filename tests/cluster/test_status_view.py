"""What `baton status` shows of workers and their links."""

from __future__ import annotations

import io

from rich.console import Console

from baton.v1 import inference_pb2 as api
from cluster import status_view


def shown(*workers: api.WorkerStatus) -> str:
    console = Console(width=200, file=io.StringIO(), highlight=False)
    status_view.show(api.StatusResponse(router="r", workers=workers), console=console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_links_stand_with_the_worker_that_writes_over_them() -> None:
    links = [
        api.PeerLink(worker_id="decode-0", bytes_per_s=4.12e9, latency_s=35e-6, devices="cma/memory"),
        api.PeerLink(worker_id="decode-1", error="it hangs"),
    ]
    text = shown(
        api.WorkerStatus(worker_id="prefill-0", role="prefill", alive=True, links=links),
        api.WorkerStatus(worker_id="decode-0", role="decode", alive=True),
    )
    assert "decode-0 4.12 GB/s, decode-1 ?" in text and text.count("GB/s") == 1
