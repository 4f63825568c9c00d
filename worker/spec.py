"""Everything that one worker is told when it is started, as one frozen struct (JSON between processes).

`cluster` builds it from the deployment's configuration; nothing below `cluster` reads files or the environment for
configuration.

How a worker is started without Ray: `python -m prefill` or `python -m decode`, the spec as one line of JSON on its
standard input. It prints one line of JSON (`Started`) on standard output when its gRPC server answers and its engine
is ready; logs go to standard error. It ends when its standard input closes, so it never outlives who started it.
Under Ray an actor does the same through `open_shell(spec)`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["prefill", "decode"]


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    role: Role
    worker_id: str  # "decode-0"; stable over restarts
    incarnation: str  # a UUID, new at each start
    token: str  # of the cluster, authenticates every internal call
    bind_host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    model_path: str
    dtype: str = "auto"
    tensor_parallel: int = 1
    rank: int = 0  # 0 is the worker's shell and its engine; the others are started beside it with the same incarnation
    rendezvous: str = ""  # where the ranks meet: path of a unix socket, or HOST:PORT if on several hosts
    rank_timeout_s: float = 20.0  # a rank that keeps the others waiting for so long is stuck: the worker ends
    kv_cache_bytes: int = 1 << 30  # of each rank
    block_size: int = 16
    max_batch_tokens: int = 512
    max_running: int = 256
    max_waiting: int = 512
    threads: int = 1
    device: str = "cpu"
    transport: str = "auto"
    slots: int = 8  # landing slots of a decode worker
    chunk_tokens: int = 256  # wanted; made to fit slots of at most 16 MiB
    wire_dtype: str = ""  # "" = as stored, "int8", "fp8_e4m3"
    gather: str = "auto"  # before sending: "auto" = where pieces would be below 64 KiB, "always", "never"
    min_bandwidth: float = (
        0.0  # GB/s; a prefill worker refuses decode workers to which it measures less; 0: none
    )
    handoff_timeout_s: float = 30.0
    calibrate_s: float = 0.0  # at most, of steps that measure the machine before the first request; 0: none
    failpoints: str = ""  # a folder, for tests: see `kvtransfer.failpoints`
    profile_dir: str = ""  # where what steps cost is kept between lives; empty: nowhere


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says when it is ready."""

    worker_id: str
    role: Role
    incarnation: str
    address: str
    pid: int
    engine_pids: list[int]  # by rank
    transport: str = ""
    blocks: int = 0

    @property
    def engine_pid(self) -> int:
        """Of rank 0."""
        return self.engine_pids[0]
