"""Movers: KV goes end to end bit for bit or is refused; every job is answered once; a hung peer holds up nobody."""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from kvtransfer.digest import copy_and_digest, digest, piece_seed
from kvtransfer.handshake import CAPABILITIES, PREFLIGHT
from kvtransfer.join import Join
from kvtransfer.layout import DTYPES
from kvtransfer.loopback import LoopbackFabric, LoopbackFaults, LoopbackTransport
from kvtransfer.memory import Side, Sizes, TransferMemory
from kvtransfer.messages import (
    ChunkDone,
    Connect,
    Connected,
    Copied,
    CopyOut,
    Disconnect,
    Hello,
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
from kvtransfer.plan import Plan, plan
from kvtransfer.transport import Region, Rows, Settled
from kvtransfer.transports import open_transport
from tests.kvtransfer.peer import PeerProcess
from tests.kvtransfer.pools import kv_spec, pool_bytes, random_layers, random_worker, tokens_of, worker_tokens

torch.set_num_threads(1)

LIMIT_S = 30.0
SOURCE_BLOCKS = [9, 3, 17, 4, 40, 41, 12, 60, 2, 33, 21, 5]
TARGET_BLOCKS = [50, 1, 7, 22, 63, 8]


class Worker:
    """A worker of one or more ranks: their movers, joined as in a worker, with the pools of all. `kv` is its own: block
    sizes differ between workers. `open_endpoint(sizes, incarnation/rank)` opens a rank's endpoint."""

    def __init__(
        self,
        incarnation: str,
        role: Side,
        kv: KvSpec,
        open_endpoint: Callable[[Sizes, str], Any],
        seed: int,
        *,
        slots: int = 3,
        buffers: int = 3,
        gather: str = "auto",
    ) -> None:
        self.kv = kv
        self.incarnation = incarnation
        self.reports: queue.SimpleQueue[MoverReport] = queue.SimpleQueue()
        self.controls: queue.SimpleQueue[tuple[str, ChunkDone]] = queue.SimpleQueue()
        self.fatal: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.join = Join(kv.tensor_parallel, self.reports.put, lambda *said: self.controls.put(said))
        self.memories = []
        for rank in range(kv.tensor_parallel):
            sizes = Sizes.of(
                kv,
                rank,
                role=role,
                slots=slots if role == "decode" else 0,
                buffers=buffers,
                gather=gather,
                pool_bytes=pool_bytes(kv, rank),
            )
            self.memories.append(TransferMemory.over(open_endpoint(sizes, f"{incarnation}/{rank}"), sizes))
        self.pools = random_worker(kv, seed, [memory.storage for memory in self.memories])
        self.movers = [
            Mover(
                memory,
                self.pools[rank],
                kv,
                rank=rank,
                role=role,
                on_report=partial(self.join.put, rank),
                on_fatal=self.fatal.put,
                gather=gather,
            )
            for rank, memory in enumerate(self.memories)
        ]
        self.hello = Hello(
            worker_id=incarnation,
            incarnation=incarnation,
            kv=kv,
            transport=self.memories[0].name,
            endpoints=[memory.describe() for memory in self.memories],
            slot_count=slots,
            slot_bytes=[memory.slot_bytes for memory in self.memories],
        )

    @property
    def mover(self) -> Mover:
        return self.movers[0]

    @property
    def layers(self) -> list[torch.Tensor]:
        return [layer for pool in self.pools for layer in pool]

    def submit(self, job: MoverJob) -> None:
        for mover in self.movers:
            mover.submit(job)

    def ask(self, job: MoverJob) -> MoverReport:
        self.submit(job)
        return self.reports.get(timeout=LIMIT_S)

    def connect(self, other: Hello) -> None:
        report = self.ask(Connect(other))
        assert isinstance(report, Connected) and (report.peer, report.error) == (other.incarnation, "")

    def tokens(self, blocks: list[int], first: int, count: int) -> torch.Tensor:
        return worker_tokens(self.kv, self.pools, blocks, first, count)

    def close(self) -> None:
        for mover in self.movers:
            mover.close()
        assert self.fatal.empty()


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
        peer="prefill",
        handoff_id=7,
        lease_id=done.lease_id,
        chunk=done.chunk,
        slot=sent.lease.slot,
        blocks=TARGET_BLOCKS,
        blocks_start=0,
        first_token=sent.first_token,
        tokens=sent.tokens,
        seed=sent.seed,
        size_bytes=done.size_bytes,
        digests=done.digests,
    )
    return msgspec.structs.replace(job, **changes)


class Pair:
    """Prefill (blocks of 4 tokens) and decode (blocks of 8), over a loopback fabric; `chunk` cuts chunks of 20, which
    are no whole blocks of 8: only the last is shorter, and its index is only asked for turns of replicas."""

    def __init__(
        self,
        faults: LoopbackFaults | None = None,
        seed: int = 0,
        slots: int = 3,
        buffers: int = 3,
        gather: str = "auto",
        prefill: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
    ) -> None:
        self.fabric = LoopbackFabric(seed, faults)
        self.prefill = Worker(
            "prefill", "prefill", kv_spec(**prefill or {}), self.open, 1, buffers=buffers, gather=gather
        )
        decode_kv = kv_spec(**{"block_size": 8} | (decode or {}))
        self.decode = Worker("decode", "decode", decode_kv, self.open, 2, slots=slots)
        self.workers = [self.prefill, self.decode]
        self.prefill.connect(self.decode.hello)
        self.decode.connect(self.prefill.hello)

    def open(self, sizes: Sizes, name: str) -> LoopbackTransport:
        return self.fabric.open(name, staging_bytes=sizes.staging_bytes, landing_bytes=sizes.landing_bytes)

    def other(self, incarnation: str) -> Worker:
        """Another decode worker, which the prefill worker knows."""
        worker = Worker(incarnation, "decode", self.decode.kv, self.open, 3)
        self.workers.append(worker)
        self.prefill.connect(worker.hello)
        return worker

    @property
    def plan(self) -> Plan:
        return plan(self.prefill.kv, self.decode.kv)

    def send(self, job: SendChunk) -> ChunkDone:
        report = self.prefill.ask(job)
        assert isinstance(report, Sent) and not report.error
        assert (report.peer, report.handoff_id, report.lease_id) == (job.peer, 7, job.lease.lease_id)
        pieces = self.plan.pieces(job.lease.chunk, job.tokens)
        assert report.size_bytes == pieces.size_bytes.sum() and len(report.digests) == len(pieces)
        peer, done = self.prefill.controls.get(timeout=LIMIT_S)
        assert peer == job.peer
        return done

    def slot(self, index: int) -> Region:
        memory = self.decode.memories[0]
        landing: Region = memory.endpoint.landing
        return landing[index * memory.slot_bytes : (index + 1) * memory.slot_bytes]


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(*arguments: Any, **named: Any) -> Pair:
        pairs.append(Pair(*arguments, **named))
        return pairs[-1]

    yield make
    for pair in pairs:
        for worker in pair.workers:
            worker.close()


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
    expected = pair.prefill.tokens(SOURCE_BLOCKS, 0, 44)
    assert torch.equal(pair.decode.tokens(TARGET_BLOCKS, 0, 44), expected)


def test_a_chunk_is_refused_when_anything_about_it_is_wrong(pair: Pair) -> None:
    done = pair.send(chunk(slot=1))
    good = copy_out(chunk(slot=1), done)
    before = snapshot(pair.decode)
    wrong: list[dict[str, Any]] = [
        {"seed": 999},
        {"digests": [bytes(16)]},
        {"digests": [b""]},
        {"digests": []},
        {"digests": done.digests * 2},
        {"peer": "somebody"},
        {"chunk": -1},
        {"first_token": 4},
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
    expected = pair.prefill.tokens(SOURCE_BLOCKS, 20, 20)
    if copied_first:
        assert pair.decode.ask(copy_out(job, done)) == Copied(7, 101, True)
    in_time = pair.slot(0).copy()
    pair.fabric.advance(2 * 10**9)
    assert not np.array_equal(pair.slot(0), in_time), "nothing landed late"
    if copied_first:
        assert torch.equal(pair.decode.tokens(TARGET_BLOCKS, 20, 20), expected)
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

    monkeypatch.setattr("kvtransfer.receiving.copy_and_digest", copy)


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
        expected = pair.prefill.tokens(SOURCE_BLOCKS, 0, 20)
        assert torch.equal(pair.decode.tokens(TARGET_BLOCKS, 0, 20), expected)


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
    garbled = msgspec.structs.replace(pair.decode.hello, incarnation="other", endpoints=[b"garbage"])
    report = pair.prefill.ask(Connect(garbled))
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

    pair.prefill.join._send_control = broken
    report = pair.prefill.ask(chunk())
    assert isinstance(report, Sent) and "no stream" in report.error


def test_a_peer_that_hangs_holds_up_neither_others_nor_itself_for_ever(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(buffers=3)
    hung = pair.other("hung")
    pair.fabric.hang("hung/0")
    for _ in range(5):
        pair.prefill.mover.submit(chunk(peer="hung"))
    for index in range(3):
        pair.send(chunk(index=index))  # asserts that the report is of this one
    assert pair.prefill.ask(Probe("hung")) == Probed("hung", False)
    pair.fabric.resume("hung/0")
    for _ in range(5):
        report = pair.prefill.reports.get(timeout=LIMIT_S)
        assert isinstance(report, Sent) and report.peer == "hung" and not report.error
    expected = pair.prefill.controls.get(timeout=LIMIT_S)[1]
    seed = piece_seed(1000, 0, 20, range(3), range(2))
    assert [digest(hung.memories[0].endpoint.landing[: expected.size_bytes], seed)] == expected.digests


def test_disconnect_answers_what_waits_and_lets_settle_what_was_posted(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(buffers=2)
    pair.fabric.hang("decode/0")
    pair.prefill.mover.submit(chunk())
    for _ in range(2):  # answered in the round after the chunk was posted
        pair.prefill.ask(Probe("decode"))
    for index in (1, 2):
        pair.prefill.mover.submit(chunk(index=index))
    pair.prefill.mover.submit(Disconnect("decode"))
    waiting = [pair.prefill.reports.get(timeout=LIMIT_S) for _ in range(2)]
    assert all(isinstance(report, Sent) and "disconnected" in report.error for report in waiting)
    pair.fabric.resume("decode/0")
    report = pair.prefill.reports.get(timeout=LIMIT_S)
    assert isinstance(report, Sent) and report.chunk == 0 and not report.error


def test_a_dead_peer(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(LoopbackFaults(delay=(50, 50)))
    assert pair.decode.ask(Probe("prefill")) == Probed("prefill", False)
    pair.fabric.hang("decode/0")
    pair.prefill.mover.submit(chunk())
    pair.prefill.mover.submit(Probe("decode"))
    assert pair.prefill.reports.get(timeout=LIMIT_S) == Probed("decode", False)
    pair.fabric.kill("decode/0")
    report = pair.prefill.reports.get(timeout=LIMIT_S)
    assert isinstance(report, Sent) and "gone" in report.error
    assert pair.prefill.ask(Probe("decode")) == Probed("decode", True)


def test_close_answers_what_waits_and_then_refuses(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(buffers=1)
    pair.fabric.hang("decode/0")
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
        self.staging: Region = np.zeros(0, dtype=np.uint8)
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
    broken = BrokenTransport()

    def open_it(sizes: Sizes, name: str) -> BrokenTransport:
        broken.staging = np.zeros(sizes.staging_bytes, dtype=np.uint8)
        return broken

    worker = Worker("prefill", "prefill", kv_spec(), open_it, 1)
    with pytest.raises(RuntimeError):
        for _ in range(1000):
            worker.submit(Connect(worker.hello))
            report = worker.reports.get(timeout=LIMIT_S)
            assert isinstance(report, Connected) and report.error
            time.sleep(0.001)
    assert "broke" in str(worker.fatal.get(timeout=LIMIT_S))
    worker.mover.close()


@pytest.mark.parametrize("changes", [{"kv_heads": 1}, {"layers": 2}, {"dtype": "float16"}, {"block_size": 8}])
def test_a_pool_that_is_not_as_specified_is_refused(changes: dict[str, Any]) -> None:
    kv = kv_spec(**changes)
    endpoint = LoopbackFabric().open("x", staging_bytes=0, landing_bytes=0)
    memory = TransferMemory.over(endpoint, Sizes.of(kv, 0, role="decode"))
    with pytest.raises(ValueError, match="by its spec"):
        Mover(memory, random_layers(kv_spec(), 1), kv, rank=0, role="decode", on_report=print, on_fatal=print)


def test_submit_does_not_wait_for_the_mover(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    unblock = threading.Event()

    def block(report: MoverReport) -> None:
        unblock.wait(LIMIT_S)

    pair.prefill.join._on_report = block
    for _ in range(100):
        pair.prefill.mover.submit(Probe("decode"))
    assert not unblock.is_set()
    unblock.set()


# ---- several ranks, straight from the pool, other dtypes -----------------------------------------------------------

PAIRS = [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (4, 2), (4, 4), (3, 2), (2, 3)]


def hand_off(pair: Pair, tokens: int = 44) -> None:
    """All chunks of a prompt, cut as the roles cut it; none is left out on any rank."""
    step = pair.plan.chunk_tokens
    for index, first in enumerate(range(0, tokens, step)):
        job = chunk(index=index, first_token=first, tokens=min(step, tokens - first), slot=index % 3)
        done = pair.send(job)
        assert pair.decode.ask(copy_out(job, done)) == Copied(7, 100 + index, True)


@pytest.mark.parametrize("gather", ["always", "never"])
@pytest.mark.parametrize("ranks", PAIRS)
def test_kv_goes_between_any_numbers_of_ranks(
    make_pair: Callable[..., Pair], ranks: tuple[int, int], gather: str
) -> None:
    """2 kv heads: with 4 ranks each is stored twice, 3 ranks hold uneven parts. Chunks of 16 tokens."""
    pair = make_pair(
        LoopbackFaults(delay=(0, 5), reorder=True),
        gather=gather,
        prefill={"tensor_parallel": ranks[0], "chunk_tokens": 16},
        decode={"tensor_parallel": ranks[1]},
    )
    hand_off(pair)
    expected = pair.prefill.tokens(SOURCE_BLOCKS, 0, 44)
    assert torch.equal(pair.decode.tokens(TARGET_BLOCKS, 0, 44), expected)


def test_straight_from_the_pool_gives_the_same_bytes_and_digests(make_pair: Callable[..., Pair]) -> None:
    """Whether runs are hashed in place (one kv head) or copied together first (two)."""
    for ranks in (1, 2):
        prefill = {"tensor_parallel": ranks, "head_dim": 256}
        dones, slots = [], []
        for gather in ("always", "never"):
            pair = make_pair(gather=gather, prefill=prefill, decode={"head_dim": 256})
            dones.append(pair.send(chunk()))
            slots.append(pair.slot(0)[: dones[-1].size_bytes].copy())
        assert dones[0] == dones[1] and np.array_equal(slots[0], slots[1])


def written(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """The rows of the prefill side's writes from now on."""
    rows: list[Rows] = []
    for memory in pair.prefill.memories:
        write = memory.endpoint.write

        def record(peer: str, each: Rows, write: Callable[[str, Rows], int] = write) -> int:
            rows.append(each)
            return write(peer, each)

        monkeypatch.setattr(memory.endpoint, "write", record)
    return rows


def test_auto_sends_straight_from_the_pool_only_where_pieces_are_large(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are runs of neighbouring blocks: 64 tokens of 256 floats are 64 KiB."""
    shape = {"tensor_parallel": 2, "head_dim": 256, "chunk_tokens": 64}
    pair = make_pair(prefill=shape, decode=shape)
    rows = written(pair, monkeypatch)
    for blocks, expected in ((list(range(8, 24)), [6, 6]), ([*range(8, 23), 30], [1, 1])):
        rows.clear()
        job = chunk(tokens=64, blocks=blocks)
        done = pair.send(job)
        assert (
            sorted(len(each) for each in rows) == expected
        )  # [heads] x layers x k, v; or one staging buffer
        target = list(range(20, 28))
        assert pair.decode.ask(copy_out(job, done, blocks=target)) == Copied(7, 100, True)
        assert torch.equal(pair.decode.tokens(target, 0, 64), pair.prefill.tokens(blocks, 0, 64))


@pytest.mark.parametrize(
    ("prefill", "decode"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")]
)
def test_other_dtypes_are_converted_on_the_way(
    make_pair: Callable[..., Pair], prefill: str, decode: str
) -> None:
    pair = make_pair(prefill={"dtype": prefill, "tensor_parallel": 2}, decode={"dtype": decode})
    hand_off(pair)
    expected = pair.prefill.tokens(SOURCE_BLOCKS, 0, 44).to(DTYPES[decode])
    assert torch.equal(pair.decode.tokens(TARGET_BLOCKS, 0, 44), expected)


@pytest.mark.parametrize(("wire", "error"), [("int8", 1 / 127), ("fp8_e4m3", 1 / 14)])
def test_kv_crosses_as_8_bits_where_that_is_configured(
    make_pair: Callable[..., Pair], wire: str, error: float
) -> None:
    common = {"wire_dtype": wire, "chunk_tokens": 24}
    pair = make_pair(prefill=common | {"tensor_parallel": 4}, decode=common | {"dtype": "bfloat16"})
    hand_off(pair)
    expected = pair.prefill.tokens(SOURCE_BLOCKS, 0, 44)
    found = pair.decode.tokens(TARGET_BLOCKS, 0, 44).float()
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() <= (error / 2 + 1 / 256) * expected.abs().max()


def test_a_rank_without_a_piece_is_done_at_once(make_pair: Callable[..., Pair]) -> None:
    """One kv head on two prefill ranks, one block: a chunk has one piece, of either rank in turn."""
    shape = {"q_heads": 2, "kv_heads": 1, "chunk_tokens": 8}
    pair = make_pair(prefill=shape | {"tensor_parallel": 2}, decode=shape)
    pair.fabric.hang("decode/0")
    reports: queue.SimpleQueue[MoverReport] = queue.SimpleQueue()
    pair.prefill.movers[1]._on_report = reports.put
    for mover in pair.prefill.movers:
        mover.submit(chunk(tokens=8))
    report = reports.get(timeout=LIMIT_S)
    assert report == Sent("decode", 7, 100, 0, 0, epoch=1) and pair.prefill.reports.empty()
    pair.prefill.join.put(1, report)
    pair.fabric.resume("decode/0")
    report = pair.prefill.reports.get(timeout=LIMIT_S)
    assert isinstance(report, Sent) and not report.error and len(report.digests) == 1


def test_a_chunk_of_which_one_rank_did_not_get_its_part_is_not_done(make_pair: Callable[..., Pair]) -> None:
    """The rank's other writes settle first: their source blocks are in use until then."""
    pair = make_pair(decode={"tensor_parallel": 2})
    pair.fabric.hang("decode/0")
    pair.prefill.memories[0].endpoint.disconnect("decode/1")
    pair.prefill.submit(chunk())
    assert pair.prefill.ask(Probe("decode")) == Probed("decode", False)
    assert pair.prefill.reports.empty()
    pair.fabric.resume("decode/0")
    report = pair.prefill.reports.get(timeout=LIMIT_S)
    assert isinstance(report, Sent) and "decode/1 is not connected" in report.error and not report.digests
    assert pair.prefill.controls.empty()
    pair.prefill.connect(pair.decode.hello)
    pair.send(chunk(index=1, tokens=20))


def test_one_damaged_piece_refuses_the_chunk(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(prefill={"tensor_parallel": 2}, decode={"tensor_parallel": 1})
    job = chunk()
    done = pair.send(job)
    assert len(done.digests) == 2
    before = snapshot(pair.decode)
    for piece in range(2):
        at = piece * done.size_bytes // 2
        pair.slot(0)[at] ^= 1
        assert pair.decode.ask(copy_out(job, done)) == Copied(7, 100, False)
        assert unchanged(pair.decode, before)
        pair.slot(0)[at] ^= 1
    swapped = copy_out(job, done, digests=done.digests[::-1])
    assert pair.decode.ask(swapped) == Copied(7, 100, False)
    assert pair.decode.ask(copy_out(job, done)) == Copied(7, 100, True)


def test_what_has_landed_is_copied_out_after_its_sender_was_disconnected(pair: Pair) -> None:
    done = pair.send(chunk())
    pair.decode.submit(Disconnect("prefill"))
    assert pair.decode.ask(copy_out(chunk(), done)) == Copied(7, 100, True)
    assert pair.decode.ask(Probe("prefill")) == Probed("prefill", False)


def test_gone_is_a_worker_all_of_whose_ranks_are(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(prefill={"tensor_parallel": 2})
    for rank in range(2):
        assert pair.decode.ask(Probe("prefill")) == Probed("prefill", False)
        pair.fabric.kill(f"prefill/{rank}")
    assert pair.decode.ask(Probe("prefill")) == Probed("prefill", True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"endpoints": []}, "0 endpoints for 1 ranks"),
        ({"slot_bytes": []}, "slots of 0 for 1 ranks"),
        ({"kv": kv_spec(layers=4)}, "layers is 3"),
        ({"kv": kv_spec(dtype="bfloat16")}, "gather='never' cannot send float32 as bfloat16"),
    ],
)
def test_a_worker_that_cannot_be_served_is_not_connected(
    make_pair: Callable[..., Pair], changes: dict[str, Any], words: str
) -> None:
    pair = make_pair(gather="never")
    other = msgspec.structs.replace(pair.decode.hello, incarnation="other", **changes)
    report = pair.prefill.ask(Connect(other))
    assert isinstance(report, Connected) and words in report.error
    report = pair.prefill.ask(chunk(peer="other"))
    assert isinstance(report, Sent) and "not connected" in report.error


def test_slots_that_are_too_small_are_not_written_past(pair: Pair) -> None:
    small = msgspec.structs.replace(pair.decode.hello, slot_bytes=[pair.decode.hello.slot_bytes[0] // 4])
    pair.prefill.connect(small)
    report = pair.prefill.ask(chunk())
    assert isinstance(report, Sent) and "whose slots hold" in report.error
    assert not pair.slot(0).any()


def test_slots_of_impossible_sizes_do_not_end_the_mover(pair: Pair) -> None:
    said = {"slot_bytes": [1 << 63], "capabilities": list(CAPABILITIES)}
    report = pair.prefill.ask(Connect(msgspec.structs.replace(pair.decode.hello, **said)))
    assert isinstance(report, Connected) and "3 slots of 9223372036854775808 bytes" in report.error
    assert pair.prefill.fatal.empty()
    pair.prefill.connect(pair.decode.hello)
    sent = pair.prefill.ask(chunk())
    assert isinstance(sent, Sent) and not sent.error


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

    def open_here(sizes: Sizes, name: str) -> Any:
        return open_transport(kind, sizes.staging_bytes, sizes.landing_bytes, name)

    here = Worker("decode", "decode", kv_spec(block_size=8), open_here, 2, slots=2)
    there = PeerProcess()
    try:
        hello = msgspec.convert(there.call("open_mover", kind, {"block_size": 4}, "prefill", 1), type=Hello)
        here.connect(hello)
        here.mover.expecting(True)
        there.call("submit", _as_dict(Connect(msgspec.structs.replace(here.hello, capabilities=[PREFLIGHT]))))
        connected = msgspec.convert(there.call("report"), type=Connected)
        assert (connected.peer, connected.error) == ("decode", "")
        assert connected.measured is not None and connected.measured.error == ""
        assert connected.measured.bytes_per_s > 0 and connected.devices
        assert not here.memories[0].endpoint.landing[: 2 * here.memories[0].slot_bytes].any()
        for index in range(3):
            job = chunk(index=index, slot=index % 2)
            there.call("submit", _as_dict(job))
            done = msgspec.convert(there.call("control")[1], type=ChunkDone)
            assert there.call("report")["error"] == ""
            assert here.ask(copy_out(job, done)) == Copied(7, 100 + index, True)
        shape = (2, 64, 4, here.kv.kv_heads, here.kv.head_dim)
        source = [
            torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape) for data in there.call("pool")
        ]
        expected = tokens_of(source, SOURCE_BLOCKS, 0, 44)
        assert torch.equal(here.tokens(TARGET_BLOCKS, 0, 44), expected)
        there.process.kill()
        there.process.wait()
        end = time.monotonic() + LIMIT_S
        while here.ask(Probe("prefill")) != Probed("prefill", True):
            assert time.monotonic() < end
    finally:
        there.end()
        here.close()


def _as_dict(job: MoverJob) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(job))
