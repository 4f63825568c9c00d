"""What every rank of a worker is made of, rank 0 or not: its share of the model, of the KV, and of the transport.

`worker.rank` and `worker.follower` open it with the same spec, so that all ranks come to the same sizes by themselves.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from engine.collective import Collective, SharedMemory
from engine.distributed import Distributed
from engine.model_config import ModelConfig, fingerprint
from engine.runner import DTYPES, Runner, load_runner
from engine.weights import Progress
from kvtransfer.chunks import chunk_tokens_for
from kvtransfer.memory import TransferMemory
from kvtransfer.messages import KvGroup, KvSpec, MoverReport
from kvtransfer.mover import Mover
from worker.spec import WorkerSpec

log = logging.getLogger("baton.rank")

_LONG_LOAD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class RankParts:
    """One rank's own. `memory` is None for a decode worker without landing slots: it neither sends nor receives."""

    spec: WorkerSpec
    runner: Runner
    kv: KvSpec
    memory: TransferMemory | None

    @property
    def blocks(self) -> int:
        return self.runner.kv_cache.num_blocks

    @property
    def endpoint(self) -> bytes:
        return self.memory.describe() if self.memory is not None else b""

    @property
    def slot_bytes(self) -> int:
        return self.memory.slot_bytes if self.memory is not None else 0

    def start_mover(
        self, on_report: Callable[[MoverReport], None], on_fatal: Callable[[BaseException], None]
    ) -> Mover | None:
        """Starts the thread that owns the transport."""
        if self.memory is None:
            return None
        device = self.runner.kv_cache.layers[0].device  # with its index, without which it cannot be set
        return Mover(
            self.memory,
            self.runner.kv_cache.layers,
            self.kv,
            rank=self.spec.rank,
            role=self.spec.role,
            on_report=on_report,
            on_fatal=on_fatal,
            set_device=(lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None,
            gather=self.spec.gather,
        )


def open_collective(
    spec: WorkerSpec, memory_fd: int, store: str, listener: socket.socket | None = None
) -> Collective:
    """How the ranks sum: over the shared memory of `memory_fd`, or with torch.distributed that meets at `store`.

    `listener`: rank 0's socket, which listens there already.
    """
    if not store:
        return SharedMemory(memory_fd, spec.rank, spec.tensor_parallel, spec.rank_timeout_s)
    return Distributed(
        "gloo" if spec.device == "cpu" else "nccl",
        store,
        spec.rank,
        spec.tensor_parallel,
        spec.rank_timeout_s,
        listener=None if listener is None else listener.detach(),
    )


def open_parts(spec: WorkerSpec, collective: Collective | None) -> RankParts:
    """Loads this rank's share and opens its transport. Raises what says why it cannot."""
    torch.set_num_threads(spec.threads)
    kv = _kv_spec(spec)
    memory: TransferMemory | None = None

    def storage(size_bytes: int) -> torch.Tensor:
        """The memory of the KV pool, which the transport may want to send from."""
        nonlocal memory
        if spec.role == "prefill" or spec.slots:
            memory = TransferMemory.open(
                spec.transport,
                kv,
                spec.rank,
                role=spec.role,
                slots=spec.slots,
                gather=spec.gather,
                incarnation=spec.incarnation,
                pool_bytes=size_bytes,
                device=spec.device,
                host=spec.advertise_host,
            )
        if memory is not None and memory.storage is not None:
            return memory.storage
        return torch.empty(size_bytes, dtype=torch.uint8, device=spec.device)

    runner = load_runner(
        spec.model_path,
        dtype=spec.dtype,
        kv_bytes=spec.kv_cache_bytes,
        block_size=spec.block_size,
        device=spec.device,
        progress=_logged(time.monotonic),
        collective=collective,
        storage=storage,
    )
    if memory is not None:
        log.info("transport %s, %d slots of %d KiB", memory.name, spec.slots, memory.slot_bytes >> 10)
    return RankParts(spec, runner, kv, memory)


def _kv_spec(spec: WorkerSpec) -> KvSpec:
    config = ModelConfig.from_folder(spec.model_path)
    kv = KvSpec(
        model=fingerprint(spec.model_path),
        layers=config.layers,
        q_heads=config.q_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=str(DTYPES[config.dtype if spec.dtype == "auto" else spec.dtype]).removeprefix("torch."),
        block_size=spec.block_size,
        chunk_tokens=0,
        tensor_parallel=spec.tensor_parallel,
        wire_dtype=spec.wire_dtype,
        groups=tuple(KvGroup(group.kind, group.layers, group.window) for group in config.groups),
    )
    chunk_tokens = chunk_tokens_for(kv.token_bytes, [spec.block_size], wanted=spec.chunk_tokens)
    return msgspec.structs.replace(kv, chunk_tokens=chunk_tokens)


def _logged(clock: Callable[[], float]) -> Progress:
    """Tells of a model that takes a while to read: a line for each tenth, none for less than a GiB."""
    began, told = clock(), 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        tenths = 10 * done // total
        if total >= _LONG_LOAD_BYTES and tenths > told:
            told = tenths
            seconds = clock() - began
            log.info("weights: %d %% of %.1f GiB after %.0f s", 10 * tenths, total / 2**30, seconds)

    return progress
