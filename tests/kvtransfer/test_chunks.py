"""The chunk grid and the seeds: both sides derive the same, and nothing else gives the same."""

from __future__ import annotations

import time

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import chunks
from kvtransfer.digest import chunk_seed


def seeds(tokens: list[int], salt: str = "", start: int = 0, chunk_tokens: int = 8) -> list[int]:
    return chunks.seeds(tokens, salt, start, chunk_tokens)


@pytest.mark.parametrize(
    ("token_bytes", "block_sizes", "wanted", "expected"),
    [
        (8192, [16], 512, 512),
        (8192, [16, 24], 500, 480),  # whole blocks of both
        (8192, [16], 10_000, 2048),  # the slot's limit
        (131072, [16, 32], 512, 128),
        (327680, [16], 512, 48),
        (327680, [16, 36], 512, 36),  # lcm 144 does not fit: whole blocks of the larger
        (4 << 20, [16], 512, 4),  # not even one block fits
        (8192, [64], 20, 20),
        (16 << 20, [16], 512, 1),
    ],
)
def test_chunk_length(token_bytes: int, block_sizes: list[int], wanted: int, expected: int) -> None:
    assert chunks.chunk_tokens_for(token_bytes, block_sizes, wanted) == expected


@pytest.mark.parametrize(
    "bad", [(0, [16], 8), (8, [], 8), (8, [0], 8), (8, [16], 0), ((16 << 20) + 1, [16], 8)]
)
def test_chunk_length_refuses(bad: tuple[int, list[int], int]) -> None:
    with pytest.raises(ValueError):
        chunks.chunk_tokens_for(*bad)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 70))
def test_the_grid_covers_every_position_once(start: int, more: int, chunk_tokens: int) -> None:
    grid = chunks.chunks(start, start + more, chunk_tokens)
    covered = [position for first, tokens in grid for position in range(first, first + tokens)]
    assert covered == list(range(start, start + more))
    assert all(tokens == chunk_tokens for _, tokens in grid[:-1])
    assert all(0 < tokens <= chunk_tokens for _, tokens in grid)


@pytest.mark.parametrize("bad", [(-1, 4, 2), (5, 4, 2), (0, 4, 0)])
def test_the_grid_refuses(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        chunks.chunks(*bad)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60), st.integers(1, 9), st.data())
def test_a_changed_token_changes_the_seeds_from_its_chunk_on(
    tokens: list[int], chunk_tokens: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(tokens) - 1))
    at = data.draw(st.integers(0, len(tokens) - 1))
    base = seeds(tokens, start=start, chunk_tokens=chunk_tokens)
    other = seeds([*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]], start=start, chunk_tokens=chunk_tokens)
    first_changed = max(0, at - start) // chunk_tokens
    assert len(base) == len(other) == len(chunks.chunks(start, len(tokens), chunk_tokens))
    assert base[:first_changed] == other[:first_changed]
    assert all(a != b for a, b in zip(base[first_changed:], other[first_changed:], strict=True))


@pytest.mark.parametrize("start", [0, 5])
def test_a_seed_is_the_hash_of_salt_and_whole_prefix_and_its_tokens(start: int) -> None:
    tokens, salt = list(range(1000, 1030)), b"tenant-1"
    expected = []
    for first, count in chunks.chunks(start, len(tokens), 8):
        ids = b"".join(token.to_bytes(4, "little") for token in tokens[: first + count])
        prefix = xxhash.xxh3_128_digest(len(salt).to_bytes(8, "little") + salt + ids)
        expected.append(chunk_seed(prefix, first, count))
    assert seeds(tokens, salt.decode(), start) == expected


def test_a_longer_prompt_keeps_the_seeds_of_its_whole_chunks() -> None:
    assert seeds(list(range(50)))[:3] == seeds(list(range(24)))


def test_salt_and_grid_change_all_seeds() -> None:
    tokens = list(range(64))
    variants = [
        seeds(tokens),
        seeds(tokens, salt="a"),
        seeds(tokens, start=4),
        seeds(tokens, chunk_tokens=16),
    ]
    flat = [seed for variant in variants for seed in variant]
    assert len(set(flat)) == len(flat)


def test_salt_and_tokens_do_not_run_into_each_other() -> None:
    token = int.from_bytes(b"abcd", "little")
    assert seeds([token], salt="") != seeds([], salt="abcd") and seeds([1], salt="abcd") != seeds(
        [token, 1], salt=""
    )


def test_a_token_id_that_does_not_fit_is_refused() -> None:
    for token in (-1, 2**32):
        with pytest.raises(OverflowError):
            seeds([token])


def test_one_pass_even_over_a_long_prompt_in_small_chunks() -> None:
    def cost(length: int) -> float:
        tokens = list(range(length))
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            seeds(tokens, chunk_tokens=4)
            best = min(best, time.perf_counter() - began)
        return best

    assert cost(80_000) < 40 * cost(8_000)  # a prefix hashed anew for each chunk would cost 100 times as much
