"""`baton doctor`: looks at this machine and a configuration, tries the transports, says what is wrong and what helps.

Every check is a function that gives findings and never raises for what it looks for. It changes nothing and starts only
processes of its own, which end with it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from cluster import specs
from cluster.config import Config, load
from cluster.config_errors import ConfigError
from kvtransfer import devices
from kvtransfer.transport import TransportError
from kvtransfer.trial import Trial, trial

Verdict = Literal["ok", "note", "warning", "broken"]

_COLORS = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "bold red"}
_PIPE_COLUMNS = 160
_KINDS = ("nixl", "distributed", "shm")
_MEMLOCK_WANTED = 4 << 30  # RDMA pins what it registers
_FILES_WANTED = 4096
_RAY_S = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """`broken`: this configuration cannot work here. `warning`: it works, but slower or less surely than it could."""

    group: str
    what: str
    verdict: Verdict
    found: str
    remedy: str = ""


def examine(path: Path | None, overrides: list[str], *, ports: bool = True) -> Iterator[Finding]:
    """All findings, as they come. `ports`: whether the doors' ports must be free, as before a start."""
    config, findings = configuration(path, overrides)
    yield from findings
    yield from software(config)
    yield from gpus(config)
    yield from memory()
    yield from limits()
    yield from fabric(config)
    if config is not None:
        yield from ray_head(config)
        if ports:
            yield from doors(config)
    yield from transports(config)


def show(findings: list[Finding], console: Console | None = None) -> None:
    """A table; remedies stand below what they mend."""
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_PIPE_COLUMNS)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "check", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", overflow="fold")
    group = ""
    for finding in findings:
        remedy = f"\n[italic]{_plain(finding.remedy)}[/]" if finding.remedy else ""
        table.add_row(
            finding.group if finding.group != group else "",
            finding.what,
            f"[{_COLORS[finding.verdict]}]{finding.verdict}[/]",
            _plain(finding.found) + remedy,
        )
        group = finding.group
    console.print(table)
    broken = sum(finding.verdict == "broken" for finding in findings)
    warnings = sum(finding.verdict == "warning" for finding in findings)
    console.print(f"\n{broken} broken, {warnings} warnings, {len(findings)} checks")


def status(findings: list[Finding]) -> int:
    """The exit status: 1 when something that is needed is broken."""
    return int(any(finding.verdict == "broken" for finding in findings))


# ---- the checks ------------------------------------------------------------------------------------------------------


def configuration(path: Path | None, overrides: list[str]) -> tuple[Config | None, list[Finding]]:
    """The configuration, None when it is not valid, and what it comes to."""
    where = str(path) if path is not None else "defaults"
    try:
        config = load(path, overrides)
        specs.check_machine(config)
        model = specs.model_config(config)
    except ConfigError as error:
        return None, [Finding("configuration", where, "broken", str(error))]
    pools = f"{config.prefill.replicas} prefill + {config.decode.replicas} decode workers"
    on = config.cluster.launcher if config.cluster.address == "local" else f"Ray at {config.cluster.address}"
    context = specs.max_model_len(config, model)
    return config, [
        Finding("configuration", where, "ok", f"{pools} by {on}, policy {config.router.policy}"),
        Finding("configuration", "model", "ok", f"{config.model.path}, {context} tokens"),
    ]


def software(config: Config | None) -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Finding(
        "software", "python", "ok" if good else "broken", platform.python_version(),
        "" if good else "Baton needs Python 3.11, 3.12 or 3.13",
    )  # fmt: skip
    for name, needed in (("torch", True), ("ray", config is None or config.cluster.launcher == "ray")):
        version = _version(name)
        if version:
            yield Finding("software", name, "ok", version)
        else:
            found = "not installed"
            remedy = f"pip install {name}" if needed else "needed for cluster.launcher: ray only"
            yield Finding("software", name, "broken" if needed else "note", found, remedy)
    yield _nixl(config)
    if Path("/etc/libibverbs.d").is_dir() and not devices.rdma_devices():
        yield Finding(
            "software", "ibverbs-providers", "warning", "installed, without an RDMA device",
            "with NIXL's own libraries it is known to end processes with SIGSEGV when they exit: "
            "apt-get remove ibverbs-providers",
        )  # fmt: skip


def _nixl(config: Config | None) -> Finding:
    from kvtransfer import nixl_transport

    wanted = config.kvtransfer.transport if config is not None else "auto"
    try:
        module = nixl_transport.load()
    except TransportError as error:
        verdicts: dict[str, Verdict] = {"nixl": "broken", "auto": "warning"}
        remedy = "pip install nixl-cu13"
        if wanted == "auto":
            remedy += "; until then kvtransfer.transport: auto takes shm, which reaches one host only"
        return Finding("software", "nixl", verdicts.get(wanted, "note"), str(error), remedy)
    package = module.__name__.partition(".")[0]
    return Finding("software", "nixl", "ok", f"{package} {_version(package) or ''}".strip())


def gpus(config: Config | None) -> Iterator[Finding]:
    wanted = config is not None and bool(config.prefill.num_gpus or config.decode.num_gpus)
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "a build for CPUs"
        missing = "no CUDA device that PyTorch can use"
        yield Finding("GPU", "CUDA", "broken" if wanted else "note", f"{missing} ({built})")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding("GPU", f"CUDA {index}", "ok", f"{about.name}, {about.total_memory >> 30} GiB")


def memory() -> Iterator[Finding]:
    try:
        os.close(os.memfd_create("baton-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        yield Finding("memory", "memfd", "ok", "shared memory without a file system")
    except OSError as error:
        yield Finding("memory", "memfd", "broken", str(error), "workers talk to their engines through it")
    try:
        info = os.statvfs("/dev/shm")
        free = info.f_bavail * info.f_frsize
        small = free < 1 << 28
        yield Finding(
            "memory", "/dev/shm", "warning" if small else "ok", f"{free / 2**30:.1f} GiB free",
            "Ray keeps its objects there: docker run --shm-size=2g" if small else "",
        )  # fmt: skip
    except OSError as error:
        yield Finding("memory", "/dev/shm", "warning", str(error), "Ray keeps its objects there")
    huge = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    never = "[never]" in huge
    yield Finding(
        "memory", "huge pages", "note" if never else "ok", huge or "not in this kernel",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled makes large copies cheaper" if never else "",
    )  # fmt: skip


def limits() -> Iterator[Finding]:
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    rdma = devices.rdma_devices()
    small = locked != resource.RLIM_INFINITY and locked < _MEMLOCK_WANTED
    yield Finding(
        "limits", "ulimit -l", "warning" if small and rdma else "ok", _limit(locked, 1 << 10, " KiB"),
        "RDMA pins what it registers: set it to unlimited" if small and rdma else "",
    )  # fmt: skip
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < _FILES_WANTED
    yield Finding(
        "limits", "ulimit -n", "warning" if few else "ok", _limit(files, 1, " files"),
        f"each client and worker takes some: raise it (the hard limit is {_limit(most, 1, '')})" if few else "",
    )  # fmt: skip


def fabric(config: Config | None) -> Iterator[Finding]:
    found = devices.rdma_devices()
    yield Finding(
        "fabric", "RDMA", "ok" if found else "note", ", ".join(found) or "no device with an active port"
    )
    scope = devices.ptrace_scope()
    yield Finding(
        "fabric", "ptrace scope", "ok" if scope == 0 else "warning", str(scope),
        "" if scope == 0 else "processes of one host cannot copy from each other's memory, and use TCP: "
        "sysctl kernel.yama.ptrace_scope=0",
    )  # fmt: skip
    retries = _read("/proc/sys/net/ipv4/tcp_retries2")
    many = config is not None and config.cluster.address != "local" and retries.isdigit() and int(retries) > 8
    yield Finding(
        "fabric", "tcp_retries2", "warning" if many else "ok", retries or "unknown",
        "a cut network is noticed after a quarter of an hour: sysctl net.ipv4.tcp_retries2=6" if many else "",
    )  # fmt: skip


def doors(config: Config) -> Iterator[Finding]:
    for name, address in (("router.http", config.router.http), ("router.grpc", config.router.grpc)):
        host, _, port = address.rpartition(":")
        error = _taken(host.strip("[]"), int(port))
        yield Finding(
            "ports", name, "broken" if error else "ok", f"{address}: {error or 'free'}",
            f"end what listens there, or set {name} (port 0 takes any free one)" if error else "",
        )  # fmt: skip


def ray_head(config: Config) -> Iterator[Finding]:
    """Whether a running Ray that is to be joined can be reached."""
    address = config.cluster.address
    if config.cluster.launcher != "ray" or address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_RAY_S).close()
    except OSError as error:
        remedy = "start it with `ray start --head --port=...`, or set cluster.address"
        yield Finding("ports", "cluster.address", "broken", f"{address}: {error}", remedy)
    else:
        yield Finding("ports", "cluster.address", "ok", f"{address}: somebody listens")


def transports(config: Config | None, tried: Callable[[str], Trial] = trial) -> Iterator[Finding]:
    """Each transport between two processes of this machine. What is configured must work; others are told of."""
    wanted = config.kvtransfer.transport if config is not None else "auto"
    with ThreadPoolExecutor(1) as one_by_one:  # side by side they would slow each other
        results = list(one_by_one.map(tried, _KINDS))
    worked = [result.kind for result in results if not result.error]
    for result in results:
        needed = result.kind == wanted or (wanted == "auto" and not {"nixl", "shm"} & set(worked))
        via = f"{result.name} over {result.devices}" if result.devices else result.name or result.kind
        if result.error:
            yield Finding("transport", result.kind, "broken" if needed else "note", result.error)
            continue
        measured = result.measured
        found = f"{measured.gb_per_s:.2f} GB/s, {measured.latency_s * 1e6:.0f} us, bytes verified; {via}"
        yield Finding("transport", result.kind, "ok", found)
        for line in result.warnings:
            yield Finding("transport", result.kind, "warning", line.partition(": ")[2] or line)


# ---- small helpers ---------------------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _limit(value: int, unit: int, name: str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // unit}{name}"


def _taken(host: str, port: int) -> str:
    """Why nothing can listen there; empty: it can."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family, reuse_port=False).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _plain(text: str) -> str:
    """Not read as rich's markup."""
    return text.replace("[", r"\[")
