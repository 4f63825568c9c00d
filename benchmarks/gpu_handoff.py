"""KV between two processes of one GPU, for `benchmarks.gpu`: pushes over CUDA IPC, and Baton's own movers.

`push` measures what NIXL and torch make of CUDA IPC, which Baton does not use yet: its regions are the host's memory.
`handoff` drives a prefill and a decode `Mover` as the roles would, while the prompt is computed and without. Run as a
program this file is the other process; it ends when its standard input does.
"""

from __future__ import annotations

import os
import queue
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from kvtransfer.chunks import chunk_tokens_for, chunks
from kvtransfer.memory import TransferMemory
from kvtransfer.messages import Connect, Connected, Copied, CopyOut, Hello, KvSpec, Lease, SendChunk, Sent
from kvtransfer.mover import Mover
from kvtransfer.nixl_transport import load
from kvtransfer.rows import OPERATION_BYTES

WAIT_S = 30.0
SLOTS = 8


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_handoff", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(process: subprocess.Popen[str], line: str = "") -> str:
    """Its next line, after it was sent `line`; RuntimeError when it has ended. The section's budget bounds it."""
    assert process.stdin is not None and process.stdout is not None
    if line:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"the other process ended with {process.wait(WAIT_S)}")
    return answer.rstrip("\n")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# ---- pushes over CUDA IPC ----------------------------------------------------------------------------------------


def pattern(size: int, device: str) -> torch.Tensor:
    """uint8 [size], the same in both processes, without a period that a misplaced page would hide in."""
    numbers = torch.arange(size // 8, dtype=torch.int64, device=device)
    return (numbers * 0x5851F42D4C957F2D + 1).view(torch.uint8)


class _Agent:
    """A NIXL agent over one tensor."""

    def __init__(self, memory: torch.Tensor) -> None:
        api = load()
        self.kind = "VRAM" if memory.is_cuda else "DRAM"
        self.memory, self.index = memory, memory.device.index or 0
        self.name = uuid.uuid4().hex
        self.agent: Any = api.nixl_agent(
            self.name, api.nixl_agent_config(backends=[], enable_prog_thread=False)
        )
        self.agent.create_backend("UCX", {})
        where = np.array([[memory.data_ptr(), memory.nbytes, self.index]], dtype=np.uint64)
        self.registered = self.agent.register_memory(where, mem_type=self.kind)

    def describe(self) -> str:
        return f"{self.agent.get_agent_metadata().hex()} {self.memory.data_ptr()} {self.index}"

    def push(self, name: str, base: int, index: int, operations: Sequence[np.ndarray]) -> None:
        """Writes rows (here, there, bytes) and waits until all have ended."""
        handles = []
        for rows in operations:
            here, there = np.zeros((len(rows), 3), np.uint64), np.zeros((len(rows), 3), np.uint64)
            here[:, 0], there[:, 0] = rows[:, 0] + self.memory.data_ptr(), rows[:, 1] + base
            here[:, 1] = there[:, 1] = rows[:, 2]
            here[:, 2], there[:, 2] = self.index, index
            mine = self.agent.get_xfer_descs(here, mem_type=self.kind)
            theirs = self.agent.get_xfer_descs(there, mem_type=self.kind)
            handles.append(self.agent.initialize_xfer("WRITE", mine, theirs, name, b""))
        deadline = time.monotonic() + WAIT_S
        pending = [handle for handle in handles if self.agent.transfer(handle) != "DONE"]
        while pending:
            states = [(handle, self.agent.check_xfer_state(handle)) for handle in pending]
            if any(state not in ("DONE", "PROC") for _, state in states) or time.monotonic() > deadline:
                raise RuntimeError(f"a push did not end well: {sorted({state for _, state in states})}")
            pending = [handle for handle, state in states if state == "PROC"]
        for handle in handles:
            self.agent.release_xfer_handle(handle)


def push_nixl(
    size: int, page: int, device: str, timed: Callable[[Callable[[], None]], float]
) -> dict[str, Any]:
    """Payload GB/s of pushing `size` bytes as one piece, in operations as Baton cuts them, and in pages from places
    in any order. RuntimeError when something else arrives."""
    source = pattern(size, device)
    agent = _Agent(source)
    other = _start("receive", str(size), device)
    try:
        metadata, base, index = _ask(other).split()
        name = agent.agent.add_remote_agent(bytes.fromhex(metadata)).decode()
        order = list(range(size // page))
        random.Random(1).shuffle(order)
        cut = np.arange(0, size, min(OPERATION_BYTES, size), dtype=np.uint64)
        pages = np.array([[at * page, to * page, page] for to, at in enumerate(order)], dtype=np.uint64)
        whole = np.array([[0, 0, size]], dtype=np.uint64)
        whole_cut = [np.array([[at, at, min(OPERATION_BYTES, size)]], dtype=np.uint64) for at in cut]
        ways = {"whole": [whole], "operations": whole_cut, "pages": [pages], "page operations": _cut(pages)}
        speeds: dict[str, Any] = {}
        for way, operations in ways.items():
            seconds = timed(lambda rows=operations: agent.push(name, int(base), int(index), rows))  # type: ignore[misc]
            speeds[way] = size / seconds / 1e9
            sent = source if "page" not in way else source.view(-1, page)[torch.tensor(order, device=device)]
            if _ask(other, "check") != str(_checksum(sent.reshape(-1))):
                raise RuntimeError(f"what was pushed ({way}) is not what arrived")
        return speeds
    finally:
        _end(other)


def _cut(rows: np.ndarray) -> list[np.ndarray]:
    each = max(1, OPERATION_BYTES // int(rows[0, 2]))
    return [rows[first : first + each] for first in range(0, len(rows), each)]


def _checksum(memory: torch.Tensor) -> int:
    """Depends on every word and its place."""
    words = memory.view(torch.int64)
    return int((words * (2 * torch.arange(len(words), device=words.device) + 1)).sum())


def _receive(size: int, device: str) -> None:
    import select

    memory = torch.zeros(size, dtype=torch.uint8, device=device)
    agent = _Agent(memory)
    print(agent.describe(), flush=True)
    while True:
        if select.select([sys.stdin], [], [], 0.0002)[0]:
            if not sys.stdin.readline():
                os._exit(0)  # the agent's own end may crash once its peer is gone
            found = _checksum(memory)
            memory.zero_()
            if memory.is_cuda:
                torch.cuda.synchronize()
            print(found, flush=True)  # last: the next push may come at once
        agent.agent.get_new_notifs()


def push_torch(
    size: int, page: int, device: str, timed: Callable[[Callable[[], None]], float]
) -> dict[str, Any]:
    """The same with torch's CUDA IPC: a copy, and an indexed copy by one kernel, into the other process's tensor."""
    context = torch.multiprocessing.get_context("spawn")
    tensors, done = context.Queue(), context.Event()
    other = context.Process(target=_lend, args=(size, device, tensors, done), daemon=True)
    other.start()
    try:
        theirs = tensors.get(timeout=WAIT_S)
        source = pattern(size, device)
        order = torch.randperm(size // page, generator=torch.Generator().manual_seed(1)).to(device)
        words, targets = (
            source.view(torch.int64).view(-1, page // 8),
            theirs.view(torch.int64).view(-1, page // 8),
        )

        def synchronised(step: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                step()
                if source.is_cuda:
                    torch.cuda.synchronize()

            return run

        speeds = {"whole": size / timed(synchronised(lambda: theirs.copy_(source))) / 1e9}
        speeds["pages"] = size / timed(synchronised(lambda: targets.index_copy_(0, order, words))) / 1e9
        if not torch.equal(targets[order[-1]], words[-1]):
            raise RuntimeError("what was pushed is not what arrived")
        return speeds
    finally:
        done.set()
        other.join(WAIT_S)
        if other.is_alive():
            other.kill()


def _lend(size: int, device: str, tensors: Any, done: Any) -> None:
    memory = torch.zeros(size, dtype=torch.uint8, device=device)
    tensors.put(memory)
    done.wait(2 * WAIT_S)


# ---- Baton's movers ----------------------------------------------------------------------------------------------


def kv_spec(
    layers: int, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int
) -> KvSpec:
    kv = KvSpec(
        model="random",
        layers=layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."),
        block_size=block_size,
        chunk_tokens=0,
    )
    return msgspec.structs.replace(kv, chunk_tokens=chunk_tokens_for(kv.token_bytes, [block_size], 256))


def open_side(
    role: Any, kv: KvSpec, layers: list[torch.Tensor], on_report: Callable[[Any], None]
) -> tuple[Mover, Hello]:
    """A mover over `layers`, and what its worker would say of itself."""
    device = layers[0].device
    memory = TransferMemory.open(
        "auto",
        kv,
        0,
        role=role,
        slots=SLOTS if role == "decode" else 0,
        gather="always",
        incarnation=f"{role}-{uuid.uuid4().hex[:8]}",
        pool_bytes=0,
        device=device.type,
    )
    mover = Mover(
        memory,
        layers,
        kv,
        rank=0,
        role=role,
        on_report=on_report,
        on_fatal=lambda error: os._exit(70),
        set_device=(lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None,
        gather="always",
    )
    hello = Hello(
        worker_id=role,
        incarnation=f"{role}-bench",
        kv=kv,
        transport=memory.name,
        endpoints=[memory.describe()],
        slot_count=memory.slots,
        slot_bytes=[memory.slot_bytes],
    )
    return mover, hello


class Handoff:
    """The sending side, and the other process, which lands what comes in blocks of its own."""

    def __init__(self, kv: KvSpec, layers: list[torch.Tensor], tokens: int) -> None:
        self._kv = kv
        self._blocks = list(range(tokens // kv.block_size))
        self._grid = chunks(0, tokens, kv.chunk_tokens)
        self._reports: queue.Queue[Any] = queue.Queue()
        self._mover, hello = open_side("prefill", kv, layers, self._reports.put)
        self._other = _start(
            "land", msgspec.json.encode(kv).decode(), str(len(self._blocks)), layers[0].device.type
        )
        self._hello = msgspec.json.decode(_ask(self._other), type=Hello)
        _ask(self._other, msgspec.json.encode(hello).decode())
        self._mine = hello.incarnation
        self._mover.submit(Connect(self._hello))
        connected = self._reports.get(timeout=WAIT_S)
        if not isinstance(connected, Connected) or connected.error:
            raise RuntimeError(f"the movers do not meet: {connected}")
        self.transport = hello.transport
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._other.stdout is not None
        for line in self._other.stdout:
            self._reports.put(msgspec.json.decode(line, type=Copied))
        self._reports.put(None)

    def send(self, ready: Callable[[], int], number: int) -> None:
        """Hands everything over, of which `ready()` tokens are computed: returns when the last chunk has landed and was
        verified. RuntimeError if any was not."""
        slots, waiting, landed, sent = list(range(SLOTS)), deque(enumerate(self._grid)), 0, dict[int, int]()
        deadline = time.monotonic() + WAIT_S
        while landed < len(self._grid):
            while waiting and slots and sum(waiting[0][1]) <= ready():
                index, chunk = waiting.popleft()
                sent[index] = slots.pop()
                self._submit(index, chunk, sent[index], number)
            try:
                report = self._reports.get(timeout=0.0005 if waiting and slots else 1.0)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{landed} of {len(self._grid)} chunks landed in {WAIT_S} s") from None
                continue
            if isinstance(report, Sent) and not report.error:
                self._copy_out(report, sent[report.chunk])
            elif isinstance(report, Copied) and report.verified:
                slots.append(sent[report.lease_id])
                landed += 1
            else:
                raise RuntimeError(f"a chunk was not handed over: {report}")

    def _submit(self, index: int, chunk: Any, slot: int, number: int) -> None:
        self._mover.submit(
            SendChunk(
                peer=self._hello.incarnation,
                handoff_id=number,
                lease=Lease(index, 1, index, slot, WAIT_S),
                blocks=self._blocks,
                blocks_start=0,
                first_token=chunk.first_token,
                tokens=chunk.tokens,
                seed=index,
            )
        )

    def _copy_out(self, report: Sent, slot: int) -> None:
        first, tokens = self._grid[report.chunk]
        job = CopyOut(
            peer=self._mine,
            handoff_id=report.handoff_id,
            lease_id=report.chunk,
            chunk=report.chunk,
            slot=slot,
            blocks=self._blocks,
            blocks_start=0,
            first_token=first,
            tokens=tokens,
            seed=report.chunk,
            size_bytes=report.size_bytes,
            digests=report.digests,
        )
        assert self._other.stdin is not None
        self._other.stdin.write(msgspec.json.encode(job).decode() + "\n")
        self._other.stdin.flush()

    def close(self) -> None:
        _end(self._other)
        self._mover.close()


def _land(kv: KvSpec, blocks: int, device: str) -> None:
    """The decode side: says its hello, is told the other's, then a line for each chunk that has landed."""
    shape = (2, blocks, kv.block_size, kv.kv_heads, kv.head_dim)
    dtype = getattr(torch, kv.dtype)
    layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(kv.layers)]
    reports: queue.Queue[Any] = queue.Queue()
    mover, hello = open_side("decode", kv, layers, reports.put)
    print(msgspec.json.encode(hello).decode(), flush=True)
    mover.submit(Connect(msgspec.json.decode(sys.stdin.readline(), type=Hello)))
    print(reports.get(timeout=WAIT_S), flush=True)
    mover.expecting(True)

    def tell() -> None:
        while True:
            print(msgspec.json.encode(reports.get()).decode(), flush=True)

    threading.Thread(target=tell, daemon=True).start()
    for line in sys.stdin:
        mover.submit(msgspec.json.decode(line, type=CopyOut))
    os._exit(0)


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "receive":
        _receive(int(arguments[0]), arguments[1])
    else:
        _land(msgspec.json.decode(arguments[0], type=KvSpec), int(arguments[1]), arguments[2])


if __name__ == "__main__":
    main()
