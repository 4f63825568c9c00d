"""A deployment as the simulator takes it: the file of `baton serve`, and below `simulate:` the device's profile.

The profile may instead come from a running deployment, or from a file that a worker saved (`cluster.profile_dir`).
Read by `cluster.simulate`; the rest of the file is checked as `baton serve` would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, Field, ValidationError

from baton.v1 import inference_pb2
from cluster.config import Config, PoolSection, Positive, Section, find_model, from_tree, read_tree
from cluster.config_errors import ConfigError, explain
from cluster.specs import model_config
from engine.api import Costs, HandoffCost, Spread, StepCosts
from engine.scheduler import Limits
from kvtransfer.messages import DTYPE_BYTES
from simulation.serving.cluster import ClusterSpec, PoolSpec
from simulation.serving.front import FrontSpec
from simulation.serving.profiles import Profile

NotNegativeFloat = Annotated[float, Field(ge=0)]


class ProfileSection(Section):
    """What a device takes; see docs/simulate.md."""

    name: str
    derived: bool  # nobody measured it
    kv_token_bytes: Positive
    # A step takes base + sequence * N + kv_token * K + token * u + attention * u * (u/2 + cached) seconds.
    base_s: NotNegativeFloat
    sequence_s: NotNegativeFloat
    kv_token_s: NotNegativeFloat
    token_s: NotNegativeFloat
    attention_s: NotNegativeFloat
    tensor_parallel: Positive = 1  # of the worker whose steps take that
    spread: tuple[float, float, float] = (1.0, 1.03, 1.1)  # p50, p90, p99 of measured over predicted
    handoff_latency_s: NotNegativeFloat = 1e-3
    handoff_gbps: Annotated[float, Field(gt=0)] = 400.0  # of one rank's link, in Gbit/s, as payload
    layer_groups: Positive = 1  # parts in which a step's KV leaves while the step runs
    message_s: NotNegativeFloat = 5e-4  # between two processes, one way
    doubling_efficiency: Annotated[float, Field(ge=0.5, le=1)] = 0.9
    collective_s: NotNegativeFloat = 0.0
    memory_gib: NotNegativeFloat = 0.0
    weights_gib: NotNegativeFloat = 0.0
    gpu_hour_usd: NotNegativeFloat = 0.0


class _Simulated(BaseModel):
    simulate: ProfileSection


def load_cluster(
    path: Path,
    overrides: list[str],
    costs: Path | None = None,
    status: inference_pb2.StatusResponse | None = None,
) -> ClusterSpec:
    """The deployment of a file with its profile, or with measured ones. Raises ConfigError."""
    tree = read_tree(path, overrides)
    section = tree.pop("simulate", None)
    config = from_tree(tree, str(path))
    if status is not None:
        profile = _from_status(status)
    elif costs is not None:
        profile = _from_file(costs, config, path)
    elif section is None:
        raise ConfigError(
            f"{path}: has no section `simulate`, so nothing says what steps take; add one (docs/simulate.md, "
            "deploy/simulate/h200-8b.yaml), or give --profile-from with the HOST:PORT of a running deployment's gRPC "
            "door or a file that a worker saved in cluster.profile_dir"
        )
    else:
        profile = _from_section(section, str(path))
    return ClusterSpec(
        profile,
        _pool(config.prefill),
        _pool(config.decode),
        FrontSpec(
            config.router.policy,
            (config.model.ttft_ms or config.router.ttft_ms) / 1e3,
            (config.model.itl_ms or config.router.itl_ms) / 1e3,
            config.router.local_below_tokens,
            config.router.max_prefill_waiting,
            config.router.prefix_index_entries,
            config.router.worker_queue,
            config.router.max_queued,
            config.router.max_queued_s,
            config.router.max_active,
        ),
        config.kvtransfer.handoff_timeout_s,
    )


def _pool(section: PoolSection) -> PoolSpec:
    return PoolSpec(
        section.replicas,
        section.kv_cache_bytes * section.tensor_parallel,
        section.tensor_parallel,
        section.block_size,
        Limits(section.max_batch_tokens, section.max_running),
        section.max_waiting,
    )


def _from_section(section: Any, where: str) -> Profile:
    if isinstance(section, dict) and isinstance(section.get("spread"), list):
        section = {**section, "spread": tuple(section["spread"])}
    try:
        told = _Simulated.model_validate({"simulate": section}).simulate
    except ValidationError as error:
        raise ConfigError(explain(error, _Simulated, where)) from None
    spread = Spread(*told.spread)
    return Profile(
        told.name,
        StepCosts(told.base_s, told.sequence_s, told.kv_token_s, told.token_s, told.attention_s),
        told.kv_token_bytes,
        derived=told.derived,
        tensor_parallel=told.tensor_parallel,
        decode_spread=spread,
        prefill_spread=spread,
        handoff_latency_s=told.handoff_latency_s,
        handoff_byte_s=8e-9 / told.handoff_gbps,
        layer_groups=told.layer_groups,
        message_s=told.message_s,
        doubling_efficiency=told.doubling_efficiency,
        collective_s=told.collective_s,
        memory_gib=told.memory_gib,
        weights_gib=told.weights_gib,
        gpu_hour_usd=told.gpu_hour_usd,
    )


def _from_file(costs: Path, config: Config, beside: Path) -> Profile:
    try:
        told = msgspec.json.decode(costs.read_bytes(), type=Costs)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"--profile-from {costs}: {error}") from None
    folder = find_model(config.model.path, beside.resolve().parent)
    if folder is None:
        raise ConfigError(f"model.path = {config.model.path!r}: is needed to know how large its KV is")
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})
    model = model_config(config)
    dtype = model.dtype if config.model.dtype == "auto" else config.model.dtype
    token_bytes = 2 * model.layers * model.kv_heads * model.head_dim * DTYPE_BYTES[dtype]
    return Profile(
        costs.stem,
        told.step,
        token_bytes,
        derived=False,
        tensor_parallel=config.decode.tensor_parallel,
        decode_spread=told.decode,
        prefill_spread=told.prefill,
    )


def _from_status(status: inference_pb2.StatusResponse) -> Profile:
    """The means over the workers of each role, as they have measured themselves."""
    by_role: dict[str, list[inference_pb2.WorkerStatus]] = {"decode": [], "prefill": []}
    for worker in status.workers:
        if worker.alive and worker.costs.seen:
            by_role[worker.role].append(worker)
    decode, prefill = by_role["decode"], by_role["prefill"]
    if not decode:
        raise ConfigError(
            "--profile-from: no decode worker there has measured its steps; send it some requests, or set "
            "cluster.calibrate_s above 0"
        )
    handoffs = [one for worker in decode for one in worker.costs.handoffs if one.seen]
    count = len(handoffs)
    plain = HandoffCost("")
    return Profile(
        f"measured by {len(decode) + len(prefill)} workers",
        _mean_costs(decode),
        decode[0].queue.token_bytes,
        derived=False,
        prefill_step=_mean_costs(prefill) if prefill else None,
        decode_spread=_mean_spread(decode, "decode_spread"),
        prefill_spread=_mean_spread(prefill or decode, "prefill_spread"),
        handoff_latency_s=sum(one.latency_s for one in handoffs) / count if count else plain.latency_s,
        handoff_byte_s=sum(one.byte_s for one in handoffs) / count if count else plain.byte_s,
    )


def _mean_costs(workers: list[inference_pb2.WorkerStatus]) -> StepCosts:
    fields = StepCosts.__struct_fields__
    return StepCosts(
        *(sum(float(getattr(one.costs, field)) for one in workers) / len(workers) for field in fields)
    )


def _mean_spread(
    workers: list[inference_pb2.WorkerStatus], field: Literal["decode_spread", "prefill_spread"]
) -> Spread:
    told = [list(getattr(one.costs, field)) for one in workers if len(getattr(one.costs, field)) == 3]
    if not told:
        return Spread()
    return Spread(*(sum(column) / len(told) for column in zip(*told, strict=True)))
