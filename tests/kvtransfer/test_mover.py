"""Movers: KV goes end to end bit for bit or is refused; every job is answered once; a hung peer holds up nobody."""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from kvtransfer.digest import copy_and_digest, digest
from kvtransfer.loopback import LoopbackFabric, LoopbackFaults, LoopbackTransport
from kvtransfer.messages import (
    ChunkDone,
    Connect,
    Connected,
    Copied,
    CopyOut,
    Disconnect,
    KvSpec,
    Lease,
    MoverJob,
    MoverReport,
    Probe,
    Probed,
    SendChunk,
    Sent,
)
from kvtransfer.mover import Mover
from kvtransfer.transport import Region, Rows, Settled
from kvtransfer.transports import open_transport
from tests.kvtransfer.peer import PeerProcess
from tests.kvtransfer.pools import kv_spec, random_layers, tokens_of

torch.set_num_threads(1)

LIMIT_S = 30.0
SOURCE_BLOCKS = [9, 3, 17, 4, 40, 41, 12, 60, 2, 33, 21, 5]
TARGET_BLOCKS = [50, 1, 7, 22, 63, 8]


class Worker:
    """A mover with its pool and what it reported. `kv` is its own: block sizes differ between workers."""

    def __init__(
        self,
        endpoint: Any,
        seed: int,
        kv: KvSpec | None = None,
        on_report: Callable[[Any], None] | None = None,
    ) -> None:
        self.kv = kv or kv_spec()
        self.endpoint = endpoint
        self.slot_bytes = self.kv.chunk_tokens * self.kv.token_bytes
        self.layers = random_layers(self.kv, seed)
        self.reports: queue.SimpleQueue[MoverReport] = queue.SimpleQueue()
        self.controls: queue.SimpleQueue[tuple[str, ChunkDone]] = queue.SimpleQueue()
        self.fatal: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.mover = Mover(
            endpoint,
            self.layers,
            self.kv,
            slot_bytes=self.slot_bytes,
            on_report=on_report or self.reports.put,
            send_control=lambda peer, done: self.controls.put((peer, done)),
            on_fatal=self.fatal.put,
        )

    def ask(self, job: MoverJob) -> MoverReport:
        self.mover.submit(job)
        return self.reports.get(timeout=LIMIT_S)


def chunk(peer: str = "decode", slot: int = 0, index: int = 0, **changes: Any) -> SendChunk:
    """Chunk `index` of a prompt of 44 tokens in chunks of 20; the prefill side's blocks start at token 0."""
    first = 20 * index
    job = SendChunk(
        peer=peer,
        handoff_id=7,
        lease=Lease(100 + index, 1, index, slot, 5.0),
        blocks=SOURCE_BLOCKS,
        blocks_start=0,
        first_token=first,
        tokens=min(20, 44 - first),
        seed=1000 + index,
    )
    return msgspec.structs.replace(job, **changes)


def copy_out(sent: SendChunk, done: ChunkDone, **changes: Any) -> CopyOut:
    job = CopyOut(
        handoff_id=7,
        lease_id=done.lease_id,
        slot=sent.lease.slot,
        blocks=TARGET_BLOCKS,
        blocks_start=0,
        first_token=sent.first_token,
        tokens=sent.tokens,
        seed=sent.seed,
        size_bytes=done.size_bytes,
        digest=done.digest,
    )
    return msgspec.structs.replace(job, **changes)


class Pair:
    """Prefill (blocks of 4 tokens) and decode (blocks of 8), over a loopback fabric."""

    def __init__(
        self, faults: LoopbackFaults | None = None, seed: int = 0, slots: int = 3, buffers: int = 3
    ) -> None:
        self.fabric = LoopbackFabric(seed, faults)
        slot = kv_spec().chunk_tokens * kv_spec().token_bytes
        self.slot_bytes = slot
        self.prefill = Worker(self.fabric.open("prefill", staging_bytes=buffers * slot, landing_bytes=0), 1)
        decode = self.fabric.open("decode", staging_bytes=0, landing_bytes=slots * slot)
        self.decode = Worker(decode, 2, kv_spec(block_size=8))
        self.workers = [self.prefill, self.decode]
        self.connect("decode", decode)
        assert self.decode.ask(Connect("prefill", self.prefill.endpoint.describe())) == Connected("prefill")

    def connect(self, peer: str, endpoint: LoopbackTransport) -> None:
        assert self.prefill.ask(Connect(peer, endpoint.describe())) == Connected(peer)

    def send(self, job: SendChunk) -> ChunkDone:
        report = self.prefill.ask(job)
        assert report == Sent(
            job.peer, 7, job.lease.lease_id, job.lease.chunk, job.tokens * self.prefill.kv.token_bytes
        )
        peer, done = self.prefill.controls.get(timeout=LIMIT_S)
        assert peer == job.peer
        return done

    def slot(self, index: int) -> Region:
        landing: Region = self.decode.endpoint.landing
        return landing[index * self.slot_bytes : (index + 1) * self.slot_bytes]


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(*arguments: Any, **named: Any) -> Pair:
        pairs.append(Pair(*arguments, **named))
        return pairs[-1]

    yield make
    for pair in pairs:
        for worker in pair.workers:
            worker.mover.close()
            assert worker.fatal.empty()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


def snapshot(worker: Worker) -> list[torch.Tensor]:
    return [layer.clone() for layer in worker.layers]


def unchanged(worker: Worker, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(layer, old) for layer, old in zip(worker.layers, before, strict=True))


def test_kv_goes_end_to_end(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(LoopbackFaults(delay=(0, 30), reorder=True))
    pair.decode.mover.expecting(True)
    for index in range(3):
        done = pair.send(chunk(index=index, slot=2 - index))
        assert (done.handoff_id, done.lease_id, done.epoch, done.chunk) == (7, 100 + index, 1, index)
        job = copy_out(chunk(index=index, slot=2 - index), done)
        assert pair.decode.ask(job) == Copied(7, 100 + index, True)
    expected = tokens_of(pair.prefill.layers, SOURCE_BLOCKS, 0, 44)
    assert torch.equal(tokens_of(pair.decode.layers, TARGET_BLOCKS, 0, 44), expected)


def test_a_chunk_is_refused_when_anything_about_it_is_wrong(pair: Pair) -> None:
    done = pair.send(chunk(slot=1))
    good = copy_out(chunk(slot=1), done)
    before = snapshot(pair.decode)
    wrong: list[dict[str, Any]] = [
        {"seed": 999},
        {"digest": bytes(16)},
        {"digest": b""},
        {"size_bytes": done.size_bytes - 1},
        {"size_bytes": 0, "tokens": 0},
        {"tokens": 19},
        {"tokens": 10**9, "size_bytes": 10**9 * pair.decode.kv.token_bytes},
        {"slot": 0},
        {"slot": 3},
        {"slot": -1},
        {"blocks": TARGET_BLOCKS[:2]},
        {"blocks": [64, 1, 2]},
    ]
    for changes in wrong:
        assert pair.decode.ask(msgspec.structs.replace(good, **changes)) == Copied(7, 100, False), changes
        assert unchanged(pair.decode, before), changes
    assert pair.decode.ask(good) == Copied(7, 100, True)
    assert not unchanged(pair.decode, before)


def test_a_byte_flipped_in_the_slot_is_refused(pair: Pair) -> None:
    done = pair.send(chunk())
    before = snapshot(pair.decode)
    pair.slot(0)[done.size_bytes // 2] ^= 1
    assert pair.decode.ask(copy_out(chunk(), done)) == Copied(7, 100, False)
    assert unchanged(pair.decode, before)


def test_bytes_flipped_on_the_way_are_refused(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(LoopbackFaults(corrupt=1.0))
    before = snapshot(pair.decode)
    done = pair.send(chunk())
    assert pair.decode.ask(copy_out(chunk(), done)) == Copied(7, 100, False)
    assert unchanged(pair.decode, before)


@pytest.mark.parametrize("copied_first", [False, True])
def test_what_lands_late_never_reaches_blocks(make_pair: Callable[..., Pair], copied_first: bool) -> None:
    """A write that failed lands after all, in a slot that was (wrongly) given to the next chunk at once."""
    pair = make_pair(LoopbackFaults(fail=1.0, late=(10**9, 10**9)))
    failed = pair.prefill.ask(chunk())
    assert isinstance(failed, Sent) and failed.error
    pair.fabric.faults = LoopbackFaults()
    job = chunk(index=1)
    done = pair.send(job)
    before = snapshot(pair.decode)
    expected = tokens_of(pair.prefill.layers, SOURCE_BLOCKS, 20, 20)
    if copied_first:
        assert pair.decode.ask(copy_out(job, done)) == Copied(7, 101, True)
    in_time = pair.slot(0).copy()
    pair.fabric.advance(2 * 10**9)
    assert not np.array_equal(pair.slot(0), in_time), "nothing landed late"
    if copied_first:
        assert torch.equal(tokens_of(pair.decode.layers, TARGET_BLOCKS, 20, 20), expected)
    else:
        assert pair.decode.ask(copy_out(job, done)) == Copied(7, 101, False)
        assert unchanged(pair.decode, before)


def writer_in_the_way(pair: Pair, monkeypatch: pytest.MonkeyPatch, before_copy: bool) -> None:
    """A late writer overwrites slot 0 right before or right after the mover has taken its copy."""

    def copy(source: Region, target: Region, seed: int) -> bytes:
        if before_copy:
            pair.slot(0)[:] = 0xAA
        result = copy_and_digest(source, target, seed)
        pair.slot(0)[:] = 0xAA
        return result

    monkeypatch.setattr("kvtransfer.mover.copy_and_digest", copy)


@pytest.mark.parametrize("before_copy", [False, True])
def test_it_is_the_copy_that_is_verified_and_used(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, before_copy: bool
) -> None:
    done = pair.send(chunk())
    before = snapshot(pair.decode)
    writer_in_the_way(pair, monkeypatch, before_copy)
    assert pair.decode.ask(copy_out(chunk(), done)) == Copied(7, 100, not before_copy)
    if before_copy:
        assert unchanged(pair.decode, before)
    else:
        expected = tokens_of(pair.prefill.layers, SOURCE_BLOCKS, 0, 20)
        assert torch.equal(tokens_of(pair.decode.layers, TARGET_BLOCKS, 0, 20), expected)


def test_a_job_that_cannot_be_done_is_answered_and_the_next_one_works(pair: Pair) -> None:
    bad = [
        chunk(peer="nobody"),
        chunk(slot=3),
        chunk(slot=-1),
        chunk(tokens=33),
        chunk(tokens=0),
        chunk(blocks=[1]),
        chunk(blocks=[64] * 12),
    ]
    for job in bad:
        report = pair.prefill.ask(job)
        assert isinstance(report, Sent) and report.error and report.size_bytes == 0, job
        assert (report.peer, report.lease_id) == (job.peer, 100)
    report = pair.prefill.ask(Connect("other", b"garbage"))
    assert isinstance(report, Connected) and report.peer == "other" and report.error
    assert pair.prefill.ask(Probe("nobody")) == Probed("nobody", False)
    report = pair.decode.ask(chunk(peer="prefill"))
    assert isinstance(report, Sent) and "staging" in report.error
    assert pair.prefill.controls.empty()
    pair.send(chunk())


def test_a_failed_write_is_reported_without_chunk_done(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(LoopbackFaults(fail=1.0))
    report = pair.prefill.ask(chunk())
    assert isinstance(report, Sent) and report.error
    assert pair.prefill.controls.empty()


def test_chunk_done_that_cannot_be_sent_is_reported(pair: Pair) -> None:
    def broken(peer: str, done: ChunkDone) -> None:
        raise OSError("no stream")

    pair.prefill.mover._send_control = broken
    report = pair.prefill.ask(chunk())
    assert isinstance(report, Sent) and "no stream" in report.error


def test_a_peer_that_hangs_holds_up_neither_others_nor_itself_for_ever(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(buffers=3)
    pair.connect("hung", hung := pair.fabric.open("hung", staging_bytes=0, landing_bytes=3 * pair.slot_bytes))
    pair.fabric.hang("hung")
    for _ in range(5):
        pair.prefill.mover.submit(chunk(peer="hung"))
    for index in range(3):
        pair.send(chunk(index=index))  # asserts that the report is of this one
    assert pair.prefill.ask(Probe("hung")) == Probed("hung", False)
    pair.fabric.resume("hung")
    for _ in range(5):
        report = pair.prefill.reports.get(timeout=LIMIT_S)
        assert isinstance(report, Sent) and report.peer == "hung" and not report.error
    expected = pair.prefill.controls.get(timeout=LIMIT_S)[1]
    assert digest(hung.landing[: expected.size_bytes], 1000) == expected.digest


def test_disconnect_answers_what_waits_and_lets_settle_what_was_posted(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(buffers=2)
    pair.fabric.hang("decode")
    pair.prefill.mover.submit(chunk())
    for _ in range(2):  # answered in the round after the chunk was posted
        pair.prefill.ask(Probe("decode"))
    for index in (1, 2):
        pair.prefill.mover.submit(chunk(index=index))
    pair.prefill.mover.submit(Disconnect("decode"))
    waiting = [pair.prefill.reports.get(timeout=LIMIT_S) for _ in range(2)]
    assert all(isinstance(report, Sent) and "disconnected" in report.error for report in waiting)
    pair.fabric.resume("decode")
    report = pair.prefill.reports.get(timeout=LIMIT_S)
    assert isinstance(report, Sent) and report.chunk == 0 and not report.error


def test_a_dead_peer(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(LoopbackFaults(delay=(50, 50)))
    assert pair.decode.ask(Probe("prefill")) == Probed("prefill", False)
    pair.fabric.hang("decode")
    pair.prefill.mover.submit(chunk())
    pair.prefill.mover.submit(Probe("decode"))
    assert pair.prefill.reports.get(timeout=LIMIT_S) == Probed("decode", False)
    pair.fabric.kill("decode")
    report = pair.prefill.reports.get(timeout=LIMIT_S)
    assert isinstance(report, Sent) and "gone" in report.error
    assert pair.prefill.ask(Probe("decode")) == Probed("decode", True)


def test_close_answers_what_waits_and_then_refuses(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(buffers=1)
    pair.fabric.hang("decode")
    pair.prefill.mover.submit(chunk())
    for _ in range(2):  # answered in the round after the chunk was posted
        pair.prefill.ask(Probe("decode"))
    for index in (1, 2):
        pair.prefill.mover.submit(chunk(index=index))
    pair.prefill.mover.close()
    reports = [pair.prefill.reports.get(timeout=LIMIT_S) for _ in range(2)]
    assert all(isinstance(report, Sent) and "closed" in report.error for report in reports)
    with pytest.raises(RuntimeError):
        pair.prefill.mover.submit(Probe("decode"))
    pair.prefill.mover.close()


class BrokenTransport:
    """Its poll fails from the second call on, as when a library has lost its way."""

    name = "broken"

    def __init__(self) -> None:
        self.staging: Region = np.zeros(1 << 20, dtype=np.uint8)
        self.landing: Region = np.zeros(0, dtype=np.uint8)
        self.polls = 0

    def describe(self) -> bytes:
        return b""

    def connect(self, peer: str, description: bytes) -> None:
        raise MemoryError("odd")

    def disconnect(self, peer: str) -> None: ...

    def write(self, peer: str, rows: Rows) -> int:
        return 1

    def poll(self) -> list[Settled]:
        self.polls += 1
        if self.polls > 2:
            raise OSError("the transport broke")
        return []

    def gone(self, peer: str) -> bool:
        return False

    def close(self) -> None: ...


def test_a_broken_transport_is_fatal_and_says_so() -> None:
    worker = Worker(BrokenTransport(), 1)
    with pytest.raises(RuntimeError):
        for _ in range(1000):
            worker.mover.submit(Connect("x", b""))
            report = worker.reports.get(timeout=LIMIT_S)
            assert isinstance(report, Connected) and report.error
            time.sleep(0.001)
    assert "broke" in str(worker.fatal.get(timeout=LIMIT_S))
    worker.mover.close()


def test_a_pool_that_is_not_as_specified_is_refused() -> None:
    endpoint = LoopbackFabric().open("x", staging_bytes=0, landing_bytes=0)
    with pytest.raises(ValueError, match="bytes in the pool"):
        Mover(
            endpoint,
            random_layers(kv_spec(), 1),
            kv_spec(kv_heads=1),
            slot_bytes=4096,
            on_report=print,
            send_control=print,
            on_fatal=print,
        )


def test_submit_does_not_wait_for_the_mover(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    unblock = threading.Event()

    def block(report: MoverReport) -> None:
        unblock.wait(LIMIT_S)

    pair.prefill.mover._on_report = block
    for _ in range(100):
        pair.prefill.mover.submit(Probe("decode"))
    assert not unblock.is_set()
    unblock.set()


# ---- over real transports, in two processes ----------------------------------------------------------------------


@pytest.mark.nixl
@pytest.mark.skipif(importlib.util.find_spec("nixl_cu13") is None, reason="nixl_cu13 is not installed")
@pytest.mark.parametrize("tls", ["", "tcp"])
def test_two_processes_over_nixl(monkeypatch: pytest.MonkeyPatch, tls: str) -> None:
    if tls:
        monkeypatch.setenv("UCX_TLS", tls)
    _two_processes("nixl")


def test_two_processes_over_shm() -> None:
    _two_processes("shm")


def _two_processes(kind: str) -> None:
    """Prefill in a child process, decode here; blocks of 4 there, of 8 here."""
    kv = kv_spec(block_size=8)
    slot = kv.chunk_tokens * kv.token_bytes
    endpoint = open_transport(kind, 0, 2 * slot, "decode")
    here = Worker(endpoint, 2, kv)
    there = PeerProcess()
    try:
        description = there.call("open_mover", kind, {"block_size": 4}, 0, 3, 1)
        assert here.ask(Connect("prefill", description)) == Connected("prefill")
        there.call("submit", _as_dict(Connect("decode", endpoint.describe())))
        assert there.call("report") == {"type": "Connected", "peer": "decode", "error": ""}
        here.mover.expecting(True)
        for index in range(3):
            job = chunk(index=index, slot=index % 2)
            there.call("submit", _as_dict(job))
            done = msgspec.convert(there.call("control")[1], type=ChunkDone)
            assert there.call("report")["error"] == ""
            assert here.ask(copy_out(job, done)) == Copied(7, 100 + index, True)
        shape = (2, 64, 4, kv.kv_heads, kv.head_dim)
        source = [
            torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape) for data in there.call("pool")
        ]
        expected = tokens_of(source, SOURCE_BLOCKS, 0, 44)
        assert torch.equal(tokens_of(here.layers, TARGET_BLOCKS, 0, 44), expected)
        there.process.kill()
        there.process.wait()
        end = time.monotonic() + LIMIT_S
        while here.ask(Probe("prefill")) != Probed("prefill", True):
            assert time.monotonic() < end
    finally:
        there.end()
        here.mover.close()
    assert here.fatal.empty()


def _as_dict(job: MoverJob) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(job))
