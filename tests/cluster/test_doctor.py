"""What `baton doctor` finds, on machines that are made up, and the real one."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster import cli, doctor
from cluster.config import Config, from_tree
from cluster.doctor import Finding
from kvtransfer import devices
from kvtransfer.messages import Measured
from kvtransfer.transport import TransportError
from kvtransfer.trial import Trial

FAST = Measured(latency_s=2e-5, bytes_per_s=5e9)


def config_of(**sections: Any) -> Config:
    return from_tree(sections, "test")


def only(findings: Iterable[Finding], what: str) -> Finding:
    found = [finding for finding in findings if finding.what == what]
    assert len(found) == 1, found
    return found[0]


def tried(**errors: str) -> Any:
    def trial(kind: str) -> Trial:
        error = errors.get(kind, "")
        return (
            Trial(kind=kind, error=error)
            if error
            else Trial(kind=kind, name=kind, devices="x/y", measured=FAST)
        )

    return trial


def test_the_configuration_and_what_it_comes_to(tmp_path: Path) -> None:
    config, findings = doctor.configuration(None, ["decode.replicas=3"])
    assert config is not None and {finding.verdict for finding in findings} == {"ok"}
    assert "1 prefill + 3 decode workers by ray" in findings[0].found and "baton-demo" in findings[1].found
    path = tmp_path / "wrong.yaml"
    path.write_text("decode: {replica: 3}\n")
    config, findings = doctor.configuration(path, [])
    assert config is None and findings[0].verdict == "broken" and "replica" in findings[0].found
    config, findings = doctor.configuration(None, ["decode.num_gpus=1", "prefill.num_gpus=64"])
    assert config is None and "num_gpus" in findings[0].found


@pytest.mark.parametrize(
    ("kind", "errors", "broken"),
    [
        ("auto", {}, set()),
        ("auto", {"nixl": "no"}, set()),
        ("auto", {"nixl": "no", "shm": "no"}, {"nixl", "shm"}),
        ("auto", {"distributed": "no"}, set()),
        ("nixl", {"nixl": "no", "shm": "no"}, {"nixl"}),
        ("distributed", {"distributed": "no"}, {"distributed"}),
        ("shm", {"nixl": "no", "distributed": "no"}, set()),
    ],
)
def test_only_the_transport_that_is_needed_must_work(
    kind: str, errors: dict[str, str], broken: set[str]
) -> None:
    config = config_of(kvtransfer={"transport": kind})
    findings = list(doctor.transports(config, tried(**errors)))
    if kind == "auto" and broken:  # either would do
        assert {finding.what for finding in findings if finding.verdict == "broken"} <= broken
        assert doctor.status(findings) == 1
    else:
        assert {finding.what for finding in findings if finding.verdict == "broken"} == broken
    assert {finding.what for finding in findings if finding.verdict == "note"} == set(errors) - broken
    assert all("5.00 GB/s, 20 us" in finding.found for finding in findings if finding.verdict == "ok")


def test_a_slow_way_is_a_warning() -> None:
    def trial(kind: str) -> Trial:
        slow = ("SLOW TRANSPORT to receiver: UCX moves KV by TCP only: unset UCX_TLS",) * (kind == "nixl")
        return Trial(kind=kind, name=kind, measured=FAST, warnings=slow)

    findings = list(doctor.transports(None, trial))
    warned = [finding for finding in findings if finding.verdict == "warning"]
    assert [(finding.what, finding.found) for finding in warned] == [
        ("nixl", "UCX moves KV by TCP only: unset UCX_TLS")
    ]
    assert doctor.status(findings) == 0


def test_without_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise TransportError("the nixl transport needs the package nixl-cu13")

    monkeypatch.setattr("kvtransfer.nixl_transport.load", load)
    for kind, verdict in (("auto", "warning"), ("nixl", "broken"), ("shm", "note")):
        found = only(doctor.software(config_of(kvtransfer={"transport": kind})), "nixl")
        assert found.verdict == verdict and "pip install nixl-cu13" in found.remedy


def test_ray_is_needed_only_by_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "ray" else "1.0")
    for launcher, verdict in (("ray", "broken"), ("plain", "note")):
        assert only(doctor.software(config_of(cluster={"launcher": launcher})), "ray").verdict == verdict


def test_ports_that_are_taken_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = config_of(router={"http": address, "grpc": "127.0.0.1:0"})
        findings = list(doctor.doors(config))
    assert (
        only(findings, "router.http").verdict == "broken" and address in only(findings, "router.http").found
    )
    assert only(findings, "router.grpc").verdict == "ok"
    assert only(doctor.doors(config), "router.http").verdict == "ok"


def test_the_ray_to_join_must_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        assert (
            only(doctor.ray_head(config_of(cluster={"address": address})), "cluster.address").verdict == "ok"
        )
    assert (
        only(doctor.ray_head(config_of(cluster={"address": address})), "cluster.address").verdict == "broken"
    )
    for section in ({"address": "local"}, {"address": "auto"}, {"address": address, "launcher": "plain"}):
        try:
            config = config_of(cluster=section)
        except Exception:  # plain with an address is refused before
            continue
        assert list(doctor.ray_head(config)) == []


def test_what_the_fabric_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "ptrace_scope", lambda: 1)
    monkeypatch.setattr(devices, "rdma_devices", lambda: ("mlx5_0:1",))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64 << 10, 64 << 10))
    assert "ptrace_scope=0" in only(doctor.fabric(None), "ptrace scope").remedy
    assert only(doctor.fabric(None), "RDMA").found == "mlx5_0:1"
    assert only(doctor.limits(), "ulimit -l").verdict == "warning"
    monkeypatch.setattr(devices, "rdma_devices", lambda: ())
    assert only(doctor.limits(), "ulimit -l").verdict == "ok", "nothing is pinned without RDMA"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1 << 20))
    found = only(doctor.limits(), "ulimit -n")
    assert found.verdict == "warning" and str(1 << 20) in found.remedy


def test_the_table_shows_every_finding_and_its_remedy() -> None:
    findings = [
        Finding("software", "nixl", "broken", "no module [nixl]", "pip install nixl-cu13"),
        Finding("memory", "memfd", "ok", "there"),
        Finding("memory", "huge pages", "warning", "always madvise [never]"),
    ]
    console = Console(width=120, record=True, highlight=False, file=open("/dev/null", "w"))  # noqa: SIM115
    doctor.show(findings, console)
    console.file.close()
    text = console.export_text()
    for wanted in (
        "no module [nixl]",
        "pip install nixl-cu13",
        "always madvise [never]",
        "1 broken, 1 warnings, 3 checks",
    ):
        assert wanted in text


def test_the_command_and_its_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.transports, "__defaults__", (tried(),))
    free = ["--set", "router.http=127.0.0.1:0", "--set", "router.grpc=127.0.0.1:0"]
    good = CliRunner().invoke(cli.app, ["doctor", *free])
    assert good.exit_code == 0, good.output
    assert "distributed" in good.output and "0 broken" in good.output
    bad = CliRunner().invoke(cli.app, ["doctor", *free, "--set", "decode.replicas=-1"])
    assert bad.exit_code == 1 and "decode.replicas" in bad.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = [
            "--set",
            f"router.http=127.0.0.1:{taken.getsockname()[1]}",
            "--set",
            "router.grpc=127.0.0.1:0",
        ]
        assert CliRunner().invoke(cli.app, ["doctor", *port]).exit_code == 1
        assert CliRunner().invoke(cli.app, ["doctor", "--running", *port]).exit_code == 0
