"""The rank process: loads the model, owns the KV, the transport and the step loop. No gRPC, asyncio or Ray in it.

`python -m prefill.rank` and `python -m decode.rank` call `main` with their role. The shell passes the specification
and the inherited descriptors as JSON in the one argument.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import msgspec
import torch

from baton import RELEASE
from engine.ledger import BlockLedger
from engine.model_config import fingerprint
from engine.runner import Runner, load_runner
from engine.scheduler import Limits
from engine.weights import Progress
from kvtransfer.chunks import chunk_tokens_for
from kvtransfer.messages import Hello, KvGroup, KvSpec
from kvtransfer.mover import Mover
from kvtransfer.transports import open_transport
from worker.calibration import Profile, starting_costs
from worker.loop import ReportQueue, StepLoop
from worker.messages import Fatal, Ready, ToEngine, ToPeer
from worker.ring import RingFds, RingReader, RingWriter
from worker.role import Role
from worker.spec import WorkerSpec

log = logging.getLogger("baton.rank")

_LONG_LOAD_BYTES = 1 << 30
STAGING_BUFFERS = 3  # one being filled while others are in flight

MakeRole = Callable[[WorkerSpec, Hello, BlockLedger, Limits], Role]


class RankArguments(msgspec.Struct, frozen=True):
    spec: WorkerSpec
    to_engine: RingFds
    from_engine: RingFds
    life: int  # read end of a pipe whose other end only the shell holds


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
    torch.set_num_threads(spec.threads)
    runner = load_runner(
        spec.model_path,
        dtype=spec.dtype,
        kv_bytes=spec.kv_cache_bytes,
        block_size=spec.block_size,
        device=spec.device,
        progress=_logged(time.monotonic),
    )
    kv = _kv_spec(spec, runner)
    blocks = BlockLedger(runner.kv_cache.num_blocks, spec.block_size)
    reports = ReportQueue()
    mover, hello = _open_mover(spec, kv, runner, reports, outbox)
    limits = Limits(spec.max_batch_tokens, spec.max_running)
    role = make_role(spec, hello, blocks, limits)
    profile = Profile.of(spec, kv.model, kv.dtype)
    role.costs = starting_costs(runner, blocks, limits, spec.calibrate_s, profile)
    inbox = RingReader(arguments.to_engine, ToEngine)
    loop = StepLoop(role, runner, mover, reports, inbox, outbox)
    own_limit = min(runner.config.max_positions, blocks.total * spec.block_size)
    outbox.send(Ready(hello, blocks.total, spec.block_size, min(spec.max_model_len or own_limit, own_limit)))
    try:
        loop.run()
    finally:
        profile.save(role.costs.costs)
        if mover is not None:
            mover.close()


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


def _kv_spec(spec: WorkerSpec, runner: Runner) -> KvSpec:
    config = runner.config
    kv = KvSpec(
        model=fingerprint(spec.model_path),
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=str(runner.kv_cache.dtype).removeprefix("torch."),
        block_size=spec.block_size,
        chunk_tokens=0,
        groups=tuple(KvGroup(group.kind, group.layers, group.window) for group in config.groups),
    )
    chunk_tokens = chunk_tokens_for(kv.token_bytes, [spec.block_size], wanted=spec.chunk_tokens)
    return msgspec.structs.replace(kv, chunk_tokens=chunk_tokens)


def _open_mover(
    spec: WorkerSpec, kv: KvSpec, runner: Runner, reports: ReportQueue, outbox: RingWriter
) -> tuple[Mover | None, Hello]:
    """The transport with this role's regions (slots, or buffers to send from) and the hello that names it."""
    slot_bytes = kv.chunk_tokens * kv.token_bytes
    slots = spec.slots if spec.role == "decode" else 0
    staging = STAGING_BUFFERS if spec.role == "prefill" else 0
    hello = Hello(
        worker_id=spec.worker_id,
        incarnation=spec.incarnation,
        kv=kv,
        transport="",
        endpoint=b"",
        release=RELEASE,
        slot_count=slots,
        slot_bytes=slot_bytes,
    )
    if not slots and not staging:
        return None, hello
    transport = open_transport(
        spec.transport, staging * slot_bytes, slots * slot_bytes, spec.incarnation, spec.advertise_host
    )

    def fatal(error: BaseException) -> None:
        outbox.send(Fatal(f"transport: {error}"))
        os._exit(1)

    mover = Mover(
        transport,
        runner.kv_cache.layers,
        kv,
        slot_bytes=slot_bytes,
        on_report=reports.put,
        send_control=lambda peer, done: outbox.send(ToPeer(peer, done.epoch, done)),
        on_fatal=fatal,
    )
    endpoint = transport.describe()
    log.info("transport %s, %d slots of %d KiB", transport.name, slots, slot_bytes >> 10)
    return mover, msgspec.structs.replace(hello, transport=transport.name, endpoint=endpoint)
