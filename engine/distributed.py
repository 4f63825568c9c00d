"""A group of ranks over torch.distributed: NCCL between GPUs, gloo between CPUs, of one host or several.

The same calls as `engine.collective.SharedMemory`, which is many times faster between CPU ranks of one host. Made by
whoever starts a rank; one for each process, since torch.distributed keeps its groups for the process.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from engine.collective import CollectiveError, GroupAborted, Patience, RankStuck
from engine.shards import Shard, shards


class Distributed:
    """A group over torch.distributed; the address is that of rank 0's store.

    NCCL and gloo sum in an order of their own, the same for all ranks. With NCCL nothing waits here but the stream; its
    watchdog ends the process after `timeout_s`.
    """

    def __init__(
        self,
        backend: Literal["nccl", "gloo"],
        address: str,
        rank: int,
        size: int,
        timeout_s: float,
        *,
        join_timeout_s: float = 300.0,
        listener: int | None = None,
    ) -> None:
        """Returns when all ranks have joined. `listener`: descriptor of rank 0's socket that listens there already."""
        self.rank, self.size = Shard(rank, size).rank, size
        self.timeout_s = timeout_s
        self._polled = backend == "gloo"
        self._aborted = ""
        host, _, port = address.rpartition(":")
        joining = timedelta(seconds=join_timeout_s)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host,
                int(port),
                size,
                is_master=rank == 0,
                timeout=joining,
                wait_for_workers=False,
                master_listen_fd=listener,
                use_libuv=True,
            )
            bound = joining if self._polled else timedelta(seconds=timeout_s)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=bound)
        except (RuntimeError, ValueError) as error:  # a DistError is a RuntimeError
            raise CollectiveError(
                f"rank {rank} of {size} cannot join {backend} at {address}: {error}"
            ) from error

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        total = partial.contiguous()
        self._finish(lambda: dist.all_reduce(total, async_op=True))
        return total

    def gather_columns(self, local: torch.Tensor, columns: int) -> torch.Tensor | None:
        widths = [len(shard.part(columns)) for shard in shards(self.size)]
        if local.shape[1] != widths[self.rank]:
            raise ValueError(
                f"rank {self.rank} has {local.shape[1]} of {columns} columns, not {widths[self.rank]}"
            )
        equal = local.new_zeros(len(local), max(widths))
        equal[:, : local.shape[1]] = local
        gathered = [torch.empty_like(equal) for _ in widths] if self.rank == 0 else None
        self._finish(lambda: dist.gather(equal, gathered, dst=0, async_op=True))
        if gathered is None:
            return None
        return torch.cat([part[:, :width] for part, width in zip(gathered, widths, strict=True)], dim=1)

    def abort(self, reason: str) -> None:
        self._aborted = self._aborted or reason
        if not self._polled:
            group = dist.group.WORLD
            if group is not None:
                group.abort()

    def close(self) -> None:
        broken, self._aborted = bool(self._aborted), self._aborted or "closed"
        if dist.is_initialized() and not broken:  # of a broken group some operation may never end
            dist.destroy_process_group()

    def _finish(self, start: Callable[[], dist.Work | None]) -> None:
        if self._aborted:
            raise GroupAborted(f"rank {self.rank}: {self._aborted}")
        try:
            work = start()
            if work is None:
                return
            if self._polled:
                self._poll(work)
            work.wait()
        except CollectiveError:
            raise
        except RuntimeError as error:
            self._aborted = str(error)
            raise RankStuck(f"rank {self.rank} of {self.size}: a rank has gone: {error}", ()) from error

    def _poll(self, work: dist.Work) -> None:
        """gloo's own wait cannot be woken."""
        patience = Patience(self.timeout_s)
        while not work.is_completed():
            if self._aborted:
                raise GroupAborted(f"rank {self.rank}: {self._aborted}")
            if not patience.pause():
                self._aborted = f"rank {self.rank} of {self.size} waited {self.timeout_s:g} s for the others"
                raise RankStuck(self._aborted, ())
