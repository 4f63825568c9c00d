"""Sends requests when they are due, whatever became of those before, and records what comes back.

    due ---> late? ---> held (only with a bound on open requests) ---> sent ---> pieces ... ---> end
     `------------------- latencies count from here on: nothing that waits is left out

Open loop: an arrival never waits for an answer, so a server that stalls meets the same arrivals as one that does not
(the opposite is called coordinated omission). That the generator itself kept its times is measured, see
`bench.figures`. Clock and target are passed in; tests run it in virtual time.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.record import Record, Run
from bench.traces import TraceRequest

LEAD_S = 0.05  # from `run` to the begin of the schedule
_AHEAD = 64  # requests that are encoded before they are due, as far as there is time
_IDLE_S = 0.005  # so much time before the next arrival is enough to encode one more
_RECENT = 100
_SAMPLE_S = 0.02  # between two looks at how late the loop wakes


class Target(Protocol):
    """A door of a server and the prompts for it; made by `bench.openai_door` and `bench.baton_door`."""

    def prepare(self, request: TraceRequest) -> Any:
        """What `ask` needs, encoded as far as that can be done beforehand."""
        ...

    async def ask(self, prepared: Any, record: Record) -> None:
        """Asks and fills the record, failures included. Cancelling it cancels the request at the server."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A request and when it is due, in seconds after the begin of the schedule."""

    request: TraceRequest
    at_s: float
    warmup: bool = False


@dataclass(slots=True)
class Live:
    """Counters while it runs, for whoever shows them."""

    due: int = 0
    open: int = 0
    ended: int = 0
    failed: int = 0
    tokens: int = 0  # of answers that have ended
    recent_ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))


class Load:
    """One run; `run` once. `interrupt` ends it early with what there is."""

    def __init__(
        self,
        target: Target,
        jobs: Sequence[Job],
        *,
        clock: Callable[[], float] = time.perf_counter,
        timeout_s: float = 300.0,
        drain_s: float = 300.0,
        max_open: int = 0,
    ) -> None:
        """`timeout_s`: of one request, from when it is sent. `drain_s`: for what runs when all has been sent.

        `max_open`: so many requests at once, the others are held back (their latencies run on); 0: no bound.
        """
        self.live = Live()
        self._target = target
        self._jobs = jobs
        self._clock = clock
        self._timeout_s = timeout_s
        self._drain_s = drain_s
        self._gate = asyncio.Semaphore(max_open) if max_open else None
        self._open: dict[asyncio.Task[None], Record] = {}
        self._records: list[Record] = []
        self._lags: list[float] = []
        self._stop = asyncio.Event()

    def interrupt(self) -> None:
        """Nothing more is sent, what is open is cancelled, `run` returns."""
        self._stop.set()

    async def run(self) -> Run:
        # A collection of all prompts and records takes longer than a token; what is made now lives to the end anyway.
        gc.collect()
        gc.freeze()
        cpu = time.process_time()
        begin = self._clock() + LEAD_S
        sampler = asyncio.create_task(self._sample())
        try:
            await self._arrive(begin)
            if self._open and not self._stop.is_set():
                await self._drain()
            await self._end("cancelled" if self._stop.is_set() else "unfinished")
        finally:
            sampler.cancel()
            await self._end("cancelled")
            gc.unfreeze()
        return Run(
            self._records,
            begin,
            self._clock(),
            time.process_time() - cpu,
            self._lags,
            interrupted=self._stop.is_set(),
        )

    async def _sample(self) -> None:
        """Times that pieces were read too late by: a loop that is busy, or kept from the CPU, sees them late."""
        while True:
            before = self._clock()
            await asyncio.sleep(_SAMPLE_S)
            self._lags.append(max(0.0, self._clock() - before - _SAMPLE_S))

    async def _arrive(self, begin: float) -> None:
        """Starts each request when it is due."""
        prepared: deque[Any] = deque()
        for index, job in enumerate(self._jobs):
            due = begin + job.at_s
            if not prepared:
                prepared.append(self._target.prepare(job.request))
            while len(prepared) < _AHEAD and index + len(prepared) < len(self._jobs):
                if due - self._clock() < _IDLE_S:
                    break
                prepared.append(self._target.prepare(self._jobs[index + len(prepared)].request))
                await asyncio.sleep(0)  # answers are read meanwhile
            while (wait_s := due - self._clock()) > 0 and not self._stop.is_set():
                try:
                    async with asyncio.timeout(wait_s):
                        await self._stop.wait()
                except TimeoutError:
                    pass
            if self._stop.is_set():
                return
            request = job.request
            record = Record(request.number, due, request.input_tokens, request.output_tokens, job.warmup)
            self._records.append(record)
            self.live.due += 1
            self.live.open += 1
            task = asyncio.create_task(self._one(prepared.popleft(), record))
            self._open[task] = record
            task.add_done_callback(self._open.pop)

    async def _drain(self) -> None:
        """Waits for what is open, at most `drain_s`, or until interrupted."""
        stopped = asyncio.create_task(self._stop.wait())
        ended = asyncio.create_task(asyncio.wait(set(self._open)))
        await asyncio.wait((stopped, ended), timeout=self._drain_s, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        ended.cancel()
        await asyncio.gather(stopped, ended, return_exceptions=True)

    async def _one(self, prepared: Any, record: Record) -> None:
        try:
            if self._gate is None:
                await self._ask(prepared, record)
            else:
                async with self._gate:
                    await self._ask(prepared, record)
        except asyncio.CancelledError:
            record.fail("cancelled", "")  # unless `_end` had another reason
        except TimeoutError:
            record.fail("timeout", f"not complete within {self._timeout_s:g} s")
        except Exception as error:  # one request's trouble must not end the run, and must not be hidden
            record.fail("client", f"{type(error).__name__}: {error}")
        finally:
            record.end = self._clock() if record.end is None else record.end
            self._count(record)

    async def _ask(self, prepared: Any, record: Record) -> None:
        record.sent = self._clock()
        async with asyncio.timeout(self._timeout_s):
            await self._target.ask(prepared, record)
        if not record.error and not record.piece_times:
            record.fail("empty", "")

    def _count(self, record: Record) -> None:
        self.live.open -= 1
        self.live.ended += 1
        self.live.failed += not record.ok
        self.live.tokens += sum(record.piece_tokens)
        if record.piece_times:
            self.live.recent_ttft_s.append(record.piece_times[0] - record.scheduled)

    async def _end(self, reason: str) -> None:
        """Cancels what is open."""
        open_now = dict(self._open)
        for task, record in open_now.items():
            if not task.done():
                record.fail(reason, "")
                task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)
        for record in open_now.values():
            if record.end is None:  # its task had not begun
                record.end = self._clock()
                self._count(record)
