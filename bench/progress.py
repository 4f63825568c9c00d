"""What a person sees while it runs: a bar and live numbers. Reads counters four times a second, touches nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.load import Load

_EVERY_S = 0.25


class Bar:
    """A line on the console for each run. Nothing at all where no person looks."""

    def __init__(self, out: Console) -> None:
        self._out = out

    @asynccontextmanager
    async def show(self, load: Load, label: str, requests: int) -> AsyncIterator[None]:
        if not self._out.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.fields[live]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._out, auto_refresh=False) as progress:
            task = progress.add_task(label, total=requests, live="")
            follower = asyncio.create_task(_follow(progress, task, load, requests))
            try:
                yield
            finally:
                follower.cancel()
                await asyncio.gather(follower, return_exceptions=True)
                progress.update(task, completed=load.live.ended, live=line(load, requests), refresh=True)


async def _follow(progress: Progress, task: TaskID, load: Load, requests: int) -> None:
    while True:
        progress.update(task, completed=load.live.ended, live=line(load, requests), refresh=True)
        await asyncio.sleep(_EVERY_S)


def line(load: Load, requests: int) -> str:
    """The live numbers."""
    live = load.live
    text = f"{live.ended}/{requests} ended, {live.open} open, {live.tokens} tokens"
    if live.recent_ttft_s:
        text += f", TTFT {1e3 * median(live.recent_ttft_s):.0f} ms"
    return text + (f", [red]{live.failed} failed[/]" if live.failed else "")
