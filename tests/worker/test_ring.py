"""The ring between shell and engine: order, any size, wrap-around, a slow reader, several writing threads."""

from __future__ import annotations

import os
import select
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import ring


def _pair() -> tuple[ring.RingWriter, ring.RingReader]:
    fds = ring.create()
    return ring.RingWriter(fds), ring.RingReader(fds, bytes)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3 * ring.CAPACITY // 2), max_size=12), st.integers(1, 5))
def test_messages_arrive_whole_and_in_order(sizes: list[int], every: int) -> None:
    writer, reader = _pair()
    sent, got = [], []
    for number, size in enumerate(sizes):
        sent.append(bytes([number]) * size)
        writer.send(sent[-1])
        if number % every == 0:
            got += reader.read()
    while not writer.flush():
        got += reader.read()
    got += reader.read()
    assert got == sent


def test_writing_never_blocks_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "PENDING_LIMIT", 2 * ring.CAPACITY)
    writer, reader = _pair()
    message = bytes(ring.CAPACITY // 2)
    with pytest.raises(ring.RingFull):
        for _ in range(8):
            writer.send(message)
    assert not writer.flush()
    assert reader.read()


def test_reader_is_woken() -> None:
    writer, reader = _pair()
    poll = select.poll()
    poll.register(reader.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    writer.send(b"x")
    assert poll.poll(0)
    assert reader.read() == [b"x"]
    assert poll.poll(0) == []
    assert reader.read() == []


def test_several_threads_write() -> None:
    writer, reader = _pair()

    def write(name: int) -> None:
        for number in range(300):
            writer.send(bytes([name, number % 256]))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got: dict[int, list[int]] = {}
    for name, number in reader.read():
        got.setdefault(name, []).append(number)
    assert got == {name: [number % 256 for number in range(300)] for name in range(4)}


def test_another_process_reads(tmp_path: object) -> None:
    """Across a fork-less child: the descriptors are all that it needs."""
    import subprocess
    import sys

    there, back = ring.create(), ring.create()
    program = (
        "import sys, select\n"
        "from worker import ring\n"
        "fds = [int(x) for x in sys.argv[1:]]\n"
        "reader = ring.RingReader(ring.RingFds(*fds[:2]), bytes); writer = ring.RingWriter(ring.RingFds(*fds[2:]))\n"
        "left = 50\n"
        "while left:\n"
        "    select.select([reader.fileno()], [], [], 10)\n"
        "    for message in reader.read():\n"
        "        writer.send(message[::-1]); left -= 1\n"
    )
    inherited = [there.memory, there.event, back.memory, back.event]
    child = subprocess.Popen([sys.executable, "-c", program, *map(str, inherited)], pass_fds=inherited)
    writer, reader = ring.RingWriter(there), ring.RingReader(back, bytes)
    sent = [os.urandom(1 + 5000 * n) for n in range(50)]
    got: list[bytes] = []
    for message in sent:
        writer.send(message)
    while len(got) < len(sent):
        ready, _, _ = select.select([reader.fileno()], [], [], 20)
        assert ready, "the child does not answer"
        got += reader.read()
        writer.flush()
    assert child.wait(10) == 0
    assert got == [message[::-1] for message in sent]
