"""What a person sees on standard error while a deployment starts, runs and stops.

Standard output stays for machines: one line there, when all is ready.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Report:
    """A spinner and a bar for each process on a terminal until all is ready; one line for each event everywhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._began = time.monotonic()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def open(self) -> None:
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()

    def close(self) -> None:
        """Ends the spinners; lines still come."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def starting(self, name: str) -> None:
        if self._progress is not None and name not in self._tasks:
            self._tasks[name] = self._progress.add_task(f"starting {name}", total=100)

    def loading(self, name: str, percent: int) -> None:
        """So much of the weights is read."""
        if self._progress is not None and name in self._tasks:
            self._progress.update(
                self._tasks[name], completed=min(percent, 99), description=f"{name} loads its weights"
            )

    def ready(self, name: str, detail: str) -> None:
        if self._progress is not None and name in self._tasks:
            self._progress.update(self._tasks[name], completed=100, description=f"{name} ready")
        self.line(f"{name} ready: {detail}")

    def line(self, text: str, style: str = "") -> None:
        elapsed = time.monotonic() - self._began
        # soft_wrap: a log line is one line, however narrow the terminal.
        self._console.print(f"[dim]{elapsed:8.2f} s[/dim]  {escape(text)}", style=style, soft_wrap=True)

    def problem(self, text: str) -> None:
        self.line(text, "yellow")
