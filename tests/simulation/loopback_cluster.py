"""A cluster of `loopback_workers`, in which one thing happens at a time. It tells what could be next; others choose.

`test_roles_over_loopback` lets hypothesis choose. `round` is for the calm in between and for the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from kvtransfer.messages import Probed
from tests.simulation.loopback_workers import End, Opening, Size, Stream, WatchedFabric, Worker


class Cluster:
    """All workers, streams and the clock. It makes no choice."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size = size
        self.fabric = WatchedFabric(seed)
        self.now = 0.0
        self.streams: list[Stream] = []
        self._epochs: dict[tuple[str, str], int] = {}
        names = [f"decode-{i}" for i in range(size.decodes)] + [f"prefill-{i}" for i in range(size.prefills)]
        self.workers = [
            Worker(self.fabric, size, name, 1, decode=name.startswith("decode")) for name in names
        ]

    def ends(self, *, cut: bool) -> list[tuple[Stream, End]]:
        """Ends that can learn of a break (`cut`), or for which a message is on its way."""
        return [
            (stream, end)
            for stream in self.streams
            for end in stream.ends
            if end.worker.moves
            and end.opening is not Opening.CLOSED
            and (stream.cut if cut else bool(end.queue))
        ]

    def undialled(self) -> Iterator[tuple[Worker, Worker]]:
        """Decode and prefill workers without a stream, as far as the decode worker knows."""
        for decode in self.workers:
            for prefill in self.workers:
                if decode.decode and not prefill.decode and decode.moves and prefill.alive:
                    between = [s for s in self.streams if s.decode is decode and s.prefill is prefill]
                    if all(stream.ends[0].opening is Opening.CLOSED for stream in between):
                        yield decode, prefill

    def dial(self, decode: Worker, prefill: Worker) -> Stream:
        pair = (decode.incarnation, prefill.incarnation)
        epoch = self._epochs[pair] = self._epochs.get(pair, 0) + 1
        for stream in self.streams:
            ours = stream.decode is decode and stream.prefill is prefill
            if ours and stream.ends[1].opening is Opening.DIALLED:
                stream.ends[
                    1
                ].opening = Opening.CLOSED  # its hello comes before that of a later dial, or never
        self.streams = [s for s in self.streams if any(end.opening is not Opening.CLOSED for end in s.ends)]
        self.streams.append(Stream(decode, prefill, epoch))
        return self.streams[-1]

    def kill(self, worker: Worker) -> None:
        """As SIGKILL; its successor has the same name, another incarnation, and nothing else."""
        worker.alive = False
        self.fabric.each_rank(self.fabric.kill, worker)
        for stream in self.streams:
            if worker in (stream.decode, stream.prefill):
                stream.cut = True
                stream.end_of(worker).opening = Opening.CLOSED
        name, life = worker.incarnation.rsplit(".", 1)
        at = self.workers.index(worker)
        self.workers[at] = Worker(self.fabric, self.size, name, int(life) + 1, decode=worker.decode)

    def freeze(self, worker: Worker, frozen: bool) -> None:
        """As SIGSTOP and SIGCONT."""
        worker.frozen = frozen
        self.fabric.each_rank(self.fabric.hang if frozen else self.fabric.resume, worker)

    def moves(self) -> list[tuple[str, Callable[[], object]]]:
        """All that might happen next, with names: one message, job, half of a step, or tick."""
        possible: list[tuple[str, Callable[[], object]]] = [
            (f"{end.worker.incarnation} hears {type(end.queue[0]).__name__}", partial(stream.deliver, end))
            for stream, end in self.ends(cut=False)
        ]
        for worker in self.workers:
            if not worker.moves:
                continue
            if worker.plan is not None:
                possible.append(
                    (f"{worker.incarnation} ends its step", partial(worker.finish_step, self.now))
                )
            elif worker.inbox or worker.reports or not worker.role.at_rest:
                possible.append((f"{worker.incarnation} begins a step", partial(worker.begin_step, self.now)))
            for rank, mover in enumerate(worker.movers):
                for name, act in mover.moves().items():
                    possible.append((f"rank {rank} of {worker.incarnation} {name}", act))
        for stream, end in self.ends(cut=True):
            possible.append((f"{end.worker.incarnation} learns of a break", partial(stream.learn, end)))
        for decode, prefill in self.undialled():
            name = f"{decode.incarnation} dials {prefill.incarnation}"
            possible.append((name, partial(self.dial, decode, prefill)))
        return possible

    def round(self, seconds: float, ticks: int) -> bool:
        """Everybody who can move does all that is to be done; False when nothing was."""
        busy = False
        for stream, end in self.ends(cut=True):
            stream.learn(end)
            busy = True
        for decode, prefill in list(self.undialled()):
            self.dial(decode, prefill)
            busy = True
        for stream, end in self.ends(cut=False):
            while end.queue:
                stream.deliver(end)
                busy = True
        for worker in self.workers:
            if not worker.moves:
                continue
            if worker.plan is not None:
                worker.finish_step(self.now)
            # To ask again and again whether a frozen peer is gone changes nothing.
            busy |= bool(worker.inbox) or not all(
                isinstance(report, Probed) and not report.gone for report in worker.reports
            )
            if worker.begin_step(self.now):
                worker.finish_step(self.now)
                busy = True
            for mover in worker.movers:
                while mover.take_job() or mover.send_next():
                    pass
                mover.poll()
        self.fabric.advance(ticks)
        self.now += seconds
        return busy
