"""Runs one deployment: starts its workers and routers, tells them of each other, replaces what dies, stops all.

Each process has one task that keeps it: start, watch one life, remove it from the members at once, pause, start again.
Until everything was ready once, a process that keeps failing is an error that ends the deployment; afterwards it is
tried for ever, ever more slowly. Called by `cluster.cli`; knows launchers only by their interface.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec

from baton import rpc
from baton.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from cluster import guard
from cluster.backoff import Backoff
from cluster.config import ClusterSection
from cluster.launchers import Launcher, WorkerHandle
from cluster.membership import Membership, push_members
from cluster.process import ChildProcess, StartError, log_tail
from cluster.report import Report
from cluster.specs import Seat
from router.spec import RouterSpec, RouterStarted
from worker.spec import Started

_WEIGHTS = re.compile(r"weights: (\d+) %")  # see worker.rank
_ASK_S = 3.0  # deadline of one Describe or Status
_ASK_EVERY_S = 1.0
_ASK_EVERY_AT_START_S = 0.1


class SupervisorError(RuntimeError):
    """The deployment cannot run; the message says which process and quotes its log."""


@dataclass(slots=True, eq=False)
class RouterSeat:
    """One router's place in the deployment. From its first life on, `spec` names the ports where that one listened, so
    that clients find the next."""

    name: str
    spec: RouterSpec
    started: RouterStarted | None = None  # while it runs
    child: ChildProcess | None = None


class Supervisor:
    """One deployment from start to stop. Use `run` once."""

    def __init__(
        self,
        settings: ClusterSection,
        seats: list[Seat],
        routers: list[RouterSpec],
        launcher: Launcher,
        *,
        log_dir: Path,
        mark: str,
        report: Report,
        router_command: list[str],
    ) -> None:
        self._settings = settings
        self._seats = seats
        self._routers = [
            RouterSeat(spec.router_id if len(routers) > 1 else "router", spec) for spec in routers
        ]
        self._launcher = launcher
        self._log_dir = log_dir
        self._mark = mark
        self._report = report
        self._router_command = router_command
        self._token = routers[0].token
        self._membership = Membership()
        self._peers: dict[
            str, frozenset[str]
        ] = {}  # incarnation of a decode worker -> incarnations it is linked to
        # By prefill incarnation and decode worker: bytes_per_s and error of the link, as told.
        self._links: dict[tuple[str, str], tuple[float, str]] = {}
        self._handles: set[WorkerHandle] = set()
        self._launcher_open = asyncio.Event()
        self._was_ready = asyncio.Event()

    async def run(self, stop: asyncio.Event, announce: Callable[[list[RouterStarted]], None]) -> None:
        """Runs until `stop` is set; calls `announce` once, when all is ready.

        Raises SupervisorError when the deployment does not get ready. Either way all that was started is over then.
        """
        self._report.open()
        jobs: list[Coroutine[Any, Any, None]] = [self._open_launcher()]
        jobs += [self._keep_router(router) for router in self._routers]
        jobs += [self._keep_worker(seat) for seat in self._seats]
        jobs += [self._announce_when_ready(announce)]
        tasks: set[asyncio.Task[Any]] = {asyncio.create_task(job) for job in jobs}
        stopping = asyncio.create_task(stop.wait())
        try:
            running = set(tasks)
            while running and not stopping.done():
                done, running = await asyncio.wait({*running, stopping}, return_when=asyncio.FIRST_COMPLETED)
                running.discard(stopping)
                for task in done - {stopping}:
                    task.result()  # raises what ended it; only the short jobs end well
        finally:
            self._report.close()
            for task in {*tasks, stopping}:
                task.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)
            await self._stop_all()

    def kill_now(self) -> None:
        """Kills everything without waiting: the second Ctrl-C."""
        for router in self._routers:
            if router.child is not None:
                router.child.kill_now()
        self._launcher.kill_now()
        guard.sweep(self._mark)

    # ---- workers -----------------------------------------------------------------------------------------------

    async def _open_launcher(self) -> None:
        if self._launcher.name == "ray":
            self._report.starting("ray")
        try:
            await self._launcher.open()
        except StartError as error:
            raise SupervisorError(str(error)) from None
        if self._launcher.name == "ray":
            self._report.ready("ray", f"address {self._settings.address}")
        self._launcher_open.set()

    async def _keep_worker(self, seat: Seat) -> None:
        await self._launcher_open.wait()
        await self._keep(seat.spec.worker_id, lambda restarts: self._worker_life(seat, restarts))

    async def _worker_life(self, seat: Seat, restarts: int) -> str:
        """Starts the worker, watches it until it dies, and returns why; raises StartError."""
        handle = await self._launcher.start_worker(seat.occupied(uuid.uuid4().hex), seat.place)
        self._handles.add(handle)
        started = handle.started
        self._report.ready(
            started.worker_id,
            f"pid {started.pid}, {started.address}, {started.blocks} KV blocks, transport {started.transport or '-'}",
        )
        watchers = [asyncio.create_task(handle.wait_dead()), asyncio.create_task(self._hear(started))]
        pushing = None
        if started.role == "decode":
            pushing = asyncio.create_task(push_members(started.address, self._token, self._membership))
        self._membership.join(started, restarts)
        try:
            done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
            reason = next(task for task in watchers if task in done).result()
        finally:
            self._membership.leave(started)
            self._peers.pop(started.incarnation, None)
            for key in [key for key in self._links if key[0] == started.incarnation]:
                del self._links[key]
            await _cancel(*watchers, pushing)
        await handle.kill()
        self._handles.discard(handle)
        return f"{reason}; the end of its log:\n{self._launcher.log_tail(started.worker_id)}"

    async def _hear(self, started: Started) -> str:
        """Asks the worker for its state all the time; returns when it has been silent for too long."""
        async with rpc.channel(started.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            heard = time.monotonic()
            while True:
                try:
                    status = await stub.Describe(
                        worker_pb2.DescribeRequest(), timeout=_ASK_S, metadata=rpc.credentials(self._token)
                    )
                    heard = time.monotonic() - status.engine_silent_s
                    if started.role == "decode":
                        self._peers[started.incarnation] = frozenset(status.peers)
                    self._tell_links(started, status)
                    problem = "its engine has said nothing"
                except grpc.aio.AioRpcError as error:
                    problem = f"it has not answered ({error.code().name})"
                silent_s = time.monotonic() - heard
                if silent_s > self._settings.silence_s:
                    return f"its process runs but {problem} for {silent_s:.0f} s"
                await asyncio.sleep(_ASK_EVERY_S if self._was_ready.is_set() else _ASK_EVERY_AT_START_S)

    def _tell_links(self, started: Started, status: inference_pb2.WorkerStatus) -> None:
        """One line for each pair of workers, when it was measured or refused."""
        for link in status.links:
            told = (link.bytes_per_s, link.error)
            if self._links.get((started.incarnation, link.worker_id)) == told:
                continue
            self._links[started.incarnation, link.worker_id] = told
            via = f"{started.worker_id} to {link.worker_id}: {started.transport}"
            via += f" ({link.devices})" if link.devices else ""
            if link.error:
                self._report.problem(f"{via}: {link.error}")
            else:
                speed = f"{link.bytes_per_s / 1e9:.3g} GB/s, {link.latency_s * 1e6:.0f} us"
                self._report.line(f"{via}, {speed}")
            if link.warning:
                self._report.problem(
                    f"SLOW TRANSPORT, {started.worker_id} to {link.worker_id}: {link.warning}"
                )

    # ---- routers -----------------------------------------------------------------------------------------------

    async def _keep_router(self, router: RouterSeat) -> None:
        await self._keep(router.name, lambda restarts: self._router_life(router, restarts))

    async def _router_life(self, router: RouterSeat, restarts: int) -> str:
        path = self._log_dir / f"{router.name}.log"
        child, line = await ChildProcess.start(
            self._router_command,
            msgspec.json.encode(msgspec.structs.replace(router.spec, restarts=restarts)),
            name=router.name,
            log=path,
            timeout_s=self._settings.start_timeout_s,
            environment={guard.MARK: self._mark},
        )
        router.child = child
        started = msgspec.json.decode(line, type=RouterStarted)
        router.spec = msgspec.structs.replace(router.spec, http=started.http, grpc=started.grpc)
        router.started = started
        self._report.ready(router.name, f"pid {started.pid}, http {started.http}, grpc {started.grpc}")
        pushing = asyncio.create_task(push_members(dialable(started.grpc), self._token, self._membership))
        try:
            reason = await child.wait_dead()
        finally:
            router.started = None
            await _cancel(pushing)
        await child.kill()
        return f"{reason}; the end of its log:\n{log_tail(path)}"

    # ---- common ------------------------------------------------------------------------------------------------

    async def _keep(self, name: str, life: Callable[[int], Coroutine[Any, Any, str]]) -> None:
        """One life after the other, with pauses; each is told how many there were before it."""
        settings = self._settings
        backoff = Backoff(
            settings.restart_backoff_s, settings.restart_backoff_max_s, settings.restart_reset_s
        )
        attempts = 0
        while True:
            self._report.starting(name)
            begun = time.monotonic()
            try:
                reason = f"{name} {await life(attempts)}"
            except StartError as error:
                reason = str(error)
            attempts += 1
            if not self._was_ready.is_set() and attempts >= settings.start_attempts:
                tries = f" (attempt {attempts} of {settings.start_attempts})" if attempts > 1 else ""
                raise SupervisorError(f"{reason}\nthe deployment was not ready yet, giving up{tries}")
            pause_s = backoff.after(time.monotonic() - begun)
            self._report.problem(f"{reason}\n{name}: starting it again in {pause_s:.1f} s")
            await asyncio.sleep(pause_s)

    async def _announce_when_ready(self, announce: Callable[[list[RouterStarted]], None]) -> None:
        self._report.starting("links")
        deadline = time.monotonic() + self._settings.start_timeout_s
        while missing := await self._missing():
            absent = self._absent()
            for worker_id in absent:
                self._show_loading(worker_id)
            if absent:
                # Starting is bounded for each process by itself, with a better message.
                deadline = time.monotonic() + self._settings.start_timeout_s
            if time.monotonic() > deadline:
                raise SupervisorError(
                    f"not ready within {self._settings.start_timeout_s:g} s (cluster.start_timeout_s): {missing}"
                )
            await asyncio.sleep(_ASK_EVERY_AT_START_S)
        started = [router.started for router in self._routers if router.started is not None]
        self._was_ready.set()
        self._report.close()
        announce(started)

    def _show_loading(self, worker_id: str) -> None:
        """A worker says in its log how much of a large model it has read."""
        read = _WEIGHTS.findall(self._launcher.log_tail(worker_id))
        if read:
            self._report.loading(worker_id, int(read[-1]))

    def _absent(self) -> list[str]:
        present = {
            member.worker_id for role in ("prefill", "decode") for member in self._membership.role(role)
        }
        return [seat.spec.worker_id for seat in self._seats if seat.spec.worker_id not in present]

    async def _missing(self) -> str:
        """What the deployment still waits for; empty when it is ready."""
        absent = self._absent()
        if absent:
            return f"{', '.join(absent)} not started"
        for decode in self._membership.role("decode"):
            linked = self._peers.get(decode.incarnation, frozenset())
            apart = [
                member.worker_id
                for member in self._membership.role("prefill")
                if member.incarnation not in linked
            ]
            if apart:
                return f"{decode.worker_id} is not linked with {', '.join(apart)}"
        for router in self._routers:
            missing = await self._router_missing(router)
            if missing:
                return missing
        return ""

    async def _router_missing(self, router: RouterSeat) -> str:
        if router.started is None:
            return f"the {router.name} has not started"
        address = dialable(router.started.grpc)
        try:
            async with rpc.channel(address) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                status = await stub.Status(inference_pb2.StatusRequest(), timeout=_ASK_S)
        except grpc.aio.AioRpcError as error:
            return f"the {router.name} at {address} does not answer: {error.code().name} {error.details()}"
        ready = status.ready and all(other.started is not None for other in self._routers)
        return "" if ready else f"the {router.name} does not say that it is ready"

    async def _stop_all(self) -> None:
        """The routers first, so that what it still streams can end; then the workers together; then what is left."""
        ends = time.monotonic() + self._settings.stop_timeout_s
        children = [router.child for router in self._routers if router.child is not None]
        await asyncio.gather(*(child.stop(self._settings.stop_timeout_s / 2) for child in children))
        stops = [handle.stop(max(0.1, ends - time.monotonic())) for handle in self._handles]
        await asyncio.gather(*stops, return_exceptions=True)
        await self._launcher.close()


def dialable(address: str) -> str:
    """An address to connect to: a server on all interfaces is reached over loopback."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]", "") else address


async def _cancel(*tasks: asyncio.Task[Any] | None) -> None:
    present = [task for task in tasks if task is not None]
    for task in present:
        task.cancel()
    await asyncio.gather(*present, return_exceptions=True)
