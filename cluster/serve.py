"""Puts one deployment together and runs it in the foreground: the body of `baton serve`."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster import specs
from cluster.config import Config
from cluster.guard import Guard
from cluster.launchers import Launcher, PlainLauncher
from cluster.process import module_command
from cluster.report import Report
from cluster.supervisor import Supervisor, SupervisorError
from router.spec import RouterStarted
from worker.spec import Role

_LONGEST_TEMP = 40  # Ray puts Unix sockets some 60 characters below, and their paths end at 107
_GUARD_S = 5.0
_SECOND_SIGNAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Programs:
    """What is run as which process; tests put others in their places."""

    workers: Mapping[Role, list[str]] = field(
        default_factory=lambda: {"prefill": module_command("prefill"), "decode": module_command("decode")}
    )
    router: list[str] = field(default_factory=lambda: module_command("router"))
    shells: Mapping[Role, str] = field(
        default_factory=lambda: {"prefill": "prefill.shell:open_shell", "decode": "decode.shell:open_shell"}
    )


def serve(config: Config, programs: Programs | None = None) -> int:
    """Runs the deployment until a signal ends it; returns the exit status.

    Raises ConfigError before anything is started.
    """
    programs = programs or Programs()
    specs.check_machine(config)
    model = specs.model_config(config)
    token, mark = secrets.token_hex(32), uuid.uuid4().hex
    private_dir = _private_dir()
    log_dir = Path(config.cluster.log_dir or private_dir / "logs").expanduser().resolve()
    log_dir.mkdir(parents=True, exist_ok=True)
    guard = Guard(mark, private_dir)
    report = Report()
    try:
        launcher = make_launcher(config, programs, log_dir=log_dir, private_dir=private_dir, mark=mark)
        supervisor = Supervisor(
            config.cluster,
            specs.seats(config, model, token),
            specs.router_specs(config, model, token),
            launcher,
            log_dir=log_dir,
            mark=mark,
            report=report,
            router_command=programs.router,
        )

        def announce(routers: list[RouterStarted]) -> None:
            advertised = config.router.advertise_host
            http, grpc = (
                ",".join(specs.reachable(door, advertised, launcher.host) for door in doors)
                for doors in ([router.http for router in routers], [router.grpc for router in routers])
            )
            # The one line on standard output.
            sys.stdout.write(f"baton ready http={http} grpc={grpc}\n")
            sys.stdout.flush()

        return asyncio.run(_run(supervisor, report, announce))
    finally:
        guard.dismiss(_GUARD_S)


def make_launcher(
    config: Config, programs: Programs, *, log_dir: Path, private_dir: Path, mark: str
) -> Launcher:
    """The launcher that the configuration asks for. Ray is imported only when it is wanted."""
    timeout_s = config.cluster.start_timeout_s
    if config.cluster.launcher == "plain":
        return PlainLauncher(programs.workers, log_dir=log_dir, start_timeout_s=timeout_s, mark=mark)
    from cluster.ray_launcher import RayLauncher

    return RayLauncher(
        programs.shells,
        address=config.cluster.address,
        private_dir=private_dir,
        log_dir=log_dir,
        start_timeout_s=timeout_s,
        mark=mark,
    )


async def _run(
    supervisor: Supervisor, report: Report, announce: Callable[[list[RouterStarted]], None]
) -> int:
    stop = asyncio.Event()
    first_at = 0.0

    def on_signal(number: signal.Signals) -> None:
        nonlocal first_at
        if not stop.is_set():
            first_at = time.monotonic()
            report.line(f"{number.name}: stopping (again to kill)")
            stop.set()
        elif number is signal.SIGINT and time.monotonic() - first_at > _SECOND_SIGNAL_S:
            # One Ctrl-C may arrive twice, from the terminal and from a wrapper: that is no second one.
            report.problem("killing everything")
            supervisor.kill_now()
            os._exit(130)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await supervisor.run(stop, announce)
    except SupervisorError as error:
        report.line(f"baton: {error}", "red")
        return 1
    report.line(f"stopped in {time.monotonic() - first_at:.1f} s")
    return 0


def _private_dir() -> Path:
    """A folder for this deployment's sockets, tokens and logs; only this user may look into it."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="baton-", dir=base if len(base) <= _LONGEST_TEMP else "/tmp"))
