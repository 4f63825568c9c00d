"""Workers as Ray actors: Ray chooses the node, reserves CPUs and GPUs, and tells of deaths. Tokens never pass Ray.

With `cluster.ray_actor`, which runs in the actor's process, the only module that imports ray. An actor is never
restarted by Ray (`max_restarts=0`): a death must be seen at once and a new life must have a new incarnation, so the
supervisor starts a new actor.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from cluster import guard
from cluster.config import CHECKOUT
from cluster.launchers import LAST_WORDS_S, WorkerHandle, decode_started, rank_name
from cluster.process import StartError, log_tail, thread_environment
from cluster.ray_actor import RankActor, WorkerActor
from cluster.specs import Place
from worker.spec import Role, Started, WorkerSpec

_LOCAL_PLACEMENT_S = 5.0
_PLACEMENT_POLL_S = 0.05
_UNFINISHED_OPEN_S = 3.0
_OBJECT_STORE_BYTES = 80 << 20  # nothing is put there; Ray demands some


class RayLauncher:
    """Starts a private Ray on this machine (address "local") or joins a running one."""

    name = "ray"

    def __init__(
        self,
        shells: Mapping[Role, str],
        *,
        address: str,
        private_dir: Path,
        log_dir: Path,
        start_timeout_s: float,
        mark: str,
    ) -> None:
        self._address = address
        self._private_dir = private_dir
        self._log_dir = log_dir
        self._start_timeout_s = start_timeout_s
        self._mark = mark
        self._shells = shells
        self._handles: set[_RayHandle] = set()
        self._opened = False
        self.host = ""
        self._opening: asyncio.Future[None] | None = None
        # Ray's processes are told to die with the *thread* that started them: this one lives as long as the process.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ray")

    @property
    def local(self) -> bool:
        return self._address == "local"

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._opening = loop.run_in_executor(self._thread, self._initialise)
        try:
            await asyncio.wait_for(asyncio.shield(self._opening), self._start_timeout_s)
        except TimeoutError:
            raise StartError(
                f"Ray ({self._address}) did not start within {self._start_timeout_s:g} s"
            ) from None
        _take_back(signal.SIGTERM)

    async def start_worker(self, spec: WorkerSpec, place: Place) -> WorkerHandle:
        group = await self._reserve(spec, place)
        actors: list[Any] = []
        try:
            actors += [
                self._create_actor(WorkerActor if not rank else RankActor, spec, rank, place, group)
                for rank in range(spec.tensor_parallel)
            ]
            line = await asyncio.wait_for(self._start_ranks(spec, place, actors), self._start_timeout_s)
            handle = _RayHandle(
                actors, group, decode_started(line, spec), self._mark if self.local else "", self._forget
            )
        except BaseException as error:
            await asyncio.to_thread(_discard, actors, group)
            if isinstance(error, TimeoutError):
                raise StartError(
                    self._complaint(spec, f"was not ready within {self._start_timeout_s:g} s")
                ) from None
            if isinstance(error, StartError) or not isinstance(error, Exception):
                raise
            raise StartError(self._complaint(spec, f"did not start: {_first_lines(error)}")) from None
        self._handles.add(handle)
        return handle

    async def _start_ranks(self, spec: WorkerSpec, place: Place, actors: list[Any]) -> bytes:
        """Starts all ranks together, since none is ready before all have met; what rank 0 says then."""
        if place.spread and len(actors) > 1:
            spec = msgspec.structs.replace(spec, rendezvous=await _as_future(actors[0].listen.remote()))
        environment = thread_environment(spec.threads)
        first = _as_future(
            actors[0].start.remote(
                msgspec.json.encode(spec), self._shells[spec.role], environment, self._log_name(spec, 0)
            )
        )
        others = [
            _as_future(
                actor.start.remote(
                    msgspec.json.encode(msgspec.structs.replace(spec, rank=rank)),
                    environment,
                    self._log_name(spec, rank),
                )
            )
            for rank, actor in enumerate(actors)
            if rank
        ]
        await asyncio.wait([first, *others], return_when=asyncio.FIRST_EXCEPTION)
        if not first.done():
            # Another rank failed; rank 0 hears it and says why.
            await asyncio.wait([first], timeout=LAST_WORDS_S)
        if not first.done():
            await asyncio.gather(*others)
        line: bytes = await first
        return line

    async def close(self) -> None:
        await asyncio.gather(*(handle.kill() for handle in list(self._handles)), return_exceptions=True)
        if self._opening is not None and not self._opening.done():
            # Stopped while Ray was starting. What cannot be waited for falls to the guard.
            await asyncio.wait([self._opening], timeout=_UNFINISHED_OPEN_S)
        if self._opened:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._shut_down)

    def kill_now(self) -> None:
        """A private Ray is marked and falls to the guard; a joined one ends our actors when this driver is gone."""

    def log_tail(self, worker_id: str) -> str:
        return (
            log_tail(self._log(worker_id)) if self.local else "  | (its log is on its node, see `ray logs`)"
        )

    def _complaint(self, spec: WorkerSpec, what: str) -> str:
        return f"{spec.worker_id} {what}; the end of its log:\n{self.log_tail(spec.worker_id)}"

    def _log(self, worker_id: str) -> Path:
        return self._log_dir / f"{worker_id}.log"

    def _log_name(self, spec: WorkerSpec, rank: int) -> str:
        """Where a rank's output goes; empty: to Ray, on its node."""
        return str(self._log(rank_name(spec.worker_id, rank))) if self.local else ""

    def _forget(self, handle: _RayHandle) -> None:
        self._handles.discard(handle)

    def _initialise(self) -> None:
        """Runs in the Ray thread. The environment is set before the import: Ray reads it then."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"address": self._address}
        if self.local:
            self._set_private_environment()
            options |= {
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": str(self._private_dir / "ray"),
                # Ray runs its workers at nice 15: any other process of the machine would stop the tokens.
                "_system_config": {"worker_niceness": 0},
                "log_to_driver": False,
            }
        elif "RAY_AUTH_MODE" not in os.environ and _has_auth_token():
            os.environ["RAY_AUTH_MODE"] = "token"
        import ray

        # It warns that outside the main thread it cannot take over SIGTERM; that is what we want.
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            ray.init(namespace="baton", logging_level=logging.ERROR, configure_logging=False, **options)
        except Exception as error:
            where = "a private Ray on this machine" if self.local else f"the Ray at {self._address}"
            raise StartError(
                f"cluster.address = {self._address!r}: cannot use {where}: {_first_lines(error)}; "
                "cluster.launcher: plain needs no Ray"
            ) from None
        self._opened = True
        if not self.local:
            self.host = ray.util.get_node_ip_address()

    def _set_private_environment(self) -> None:
        token = self._private_dir / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        paths = [str(CHECKOUT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ |= {
            # A token of our own: the default one would be written into the user's home.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            # Inherited by Ray's workers, so that they find this checkout even where it is not installed.
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            guard.MARK: self._mark,
            # Ray's processes rename themselves and would write the new name over the mark.
            "SPT_NOENV": "1",
        }

    def _shut_down(self) -> None:
        import ray

        ray.shutdown()
        self._opened = False

    async def _reserve(self, spec: WorkerSpec, place: Place) -> Any:
        """A placement group with a bundle for each rank."""
        bundle = {"CPU": place.num_cpus, "GPU": place.num_gpus}
        bundle = {name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}
        bundle |= place.resources
        timeout_s = _LOCAL_PLACEMENT_S if self.local else self._start_timeout_s
        group = await asyncio.to_thread(_ask_for, bundle, spec, place)
        try:
            # Asked again and again: Ray would wait whole seconds, in a thread that holds up the end of the process.
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                if await asyncio.to_thread(group.wait, 0):
                    return group
                await asyncio.sleep(_PLACEMENT_POLL_S)
        except BaseException:
            await asyncio.to_thread(_discard, [], group)
            raise
        total = await asyncio.to_thread(_give_up, group, bundle)
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        if spec.tensor_parallel > 1:
            where = "on any nodes" if place.spread else "on one node"
            wanted = f"{spec.tensor_parallel} ranks with {wanted} each {where}"
        raise StartError(
            f"{spec.worker_id}: Ray has no room for {wanted} (the cluster has {total}, the other workers included); "
            f"lower {spec.role}.num_cpus, {spec.role}.num_gpus or the replicas, or add nodes"
            + (f" that have what {spec.role}.resources asks for" if place.resources else "")
        )

    def _create_actor(self, kind: type, spec: WorkerSpec, rank: int, place: Place, group: Any) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return (
            ray.remote(kind)
            .options(
                name=f"{rank_name(spec.worker_id, rank)}-{spec.incarnation}",
                num_cpus=place.num_cpus or 0.001 * (not place.num_gpus),
                num_gpus=place.num_gpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=16,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
            )
            .remote()
        )


class _RayHandle:
    def __init__(
        self, actors: list[Any], group: Any, started: Started, mark: str, forget: Callable[[_RayHandle], None]
    ) -> None:
        self.started = started
        self._actors = actors  # rank 0's first; it ends by itself when any other rank does
        self._group = group
        self._mark = mark  # empty: its processes are on another machine
        self._forget = forget
        self._ended = False
        self._death = asyncio.create_task(self._watch(), name=f"{started.worker_id} death")

    async def wait_dead(self) -> str:
        return await asyncio.shield(self._death)

    async def stop(self, grace_s: float) -> None:
        if not self._ended and not self._death.done():
            with contextlib.suppress(Exception):
                await asyncio.wait_for(_as_future(self._actors[0].stop.remote()), grace_s)
        await self.kill()

    async def kill(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._forget(self)
        self._death.cancel()
        await asyncio.to_thread(_discard, self._actors, self._group)
        if self._mark:
            # Ray's word is not enough, and it knows nothing of the engine's process.
            for pid in (self.started.pid, *self.started.engine_pids):
                guard.kill_marked(pid, self._mark)

    async def _watch(self) -> str:
        from ray.exceptions import RayError

        try:
            return f"closed: {await _as_future(self._actors[0].wait_closed.remote())}"
        except RayError as error:
            return f"actor lost: {_first_lines(error)}"


def _as_future(reference: Any) -> asyncio.Future[Any]:
    return asyncio.wrap_future(reference.future())


def _ask_for(bundle: dict[str, float], spec: WorkerSpec, place: Place) -> Any:
    import ray

    return ray.util.placement_group(
        [bundle] * spec.tensor_parallel,
        strategy="SPREAD" if place.spread else "STRICT_PACK",
        name=f"{spec.worker_id}-{spec.incarnation}",
    )


def _give_up(group: Any, bundle: Mapping[str, float]) -> str:
    """Takes the reservation back and says what the whole cluster has."""
    import ray

    ray.util.remove_placement_group(group)
    has = ray.cluster_resources()
    return ", ".join(f"{has.get(name, 0):g} {name}" for name in dict.fromkeys(["CPU", "GPU", *bundle]))


def _discard(actors: list[Any], group: Any) -> None:
    import ray

    for actor in actors:
        with contextlib.suppress(Exception):
            ray.kill(actor)
    with contextlib.suppress(Exception):
        ray.util.remove_placement_group(group)


def _take_back(number: signal.Signals) -> None:
    """Installs Python's handler again: Ray put one before it that prints a stack as if we had crashed."""
    if threading.current_thread() is threading.main_thread() and callable(
        handler := signal.getsignal(number)
    ):
        signal.signal(number, handler)
        signal.siginterrupt(number, False)


def _first_lines(error: BaseException) -> str:
    """Ray's messages run over many lines of advice; the cause is at the end of a task's traceback."""
    cause = getattr(error, "cause", None)
    text = (
        f"{type(cause).__name__}: {cause}"
        if isinstance(cause, BaseException)
        else f"{type(error).__name__}: {error}"
    )
    if "No module named" in text:
        return f"{text.splitlines()[-1].strip()}: every node needs this release of Baton in Ray's environment"
    return " ".join(line.strip() for line in text.splitlines()[:3])


def _has_auth_token() -> bool:
    return "RAY_AUTH_TOKEN_PATH" in os.environ or (Path.home() / ".ray" / "auth_token").exists()
