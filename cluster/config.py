"""One deployment as one tree of frozen objects: read from a YAML file and `--set` options, checked once, passed on.

Every key has a default, an unknown key is an error, and an option that cannot take effect is an error too. Messages
name the key, the value and the remedy. Nothing else in the project reads configuration files; what the processes are
told is in `cluster.specs`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.config_errors import ConfigError, did_you_mean, explain
from engine.config_fields import UnsupportedModel
from engine.model_folder import ModelNotFound, is_hub_name, resolve
from kvtransfer.transports import TransportKind
from router.policies import POLICIES, find

CHECKOUT = Path(__file__).resolve().parent.parent

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` runs

# Policies of one's own see the limits and may use them.
_WITHOUT_THRESHOLDS = frozenset(POLICIES) - {"threshold"}

# Between the ports of one router and those of the next.
ROUTER_PORT_STEP = 10

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    # strict: a port given as text or a count given as 2.5 is a mistake to name, not to mend.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model, under which name, and how it is held in memory."""

    # A Hugging Face folder (relative to the file, else here, else the checkout), or a name of the hub, such as
    # Qwen/Qwen3-0.6B, which is fetched at start.
    path: str = "models/baton-demo"
    served_name: str = ""  # empty: the folder's name, or the name of the hub
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_model_len: NotNegative = 0  # 0: the model's own
    ttft_ms: NotNegative = 0  # targets of this model; 0: those of the router
    itl_ms: NotNegative = 0


class PoolSection(Section):
    """One pool of like workers."""

    replicas: NotNegative = 1
    tensor_parallel: Positive = 1
    placement: Literal["pack", "spread"] = (
        "pack"  # a worker's ranks: on one node, or on any nodes of a joined Ray
    )
    kv_cache_gib: Annotated[float, Field(gt=0)] = 0.25  # for each rank
    block_size: Positive = 16  # tokens
    max_batch_tokens: Positive = 512  # in one step
    max_running: Positive = 256
    max_waiting: Positive = 512
    num_cpus: Annotated[float, Field(ge=0)] = (
        0.5  # for each rank, reserved in Ray; also the number of compute threads, at least 1
    )
    num_gpus: Annotated[float, Field(ge=0)] = 0.0  # for each rank
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}  # of a joined Ray: on nodes which have them

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two, such as 16")
        return value

    @property
    def kv_cache_bytes(self) -> int:
        return int(self.kv_cache_gib * (1 << 30))

    @property
    def threads(self) -> int:
        return max(1, round(self.num_cpus))


class DecodeSection(PoolSection):
    replicas: Positive = 1


class RouterSection(Section):
    """The front doors and the policy behind them."""

    replicas: Positive = 1  # side by side, each with doors of its own: router 1 at ports 10 above, and so on
    http: str = "127.0.0.1:8000"
    grpc: str = "127.0.0.1:8001"
    advertise_host: str = (
        ""  # told to clients; empty: where it listens, or the node's address in a joined Ray
    )
    policy: str = "cost"  # a name, or package.module:function
    ttft_ms: Positive = 1000  # what requests are to be served with that say nothing themselves
    itl_ms: Positive = 100
    local_below_tokens: NotNegative = 256  # a shorter uncached suffix is prefilled where it is decoded
    max_prefill_waiting: Positive = 8
    decisions_mib: Annotated[float, Field(ge=0)] = 32.0  # of decisions that `baton explain` can tell of
    decision_log: str = ""  # a file for all of them, for `baton replay`; empty: none
    decision_log_mib: Annotated[float, Field(gt=0)] = (
        256.0  # then it becomes NAME.1, in the place of the last one
    )
    tenants: dict[str, Annotated[float, Field(gt=0)]] = {}  # shares by `user`; who is not named has 1
    worker_queue: NotNegative = 32  # requests that may wait at a decode worker; the others wait in the router
    max_queued: NotNegative = 512
    max_queued_s: Seconds = 60.0
    max_active: Positive = 1024
    # Blocks at workers that the router's prefix index keeps at most, about 250 bytes each; beyond that the least
    # recently used are forgotten, and prompts that begin so find their worker by chance.
    prefix_index_entries: Positive = 1_000_000
    log_format: Literal["text", "json"] = (
        "text"  # of the router's log; json: one object a line, see docs/metrics.md
    )

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        try:
            find(value)
        except ValueError as error:
            raise ValueError(f"{error}{did_you_mean(value, POLICIES)}") from None
        return value

    @field_validator("http", "grpc")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s\[\]]+):(\d{1,5})", value)
        if match is None or int(match[2]) > 65535:
            raise ValueError("must be HOST:PORT, such as 127.0.0.1:8000 (port 0 takes any free one)")
        return value


class TransferSection(Section):
    """How KV moves between a prefill and a decode worker."""

    transport: TransportKind = "auto"
    slots: Annotated[int, Field(ge=2)] = 8  # landing slots of a decode worker; a pair needs two to overlap
    chunk_tokens: Positive = 256  # wanted; made to fit slots of at most 16 MiB
    # As KV crosses: exactly, or narrowed by the sender, which loses accuracy (docs/cluster.md).
    wire_dtype: Literal["stored", "int8", "fp8_e4m3"] = "stored"
    # Whether a sender puts pieces together before it sends them: where they would be below 64 KiB, or as told.
    gather: Literal["auto", "always", "never"] = "auto"
    # GB/s; a pair of workers between which less is measured when they are linked does not hand off; 0: whatever it is.
    min_bandwidth: Annotated[float, Field(ge=0)] = 0.0
    handoff_timeout_s: Seconds = 30.0


class ClusterSection(Section):
    """Where the processes run and how they are watched."""

    launcher: Literal["ray", "plain"] = "ray"
    # "local": a private Ray for this deployment; else a running one: its HOST:PORT, or "auto" to find it on this
    # machine. In a Ray job the default is "auto".
    address: str = "local"
    bind_host: str = ""  # empty: loopback on a private cluster, the node's address on a joined one
    advertise_host: str = ""  # empty: the same as bind_host
    log_dir: str = ""  # empty: a private temporary folder, removed after a clean stop
    start_timeout_s: Seconds = 180.0
    stop_timeout_s: Seconds = 5.0  # then what still runs is killed
    start_attempts: Positive = 2  # of one worker, before the first time that all is ready
    silence_s: Seconds = 15.0  # a worker that answers nothing for so long is killed and started again
    restart_backoff_s: Seconds = 0.5  # doubles with each death
    restart_backoff_max_s: Seconds = 30.0
    # A worker measures what steps cost at start, at most so long; 0: not.
    calibrate_s: Annotated[float, Field(ge=0)] = 0.5
    profile_dir: str = ""  # on each node: what steps cost is kept there between starts; empty: nowhere
    restart_reset_s: Seconds = 60.0  # who stayed up for so long starts again with the first back-off

    @field_validator("address")
    @classmethod
    def _known_address(cls, value: str) -> str:
        if value not in ("local", "auto") and not re.fullmatch(
            r"(\[[0-9a-fA-F:]+\]|[^:/\s\[\]]+):\d{1,5}", value
        ):
            raise ValueError("must be local, auto, or the HOST:PORT of a Ray head, such as 10.0.0.1:6379")
        return value


class Config(Section):
    """A whole deployment."""

    model: ModelSection = ModelSection()
    prefill: PoolSection = PoolSection()
    decode: DecodeSection = DecodeSection()
    router: RouterSection = RouterSection()
    kvtransfer: TransferSection = TransferSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.prefill.replicas and self.kvtransfer.chunk_tokens < self.decode.block_size:
            raise ValueError(
                f"kvtransfer.chunk_tokens = {self.kvtransfer.chunk_tokens}: is less than a block of "
                f"{self.decode.block_size} tokens (decode.block_size); make it a multiple of that"
            )
        for key, without in (("wire_dtype", "stored"), ("gather", "auto"), ("min_bandwidth", 0.0)):
            value = getattr(self.kvtransfer, key)
            if value != without and not self.prefill.replicas:
                raise ValueError(
                    f"kvtransfer.{key} = {value!r}: no KV crosses, since prefill.replicas is 0; remove it or start "
                    "prefill workers"
                )
        if self.kvtransfer.wire_dtype != "stored" and self.kvtransfer.gather == "never":
            raise ValueError(
                f"kvtransfer.gather = 'never', kvtransfer.wire_dtype = {self.kvtransfer.wire_dtype!r}: KV is narrowed "
                "where it is gathered; set kvtransfer.gather to auto or kvtransfer.wire_dtype to stored"
            )
        for key in ("local_below_tokens", "max_prefill_waiting"):
            if key in self.router.model_fields_set and self.router.policy in _WITHOUT_THRESHOLDS:
                raise ValueError(
                    f"router.{key} = {getattr(self.router, key)}: has no effect on the policy "
                    f"{self.router.policy!r}; remove it, or set router.policy to threshold"
                )
        if self.router.decision_log and not self.router.decisions_mib:
            raise ValueError(
                f"router.decision_log = {self.router.decision_log!r}: decisions are written when their requests end, "
                "and router.decisions_mib = 0 keeps none until then; raise it"
            )
        if self.cluster.launcher == "plain" and self.cluster.address != "local":
            raise ValueError(
                f"cluster.address = {self.cluster.address!r}: the plain launcher starts processes on this machine "
                "only; remove the address or set cluster.launcher to ray"
            )
        for name, pool in (("prefill", self.prefill), ("decode", self.decode)):
            if pool.placement == "spread" and (pool.tensor_parallel == 1 or self.cluster.launcher == "plain"):
                raise ValueError(
                    f"{name}.placement = 'spread': spreads the ranks of a worker over nodes of Ray, and there is "
                    f"{'one rank' if pool.tensor_parallel == 1 else 'no Ray'}; remove it, or set "
                    f"{name}.tensor_parallel above 1 with cluster.launcher ray"
                )
            if 0 < pool.num_gpus < 1 and pool.tensor_parallel > 1:
                raise ValueError(
                    f"{name}.num_gpus = {pool.num_gpus:g} with {name}.tensor_parallel = {pool.tensor_parallel}: two "
                    f"ranks of a worker cannot share a GPU (NCCL refuses it); set {name}.num_gpus to 1, or "
                    f"{name}.tensor_parallel to 1"
                )
            if pool.resources and self.cluster.address == "local":
                raise ValueError(
                    f"{name}.resources = {pool.resources}: chooses among the nodes of a running Ray, and "
                    "cluster.address is 'local'; give its HOST:PORT or remove the resources"
                )
        if self.router.http == self.router.grpc and not self.router.http.endswith(":0"):
            raise ValueError(
                f"router.http = router.grpc = {self.router.http!r}: two servers cannot share a port; change one"
            )
        doors = [
            router_address(door, index)
            for index in range(self.router.replicas)
            for door in (self.router.http, self.router.grpc)
            if not door.endswith(":0")
        ]
        if len(set(doors)) < len(doors) or any(int(door.rpartition(":")[2]) > 65535 for door in doors):
            raise ValueError(
                f"router.replicas = {self.router.replicas}: the ports of the routers ({', '.join(doors)}) meet or "
                f"are above 65535, since each router listens {ROUTER_PORT_STEP} above the one before; choose "
                "router.http and router.grpc anew"
            )
        if self.cluster.restart_backoff_max_s < self.cluster.restart_backoff_s:
            raise ValueError(
                f"cluster.restart_backoff_max_s = {self.cluster.restart_backoff_max_s}: is below "
                f"cluster.restart_backoff_s = {self.cluster.restart_backoff_s}; raise it"
            )
        return self


def router_address(first: str, index: int) -> str:
    """Where router `index` listens when router 0 listens at `first` (HOST:PORT; port 0 takes any free one)."""
    host, _, port = first.rpartition(":")
    return f"{host}:{int(port) + index * ROUTER_PORT_STEP if int(port) else 0}"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where plain YAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Reads `path` (None: all defaults), applies `section.key=value` overrides; raises ConfigError.

    The model's path comes back absolute.
    """
    tree = read_tree(path, overrides)
    if _RAY_JOB in os.environ:
        # A private Ray inside of a Ray job is hardly ever meant; who means it writes `local`.
        section = tree.get("cluster") or {}
        if isinstance(section, dict) and section.get("launcher") != "plain":
            tree["cluster"] = {"address": "auto", **section}
    where = str(path) if path is not None else "defaults"
    config = from_tree(tree, where)
    model = config.model
    folder = find_model(model.path, Path(path).resolve().parent if path is not None else None)
    if folder is None:
        folder = _fetch(model.path)
        model = model.model_copy(update={"served_name": model.served_name or model.path})
    return config.model_copy(update={"model": model.model_copy(update={"path": str(folder)})})


def read_tree(path: str | Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The nested mappings of a file (None: none) with overrides applied, unchecked; raises ConfigError."""
    tree = _read(Path(path)) if path is not None else {}
    for override in overrides:
        _apply(tree, override)
    return tree


def from_tree(tree: Mapping[str, Any], where: str) -> Config:
    """A checked configuration from nested mappings; raises ConfigError with one line for each mistake."""
    try:
        return Config.model_validate({key: {} if value is None else value for key, value in tree.items()})
    except ValidationError as error:
        raise ConfigError(explain(error, Config, where)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; give the path of a YAML file, or none for the defaults"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections such as `decode:`, not a {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value`; the value is read as YAML, so that numbers are numbers."""
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and section and key) or "." in key:
        raise ConfigError(f"--set {override}: must be SECTION.KEY=VALUE, such as decode.replicas=2")
    try:
        value = yaml.load(text, Loader=_Loader) if text.strip() else ""  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from None
    below = tree.get(section) or {}
    if not isinstance(below, dict):
        raise ConfigError(f"--set {override}: {section} is {below!r} in the file, not a section")
    tree[section] = {**below, key: value}


def _fetch(name: str) -> Path:
    """The folder of a model of the Hugging Face hub."""
    try:
        return resolve(name)
    except (ModelNotFound, UnsupportedModel) as error:
        raise ConfigError(f"model.path = {name!r}: {str(error).removeprefix(f'{name}: ')}") from None


def find_model(given: str, beside: Path | None) -> Path | None:
    """The model's folder; relative paths are tried beside the file, here, and in the checkout.

    None for what is no folder but may be a name of the hub.
    """
    path = Path(given).expanduser()
    bases = [base for base in (beside, Path.cwd(), CHECKOUT) if base is not None]
    tried = [path] if path.is_absolute() else list(dict.fromkeys(base / path for base in bases))
    for folder in tried:
        if (folder / "config.json").is_file():
            return folder.resolve()
    names = ", ".join(str(folder) for folder in tried)
    if given == ModelSection().path and not (CHECKOUT / "pyproject.toml").exists():
        raise ConfigError(
            f"model.path = {given!r}: that model is part of Baton's repository, and this Baton was installed "
            "without it; give a Hugging Face model folder with --set model.path=/path/to/folder or in the "
            "configuration file, or start Baton in a checkout"
        )
    if is_hub_name(given) and not any(folder.exists() for folder in tried):
        return None
    raise ConfigError(
        f"model.path = {given!r}: no config.json in {names}; give the path of a Hugging Face model folder"
    )
