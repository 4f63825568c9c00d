"""Digests: of the copy, seeded with what the bytes claim to be; and hashing does not hold the interpreter lock."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import digest as digests


def random_bytes(size: int, seed: int = 0) -> digests.Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def test_is_xxh3_128_so_that_another_implementation_can_check_it() -> None:
    assert digests.digest(random_bytes(1000), 7) == xxhash.xxh3_128_digest(random_bytes(1000).tobytes(), 7)
    assert len(digests.digest(random_bytes(0), 7)) == digests.DIGEST_BYTES


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.data())
def test_one_bit_or_another_seed_changes_it(size: int, seed: int, data: st.DataObject) -> None:
    buffer = random_bytes(size)
    before = digests.digest(buffer, seed)
    assert digests.digest(buffer, seed ^ (1 << data.draw(st.integers(0, 63)))) != before
    buffer[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digests.digest(buffer, seed) != before


@pytest.mark.parametrize("size", [0, 1, 262144, 262145, 1_000_003])
def test_copy_and_digest_copies_all_and_digests_the_copy(size: int) -> None:
    source, target = random_bytes(size, 1), np.zeros(size, dtype=np.uint8)
    assert digests.copy_and_digest(source, target, 5) == digests.digest(source, 5)
    assert np.array_equal(source, target)


def test_the_digest_is_of_the_copy_even_while_the_source_changes() -> None:
    source, target = random_bytes(1 << 20), np.zeros(1 << 20, dtype=np.uint8)
    stop = threading.Event()

    def late_writer() -> None:
        value = 0
        while not stop.is_set():
            value = (value + 1) % 256
            source[:] = value

    writer = threading.Thread(target=late_writer)
    writer.start()
    try:
        for seed in range(50):
            assert digests.copy_and_digest(source, target, seed) == digests.digest(target, seed)
    finally:
        stop.set()
        writer.join()


def test_copy_and_digest_refuses_other_lengths() -> None:
    with pytest.raises(ValueError):
        digests.copy_and_digest(random_bytes(4), random_bytes(5), 0)


def test_every_part_of_what_a_piece_claims_changes_its_seed() -> None:
    base = digests.chunk_seed(b"prefix", 128, 64)
    others = {
        digests.chunk_seed(b"prefiy", 128, 64),
        digests.chunk_seed(b"prefix", 64, 64),
        digests.chunk_seed(b"prefix", 128, 63),
    }
    assert len(others | {base}) == 4
    piece = digests.piece_seed(base, 128, 64, range(4), range(2))
    others = {
        digests.piece_seed(base ^ 1, 128, 64, range(4), range(2)),
        digests.piece_seed(base, 144, 64, range(4), range(2)),
        digests.piece_seed(base, 128, 63, range(4), range(2)),
        digests.piece_seed(base, 128, 64, range(1, 4), range(2)),
        digests.piece_seed(base, 128, 64, range(5), range(2)),
        digests.piece_seed(base, 128, 64, range(4), range(1, 2)),
        digests.piece_seed(base, 128, 64, range(4), range(3)),
    }
    assert len(others | {base, piece}) == 9
    assert 0 <= base < 2**64 and 0 <= piece < 2**64
    with pytest.raises(ValueError):
        digests.piece_seed(base, 0, 1, range(0, 4, 2), range(2))


def test_hashing_a_large_buffer_releases_the_interpreter_lock() -> None:
    """Another thread gets on while one call hashes: the switch interval alone would let it wait for the call's end."""
    buffer = np.zeros(256 << 20, dtype=np.uint8)
    progress = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal progress
        while not stop.is_set():
            progress += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        best = 0
        for _ in range(5):
            before = progress
            digests.digest(buffer, 1)
            best = max(best, progress - before)
    finally:
        stop.set()
        counter.join()
    assert best > 1000


def test_the_pure_modules_do_not_import_torch() -> None:
    code = (
        "import sys, kvtransfer.chunks, kvtransfer.digest, kvtransfer.rows, kvtransfer.plan, kvtransfer.direct, "
        "kvtransfer.join; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
