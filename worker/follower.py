"""A rank of a worker beside rank 0: computes its share of the steps that rank 0 plans, and moves its part of the KV.

`python -m worker.follower`, the spec (with `rank` of 1 or more) as one line of JSON on its standard input; it prints
one line, `FollowerStarted`, when it has met rank 0. It has no role, scheduler or gRPC, decides nothing, and ends at
once when rank 0 or whoever started it is gone.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import traceback

import msgspec

from kvtransfer import failpoints
from kvtransfer.messages import MoverReport
from worker.messages import Fatal, Shutdown
from worker.rank_link import Expecting, LinkLost, RankLink, RankReady, dial_leader
from worker.rank_parts import open_collective, open_parts
from worker.spec import WorkerSpec
from worker.step_codec import StepDecoder, StepDelta

log = logging.getLogger("baton.follower")

FLUSH_S = 0.002  # while the link is full
LOOK_S = 0.2  # while it is not: the mover's thread may fill it at any time


class FollowerStarted(msgspec.Struct, frozen=True):
    """What it says on standard output."""

    worker_id: str
    incarnation: str
    rank: int
    pid: int


def main() -> None:
    spec = msgspec.json.decode(sys.stdin.readline(), type=WorkerSpec)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s {spec.worker_id} rank {spec.rank} %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    threading.Thread(target=_die_with_parent, daemon=True, name="life").start()
    status, link = 0, None
    try:
        link, collective_fd, store = dial_leader(spec)
        started = FollowerStarted(spec.worker_id, spec.incarnation, spec.rank, os.getpid())
        sys.stdout.write(msgspec.json.encode(started).decode() + "\n")
        sys.stdout.flush()
        os.dup2(2, 1)  # nobody reads on: what libraries print must not fill a pipe
        threading.Thread(target=_die_with_leader, args=(link,), daemon=True, name="leader").start()
        _serve(spec, link, collective_fd, store)
    except LinkLost as lost:
        log.error("rank 0: %s", lost)
        status = 1
    except Exception as error:
        log.error("%s", traceback.format_exc())
        if link is not None:
            link.send(Fatal(f"{type(error).__name__}: {error}"))
        status = 1
    sys.stderr.flush()
    # Not sys.exit: libraries loaded by the transport are known to crash in exit handlers on some machines.
    os._exit(status)


def _die_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def _die_with_leader(link: RankLink) -> None:
    """The last descriptor of a link shows its end, even while this rank waits for rank 0 inside a step."""
    poll = select.poll()
    poll.register(link.filenos()[-1], select.POLLRDHUP)
    poll.poll()
    log.error("rank 0 is gone")
    os._exit(1)


def _serve(spec: WorkerSpec, link: RankLink, collective_fd: int, store: str) -> None:
    def report(message: MoverReport) -> None:
        link.send(message)

    def fatal(error: BaseException) -> None:
        try:
            link.send(Fatal(str(error)))
        finally:
            os._exit(1)  # also when rank 0 does not read

    failpoints.arm(spec.failpoints, spec.role)
    parts = open_parts(spec, open_collective(spec, collective_fd, store))
    mover = parts.start_mover(report, fatal)
    link.send(
        RankReady(
            rank=spec.rank,
            pid=os.getpid(),
            blocks=parts.blocks,
            endpoint=parts.endpoint,
            slot_bytes=parts.slot_bytes,
        )
    )
    decoder = StepDecoder()
    poll = select.poll()
    for fd in link.filenos():
        poll.register(fd, select.POLLIN)
    while True:
        poll.poll(1000 * (LOOK_S if link.flush() else FLUSH_S))
        for message in link.read():
            if isinstance(message, StepDelta):
                parts.runner.run(decoder.decode(message))
            elif isinstance(message, Expecting):
                if mover is not None:
                    mover.expecting(message.on)
            elif isinstance(message, Shutdown):
                if mover is not None:
                    mover.close()
                return
            elif mover is not None:
                mover.submit(message)


if __name__ == "__main__":
    main()
