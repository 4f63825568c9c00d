"""From the configuration to what each process is told (`worker.spec`, `router.spec`).

Here the last checks are made that need the machine or the model: a CUDA device for `num_gpus`, the model's own limits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cluster.config import Config, PoolSection, router_address
from cluster.config_errors import ConfigError
from engine.model_config import ModelConfig, UnsupportedModel
from kvtransfer import failpoints
from router.spec import RouterSpec
from worker.spec import Role, WorkerSpec

WILDCARDS = ("0.0.0.0", "[::]", "::")  # listening there, a server is reached by some other name


@dataclass(frozen=True, slots=True)
class Place:
    """What a worker's launcher reserves for each of its ranks."""

    num_cpus: float
    num_gpus: float
    gpu: int = (
        -1
    )  # on a machine without Ray: rank 0's device, by its index; the other ranks have the next ones
    resources: Mapping[str, float] = field(default_factory=dict)  # of a joined Ray, by name
    spread: bool = False  # ranks may be on several nodes of a joined Ray


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker's place in the deployment: stays the same over its restarts, only the incarnation changes."""

    spec: WorkerSpec  # incarnation empty
    place: Place

    def occupied(self, incarnation: str) -> WorkerSpec:
        """The spec for one life of this worker."""
        return msgspec.structs.replace(self.spec, incarnation=incarnation)


def check_machine(config: Config, cuda_devices: int | None = None) -> None:
    """Refuses GPUs that this machine has not; a joined Ray cluster answers for itself when it places the workers."""
    wanted = {
        name: pool
        for name, pool in (("prefill", config.prefill), ("decode", config.decode))
        if pool.num_gpus and pool.replicas
    }
    if not wanted or config.cluster.address != "local":
        return
    found = _cuda_devices() if cuda_devices is None else cuda_devices
    total = sum(pool.num_gpus * pool.tensor_parallel * pool.replicas for pool in wanted.values())
    if total > found:
        keys = ", ".join(
            f"{name}.num_gpus = {pool.num_gpus:g} x {pool.tensor_parallel * pool.replicas}"
            for name, pool in wanted.items()
        )
        remedy = "set num_gpus to 0 to compute on the CPU" if not found else "lower num_gpus or replicas"
        raise ConfigError(f"{keys}: PyTorch sees {found} CUDA devices here; {remedy}")


def model_config(config: Config) -> ModelConfig:
    """The model's facts, and the check that the wanted context fits; raises ConfigError."""
    try:
        model = ModelConfig.from_folder(config.model.path)
    except (UnsupportedModel, OSError, ValueError) as error:
        raise ConfigError(f"model.path = {config.model.path!r}: {error}") from None
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        if pool.replicas and pool.tensor_parallel > model.q_heads:
            raise ConfigError(
                f"{name}.tensor_parallel = {pool.tensor_parallel}: the model has {model.q_heads} query heads, and each "
                f"rank needs one at least; use {model.q_heads} or less and raise {name}.replicas instead"
            )
    if config.model.max_model_len > model.max_positions:
        raise ConfigError(
            f"model.max_model_len = {config.model.max_model_len}: the model was made for {model.max_positions} "
            "tokens; lower it, or use 0 for the model's own"
        )
    return model


def max_model_len(config: Config, model: ModelConfig) -> int:
    return config.model.max_model_len or model.max_positions


def router_specs(config: Config, model: ModelConfig, token: str) -> list[RouterSpec]:
    """Every router of the deployment. They differ in name and ports (`router_address`) and share nothing."""
    first = router_spec(config, model, token)
    return [
        msgspec.structs.replace(
            first,
            router_id=f"router-{index}",
            http=router_address(first.http, index),
            grpc=router_address(first.grpc, index),
        )
        for index in range(config.router.replicas)
    ]


def router_spec(config: Config, model: ModelConfig, token: str) -> RouterSpec:
    return RouterSpec(
        token=token,
        http=config.router.http,
        grpc=config.router.grpc,
        model_path=config.model.path,
        served_name=config.model.served_name or Path(config.model.path).name,
        max_model_len=max_model_len(config, model),
        policy=config.router.policy,
        ttft_s=(config.model.ttft_ms or config.router.ttft_ms) / 1e3,
        itl_s=(config.model.itl_ms or config.router.itl_ms) / 1e3,
        local_below_tokens=config.router.local_below_tokens,
        max_prefill_waiting=config.router.max_prefill_waiting,
        tenants=config.router.tenants,
        worker_queue=config.router.worker_queue,
        max_queued=config.router.max_queued,
        max_queued_s=config.router.max_queued_s,
        max_active=config.router.max_active,
        decisions_bytes=int(config.router.decisions_mib * (1 << 20)),
        decision_log=str(Path(config.router.decision_log).resolve()) if config.router.decision_log else "",
        decision_log_bytes=int(config.router.decision_log_mib * (1 << 20)),
        prefix_index_entries=config.router.prefix_index_entries,
        log_format=config.router.log_format,
    )


def reachable(address: str, advertise_host: str, node: str) -> str:
    """The HOST:PORT to tell clients for a server that listens at `address` on this node."""
    host, _, port = address.rpartition(":")
    return f"{advertise_host or (node if node and host in WILDCARDS else host)}:{port}"


def seats(config: Config, model: ModelConfig, token: str) -> list[Seat]:
    """Every worker of the deployment, prefill first."""
    found: list[Seat] = []
    gpus_used = 0.0
    pools: tuple[tuple[Role, PoolSection], ...] = (("prefill", config.prefill), ("decode", config.decode))
    for role, pool in pools:
        for index in range(pool.replicas):
            place = Place(
                pool.num_cpus,
                pool.num_gpus,
                int(gpus_used) if pool.num_gpus else -1,
                pool.resources,
                pool.placement == "spread",
            )
            gpus_used += pool.num_gpus * pool.tensor_parallel
            found.append(Seat(_worker_spec(config, model, pool, role, index, token), place))
    return found


def _worker_spec(
    config: Config, model: ModelConfig, pool: PoolSection, role: Role, index: int, token: str
) -> WorkerSpec:
    # What is empty here is filled in on the node, with the address by which Ray knows it.
    bind = config.cluster.bind_host or ("127.0.0.1" if config.cluster.address == "local" else "")
    reached = bind
    if bind in WILDCARDS:
        reached = "127.0.0.1" if config.cluster.address == "local" else ""
    return WorkerSpec(
        role=role,
        worker_id=f"{role}-{index}",
        incarnation="",
        token=token,
        bind_host=bind,
        advertise_host=config.cluster.advertise_host or reached,
        model_path=config.model.path,
        dtype=config.model.dtype,
        tensor_parallel=pool.tensor_parallel,
        rank_timeout_s=config.cluster.silence_s,
        kv_cache_bytes=pool.kv_cache_bytes,
        block_size=pool.block_size,
        max_batch_tokens=pool.max_batch_tokens,
        max_running=pool.max_running,
        max_waiting=pool.max_waiting,
        threads=pool.threads,
        device="cuda" if pool.num_gpus else "cpu",
        transport=config.kvtransfer.transport,
        slots=config.kvtransfer.slots if config.prefill.replicas else 0,
        chunk_tokens=config.kvtransfer.chunk_tokens,
        wire_dtype="" if config.kvtransfer.wire_dtype == "stored" else config.kvtransfer.wire_dtype,
        gather=config.kvtransfer.gather,
        min_bandwidth=config.kvtransfer.min_bandwidth,
        handoff_timeout_s=config.kvtransfer.handoff_timeout_s,
        calibrate_s=config.cluster.calibrate_s,
        profile_dir=config.cluster.profile_dir,
        failpoints=os.environ.get(failpoints.VARIABLE, ""),  # no key: it is for tests only
    )


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
