"""Rank 0's side of a worker with several ranks: tells the others each step and each job, and gathers their reports.

    step loop --run(plan)--> [ RankGroup ] --delta--> every other rank ... then its own share
              --submit(job)-->     |       --job----> every other rank ... then its own mover
              <--joined reports----+<-- reader thread <-- reports, deaths

Plans and jobs go through one link in order, so that a job never overtakes the step that it follows. A rank that dies,
that does not read, or that keeps the others waiting ends the whole worker: half a replica is none.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable

from engine.plan import StepPlan, StepResult
from kvtransfer.join import Join
from kvtransfer.messages import MoverJob
from worker.loop import Mover, Runner
from worker.messages import Fatal, Shutdown
from worker.rank_link import Expecting, LinkLost, RankLink, RankReady, meet_followers
from worker.spec import WorkerSpec
from worker.step_codec import StepEncoder

log = logging.getLogger("baton.ranks")

FLUSH_S = 0.002  # while a link is full
LOAD_TIMEOUT_S = (
    3600.0  # the launcher's start time-out is shorter; this one only keeps an orphan from staying
)


class RankLost(RuntimeError):
    """A rank died or failed; names it."""


class RankGroup:
    """The other ranks of this worker. `run`, `submit` and `expecting` are for the step loop's thread."""

    def __init__(self, links: dict[int, RankLink]) -> None:
        self._links = links
        self._encoder = StepEncoder()
        self._closing = False
        self._thread: threading.Thread | None = None

    @classmethod
    def meet(
        cls, spec: WorkerSpec, listener: socket.socket | None, collective_fd: int, store: str
    ) -> RankGroup:
        """Waits for all other ranks to dial; raises MeetingError."""
        return cls(meet_followers(spec, listener, collective_fd, store))

    def wait_ready(self) -> dict[int, RankReady]:
        """Waits until every rank has loaded its part. Raises RankLost."""
        ready: dict[int, RankReady] = {}
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        poll, ranks = self._poll()
        while len(ready) < len(self._links):
            if time.monotonic() > deadline:
                missing = sorted(self._links.keys() - ready.keys())
                raise RankLost(f"ranks {missing} were not ready after {LOAD_TIMEOUT_S:g} s")
            for rank in {ranks[fd] for fd, _ in poll.poll(1000)}:
                for message in self._read(rank):
                    if isinstance(message, Fatal):
                        raise RankLost(f"rank {rank}: {message.reason}")
                    assert isinstance(message, RankReady) and message.rank == rank
                    ready[rank] = message
        return ready

    def watch(self, join: Join, on_fatal: Callable[[BaseException], None]) -> None:
        """Starts the thread that reads what the ranks report; `on_fatal` is called in it."""
        self._thread = threading.Thread(target=self._watch, args=(join, on_fatal), name="ranks", daemon=True)
        self._thread.start()

    def tell(self, plan: StepPlan) -> None:
        """Tells every rank the next step."""
        self._send(self._encoder.encode(plan))

    def submit(self, job: MoverJob) -> None:
        """Gives every rank a job."""
        self._send(job)

    def expecting(self, on: bool) -> None:
        self._send(Expecting(on))

    def close(self) -> None:
        """Asks the ranks to end; they do anyway when this process does."""
        self._closing = True
        self._send(Shutdown())

    # ---- inside --------------------------------------------------------------------------------------------------

    def _send(self, message: object) -> None:
        for link in self._links.values():
            link.send(message)

    def _poll(self) -> tuple[select.poll, dict[int, int]]:
        poll, ranks = select.poll(), {}
        for rank, link in self._links.items():
            for fd in link.filenos():
                poll.register(fd, select.POLLIN)
                ranks[fd] = rank
        return poll, ranks

    def _read(self, rank: int) -> list[object]:
        try:
            return self._links[rank].read()
        except LinkLost as lost:
            raise RankLost(f"rank {rank} died: {lost}") from None

    def _watch(self, join: Join, on_fatal: Callable[[BaseException], None]) -> None:
        poll, ranks = self._poll()
        full = False
        try:
            while True:
                found = poll.poll(1000 * FLUSH_S if full else 200)
                for rank in {ranks[fd] for fd, _ in found}:
                    for message in self._read(rank):
                        if isinstance(message, Fatal):
                            raise RankLost(f"rank {rank}: {message.reason}")
                        join.put(rank, message)  # type: ignore[arg-type]
                full = sum(not link.flush() for link in self._links.values()) > 0
        except BaseException as error:
            if not self._closing:
                on_fatal(error)


class GroupRunner:
    """Runs a step on all ranks: tells the others, then computes this rank's share."""

    def __init__(self, runner: Runner, group: RankGroup) -> None:
        self._runner = runner
        self._group = group

    def run(self, plan: StepPlan) -> StepResult:
        self._group.tell(plan)
        return self._runner.run(plan)


class GroupMover:
    """Gives a job to the movers of all ranks; their joined report comes back once."""

    def __init__(self, mover: Mover, group: RankGroup) -> None:
        self._mover = mover
        self._group = group

    def submit(self, job: MoverJob) -> None:
        self._group.submit(job)
        self._mover.submit(job)

    def expecting(self, on: bool) -> None:
        self._group.expecting(on)
        self._mover.expecting(on)
