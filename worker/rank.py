"""The process of a worker's rank 0: loads the model, owns the KV, the transport and the step loop.

No gRPC, asyncio or Ray in it.

`python -m prefill.rank` and `python -m decode.rank` call `main` with their role. The shell passes the specification
and the inherited descriptors as JSON in the one argument.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable

import msgspec

from baton import RELEASE
from engine.collective import SharedMemory
from engine.ledger import BlockLedger
from engine.scheduler import Limits
from kvtransfer import failpoints
from kvtransfer.handshake import CAPABILITIES
from kvtransfer.join import Join
from kvtransfer.messages import ChunkDone, Hello
from worker.calibration import Profile, starting_costs
from worker.loop import Mover, ReportQueue, Runner, StepLoop
from worker.messages import Fatal, Ready, ToEngine, ToPeer
from worker.rank_link import RankReady, across_hosts
from worker.rank_parts import RankParts, open_collective, open_parts
from worker.ranks import GroupMover, GroupRunner, RankGroup
from worker.ring import RingFds, RingReader, RingWriter
from worker.role import Role
from worker.spec import WorkerSpec

log = logging.getLogger("baton.rank")

MakeRole = Callable[[WorkerSpec, Hello, BlockLedger, Limits], Role]


class RankArguments(msgspec.Struct, frozen=True):
    spec: WorkerSpec
    to_engine: RingFds
    from_engine: RingFds
    life: int  # read end of a pipe whose other end only the shell holds
    listener: int = -1  # where ranks on other hosts dial
    token: int = -1  # holds the cluster token then


def main(make_role: MakeRole) -> None:
    """Runs until shut down. Any failure is told to the shell as `Fatal` and ends the process with 1."""
    arguments = msgspec.json.decode(sys.argv[1], type=RankArguments)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s {arguments.spec.worker_id} engine %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    threading.Thread(target=_die_with_shell, args=(arguments.life,), daemon=True, name="life").start()
    outbox = RingWriter(arguments.from_engine)
    status = 0
    try:
        _run(arguments, outbox, make_role)
    except Exception as error:
        log.error("%s", traceback.format_exc())
        outbox.send(Fatal(f"{type(error).__name__}: {error}"))
        status = 1
    sys.stderr.flush()
    # Not sys.exit: libraries loaded by the transport are known to crash in exit handlers on some machines.
    os._exit(status)


def _die_with_shell(life: int) -> None:
    """The pipe closes when the shell dies, however it dies: an engine without a shell must not hold memory."""
    os.read(life, 1)
    os._exit(1)


def _run(arguments: RankArguments, outbox: RingWriter, make_role: MakeRole) -> None:
    spec = arguments.spec
    group, parts = _open(arguments)
    ranks = group.wait_ready() if group is not None else {}
    hello = _hello(parts, ranks)
    reports = ReportQueue()

    def fatal(error: BaseException) -> None:
        log.error("%s", error)
        try:
            outbox.send(Fatal(str(error)))
        finally:
            os._exit(1)  # also when the shell does not read

    def send_control(peer: str, done: ChunkDone) -> None:
        failpoints.reached("before-chunk-done")
        outbox.send(ToPeer(peer, done.epoch, done))
        failpoints.reached("after-chunk-done")

    failpoints.arm(spec.failpoints, spec.role)

    join = Join(spec.tensor_parallel, reports.put, send_control)
    mover = parts.start_mover(lambda report: join.put(0, report), fatal)
    if group is not None:
        group.watch(join, fatal)
    blocks = BlockLedger(parts.blocks, spec.block_size)
    limits = Limits(spec.max_batch_tokens, spec.max_running)
    role = make_role(spec, hello, blocks, limits)
    runner_of_all: Runner = GroupRunner(parts.runner, group) if group is not None else parts.runner
    profile = Profile.of(spec, parts.kv.model, parts.kv.dtype)
    role.costs = starting_costs(runner_of_all, blocks, limits, spec.calibrate_s, profile)
    inbox = RingReader(arguments.to_engine, ToEngine)
    mover_of_all: Mover | None = (
        GroupMover(mover, group) if group is not None and mover is not None else mover
    )
    loop = StepLoop(role, runner_of_all, mover_of_all, reports, inbox, outbox)
    outbox.send(Ready(hello, blocks.total, [os.getpid(), *(ranks[rank].pid for rank in sorted(ranks))]))
    try:
        loop.run()
    finally:
        profile.save(role.costs.costs)
        if group is not None:
            group.close()
        if mover is not None:
            mover.close()


def _open(arguments: RankArguments) -> tuple[RankGroup | None, RankParts]:
    """Meets the other ranks, if there are any, and loads this rank's share while they load theirs."""
    spec = arguments.spec
    if spec.tensor_parallel == 1:
        return None, open_parts(spec, None)
    listener = None
    if arguments.listener >= 0:
        listener = socket.socket(fileno=arguments.listener)
        spec = msgspec.structs.replace(spec, token=os.pread(arguments.token, 1 << 16, 0).decode())
    if across_hosts(spec.rendezvous) or spec.device != "cpu":
        store, store_listener = _open_store(spec.rendezvous)
        group = RankGroup.meet(spec, listener, -1, store)
        return group, open_parts(spec, open_collective(spec, -1, store, store_listener))
    memory_fd = SharedMemory.create(spec.tensor_parallel)
    group = RankGroup.meet(spec, listener, memory_fd, "")
    return group, open_parts(spec, open_collective(spec, memory_fd, ""))


def _open_store(rendezvous: str) -> tuple[str, socket.socket]:
    """Where the ranks' torch.distributed meets, HOST:PORT, and the socket that listens there."""
    host = rendezvous.rpartition(":")[0].strip("[]") if across_hosts(rendezvous) else "127.0.0.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.create_server((host, 0), family=family)
    return f"{host}:{found.getsockname()[1]}", found


def _hello(parts: RankParts, ranks: dict[int, RankReady]) -> Hello:
    """What this worker says to its peers of all its ranks. Raises RuntimeError when they disagree."""
    for rank, ready in ranks.items():
        if ready.blocks != parts.blocks:
            raise RuntimeError(f"rank {rank} has {ready.blocks} KV blocks, rank 0 has {parts.blocks}")
    others = [ranks[rank] for rank in sorted(ranks)]
    spec, memory = parts.spec, parts.memory
    return Hello(
        worker_id=spec.worker_id,
        incarnation=spec.incarnation,
        kv=parts.kv,
        transport=memory.name if memory is not None else "",
        endpoints=[parts.endpoint, *(each.endpoint for each in others)],
        release=RELEASE,
        capabilities=list(CAPABILITIES),
        slot_count=spec.slots if spec.role == "decode" else 0,
        slot_bytes=[parts.slot_bytes, *(each.slot_bytes for each in others)],
    )
