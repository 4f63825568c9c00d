"""The transfer plan: executing it gives the KV bit for bit, whatever the pair; every byte is written once; replicas
share the load."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtransfer import direct
from kvtransfer.chunks import chunks
from kvtransfer.direct import PoolPlace
from kvtransfer.messages import KvSpec
from kvtransfer.plan import Plan, PlanError, kv_heads, plan, slot_bytes, wire_bytes
from kvtransfer.rows import merged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Bytes = npt.NDArray[np.uint8]


def spec(**changes: Any) -> KvSpec:
    base = KvSpec(
        model="m",
        layers=2,
        q_heads=8,
        kv_heads=4,
        head_dim=3,
        dtype="float32",
        block_size=16,
        chunk_tokens=64,
    )
    return msgspec.structs.replace(base, **changes)


@dataclass
class Case:
    """A pair, its KV [kv_heads, layers, 2, tokens, dim] as the prefill side stores it, and both sides' pools as bytes:
    each rank's is [layers, 2, blocks, block_size, heads, head bytes]."""

    plan: Plan
    kv: torch.Tensor
    start: int
    rng: random.Random

    def __post_init__(self) -> None:
        self.tokens = self.kv.shape[3]
        self.prefill_start = self.start - self.start % self.plan.prefill.block_size
        self.sources = self._pools(self.plan.prefill)
        self.targets = self._pools(self.plan.decode)
        self.source_blocks = self._blocks(self.plan.prefill, self.prefill_start)
        self.target_blocks = self._blocks(self.plan.decode, 0)
        bits = self.kv.view(torch.uint8).numpy()
        for rank, pool in enumerate(self.sources):
            heads = kv_heads(self.plan.prefill, rank)
            for token in range(self.tokens):
                block, offset = divmod(self.start + token - self.prefill_start, self.plan.prefill.block_size)
                part = bits[heads.start : heads.stop, :, :, token]
                pool[:, :, self.source_blocks[block], offset] = part.transpose(1, 2, 0, 3)

    def _pools(self, side: KvSpec) -> list[Bytes]:
        blocks = 4 + -(-(self.start + self.tokens) // side.block_size)
        width = side.head_dim * DTYPES[side.dtype].itemsize
        return [
            np.random.default_rng(rank).integers(
                0,
                256,
                (side.layers, 2, blocks, side.block_size, len(kv_heads(side, rank)), width),
                np.uint8,
            )
            for rank in range(side.tensor_parallel)
        ]

    def _blocks(self, side: KvSpec, first: int) -> list[int]:
        needed = -(-(self.start + self.tokens - first) // side.block_size)
        return self.rng.sample(range(needed + 4), needed)

    def wire_piece(self, rank: int, heads: range, first: int, tokens: int) -> Bytes:
        """As the sender gathers it: from its pool, position by position, in the wire's dtype."""
        side = self.plan.prefill
        picked = []
        for position in range(first, first + tokens):
            block, offset = divmod(position - self.prefill_start, side.block_size)
            part = self.sources[rank][:, :, self.source_blocks[block], offset, heads.start : heads.stop]
            picked.append(part)
        bits = torch.from_numpy(np.stack(picked)).contiguous().view(DTYPES[side.dtype])
        return flat(bits.permute(3, 1, 2, 0, 4).to(DTYPES[self.plan.wire_dtype]))

    def scatter(self, rank: int, piece: Any, first: int, data: Bytes, written: npt.NDArray[np.int64]) -> None:
        side = self.plan.decode
        shape = (piece.heads, side.layers, 2, piece.tokens, side.head_dim)
        values = torch.from_numpy(data.copy()).view(DTYPES[self.plan.wire_dtype]).view(shape)
        bits = values.to(DTYPES[side.dtype]).contiguous().view(torch.uint8).numpy()
        heads = slice(piece.head, piece.head + piece.heads)
        for token in range(piece.tokens):
            block, offset = divmod(first + token, side.block_size)
            at = self.target_blocks[block]
            self.targets[rank][:, :, at, offset, heads] = bits[:, :, :, token].transpose(1, 2, 0, 3)
            written[at, offset, heads] += 1

    def place(self, rank: int, base: int) -> PoolPlace:
        pool = self.sources[rank]
        assert pool.flags.c_contiguous
        layer, kv, block, token, head, _ = pool.strides
        return PoolPlace(
            layers=tuple(base + index * layer for index in range(pool.shape[0])),
            num_blocks=pool.shape[2],
            block_size=pool.shape[3],
            kv_stride=kv,
            block_stride=block,
            token_stride=token,
            head_stride=head,
            head_bytes=pool.shape[5],
        )

    def execute(self, straight_from_the_pool: bool) -> list[npt.NDArray[np.int64]]:
        """Sends and receives every chunk through staging and landing memory by descriptor rows alone. Returns how
        often each (block, offset, head) of each target was written."""
        made = self.plan
        ranks = range(made.decode.tensor_parallel)
        written = [np.zeros((pool.shape[2], pool.shape[3], pool.shape[4]), np.int64) for pool in self.targets]
        for index, chunk in enumerate(chunks(self.start, self.start + self.tokens, made.chunk_tokens)):
            slots = [np.zeros(slot_bytes(made.decode, rank), np.uint8) for rank in ranks]
            touched = [np.zeros(slot.size, np.int64) for slot in slots]
            for source in range(made.prefill.tensor_parallel):
                outgoing = made.outgoing(source, index, chunk.tokens)
                assert outgoing.staging_bytes <= slot_bytes(made.prefill, source)
                if straight_from_the_pool:
                    staging = self.sources[source].reshape(-1)
                else:
                    staging = np.zeros(outgoing.staging_bytes, np.uint8)
                    for part in outgoing.parts:
                        data = self.wire_piece(
                            source, part.local_heads, chunk.first_token + part.first, part.tokens
                        )
                        staging[part.offset : part.offset + part.size_bytes] = data
                for write in outgoing.writes:
                    assert write.target in made.targets(source) and source in made.sources(write.target)
                    rows = write.rows
                    if straight_from_the_pool:
                        rows = self._direct(source, chunk.first_token, outgoing.parts, write)
                    for at, landing, size in rows.tolist():
                        slots[write.target][landing : landing + size] = staging[at : at + size]
                        touched[write.target][landing : landing + size] += 1
            for target in ranks:
                incoming = made.incoming(target, index, chunk.tokens)
                used = sum(piece.size_bytes for piece in incoming)
                assert (touched[target][:used] == 1).all() and not touched[target][used:].any()
                for piece in incoming:
                    data = slots[target][piece.offset : piece.offset + piece.size_bytes]
                    self.scatter(target, piece, chunk.first_token + piece.first, data, written[target])
        return written

    def _direct(self, source: int, first_token: int, parts: Any, write: Any) -> Any:
        place = self.place(source, 0)
        found = []
        for part, offset in zip(write.parts, write.offsets, strict=True):
            piece = parts[part]
            runs = direct.runs(
                place, self.source_blocks, self.prefill_start, first_token + piece.first, piece.tokens
            )
            found.append(direct.rows(place, runs, piece.local_heads, offset))
        return merged(np.concatenate(found))

    def check(self, written: list[npt.NDArray[np.int64]]) -> None:
        wanted = self.kv.to(DTYPES[self.plan.wire_dtype]).to(DTYPES[self.plan.decode.dtype])
        bits = wanted.contiguous().view(torch.uint8).numpy()
        for rank, pool in enumerate(self.targets):
            heads = kv_heads(self.plan.decode, rank)
            for token in range(self.tokens):
                block, offset = divmod(self.start + token, self.plan.decode.block_size)
                at = self.target_blocks[block]
                part = bits[heads.start : heads.stop, :, :, token].transpose(1, 2, 0, 3)
                assert np.array_equal(pool[:, :, at, offset], part)
                assert (written[rank][at, offset] == 1).all()
            assert written[rank].sum() == self.tokens * len(heads)


def flat(tensor: torch.Tensor) -> Bytes:
    bits: Bytes = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return bits


def random_kv(side: KvSpec, tokens: int, seed: int) -> torch.Tensor:
    """Finite values of any size: conversions between dtypes are defined for them."""
    shape = (side.kv_heads, side.layers, 2, tokens, side.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[side.dtype])


block_sizes = st.sampled_from([8, 16, 32, 64])
dtypes = st.sampled_from(list(DTYPES))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 16), st.integers(1, 4), block_sizes, block_sizes,
    dtypes, dtypes, st.integers(0, 3), st.integers(1, 200), st.integers(64, 100), st.integers(0, 2**32),
)  # fmt: skip
def test_executing_the_copies_gives_the_kv_bit_for_bit_and_writes_each_byte_once(
    tp_prefill: int, tp_decode: int, heads: int, group: int, prefill_block: int, decode_block: int,
    prefill_dtype: str, decode_dtype: str, cached_blocks: int, tokens: int, chunk_tokens: int, seed: int,
) -> None:  # fmt: skip
    group = max(group, -(-max(tp_prefill, tp_decode) // heads))
    shape = {"q_heads": heads * group, "kv_heads": heads, "head_dim": 2, "layers": 2}
    prefill = spec(
        **shape,
        tensor_parallel=tp_prefill,
        block_size=prefill_block,
        dtype=prefill_dtype,
        chunk_tokens=chunk_tokens,
    )
    decode = spec(**shape, tensor_parallel=tp_decode, block_size=decode_block, dtype=decode_dtype)
    case = Case(
        plan(prefill, decode),
        random_kv(prefill, tokens, seed),
        cached_blocks * decode_block,
        random.Random(seed),
    )
    case.check(case.execute(straight_from_the_pool=False))
    if case.plan.wire_dtype == prefill_dtype:
        case.targets = case._pools(decode)
        case.check(case.execute(straight_from_the_pool=True))


@pytest.mark.parametrize("heads", range(1, 17))
def test_every_pair_covers_each_head_and_token_of_each_target_once_and_shares_the_load(heads: int) -> None:
    for group in (1, 3, 8):
        for tp_prefill in range(1, min(8, heads * group) + 1):
            for tp_decode in range(1, min(8, heads * group) + 1):
                shape = {"q_heads": heads * group, "kv_heads": heads, "head_dim": 1, "layers": 1}
                made = plan(
                    spec(**shape, tensor_parallel=tp_prefill, block_size=4, chunk_tokens=20),
                    spec(**shape, tensor_parallel=tp_decode, block_size=4, chunk_tokens=20),
                )
                check_coverage(made, tokens=20 * 2 + 4 * 2 + 1)


def check_coverage(made: Plan, tokens: int) -> None:
    size = made.decode.block_size
    heads, tp = made.decode.kv_heads, made.decode.tensor_parallel
    covered = np.zeros((tp, heads, tokens), np.int64)
    load = np.zeros((made.prefill.tensor_parallel, heads), np.int64)  # blocks, a partial one counts as one
    for index, (first, count) in enumerate(chunks(0, tokens, made.chunk_tokens)):
        pieces = made.pieces(index, count)
        assert (np.diff(pieces.target) >= 0).all()
        assert (pieces.size_bytes == pieces.heads * pieces.tokens * 8).all()
        for rank in range(made.prefill.tensor_parallel):
            outgoing = made.outgoing(rank, index, count)
            assert outgoing.staging_bytes <= slot_bytes(made.prefill, rank)
            assert outgoing.size_bytes == pieces.size_bytes[pieces.source == rank].sum()
            sent = sorted(piece for write in outgoing.writes for piece in write.pieces)
            assert sent == np.flatnonzero(pieces.source == rank).tolist()
        for target in range(tp):
            mine = pieces.target == target
            received = [piece.index for piece in made.incoming(target, index, count)]
            assert received == np.flatnonzero(mine).tolist()
            sizes = pieces.size_bytes[mine]
            assert np.array_equal(pieces.offset[mine], np.cumsum(sizes) - sizes)
        for source, target, head, many, at, length in zip(
            pieces.source, pieces.target, pieces.head, pieces.heads, pieces.first, pieces.tokens, strict=True
        ):
            assert at % size == 0
            covered[target, head : head + many, first + at : first + at + length] += 1
            load[source, head : head + many] += -(-length // size)
    for rank in range(tp):
        wanted = np.zeros(heads, np.int64)
        wanted[list(kv_heads(made.decode, rank))] = 1
        assert np.array_equal(covered[rank], np.repeat(wanted[:, None], tokens, axis=1))
    for head in range(heads):
        holders = [r for r in range(len(load)) if head in kv_heads(made.prefill, r)]
        assert np.ptp(load[holders, head]) <= 1
        assert load[:, head].sum() == load[holders, head].sum()


def test_what_several_targets_need_is_gathered_once() -> None:
    shape = {"q_heads": 8, "kv_heads": 2}
    made = plan(spec(**shape), spec(**shape, tensor_parallel=4))
    outgoing = made.outgoing(0, 0, 64)
    assert [part.model_heads for part in outgoing.parts] == [range(1), range(1, 2)]
    assert [write.parts for write in outgoing.writes] == [(0,), (0,), (1,), (1,)]
    assert outgoing.size_bytes == 2 * outgoing.staging_bytes


def test_pieces_are_few_and_neighbours_are_one_row() -> None:
    assert len(plan(spec(), spec()).pieces(0, 64)) == 1
    shape = {"q_heads": 32, "kv_heads": 8}
    four_to_two = plan(spec(**shape, tensor_parallel=4), spec(**shape, tensor_parallel=2))
    assert len(four_to_two.pieces(0, 64)) == 4
    # 3 ranks of 8 heads: two heads are stored twice, so the middle rank has three deals, but one row each way.
    uneven = plan(
        spec(q_heads=8, kv_heads=2, tensor_parallel=3), spec(q_heads=8, kv_heads=2, tensor_parallel=1)
    )
    assert [len(write.rows) for write in uneven.outgoing(0, 0, 64).writes] == [1]
    both = plan(spec(q_heads=6, kv_heads=3, tensor_parallel=2), spec(q_heads=6, kv_heads=3))
    first = both.outgoing(0, 0, 64)  # head 0 whole, head 1 half: neighbours in both memories
    assert len(first.parts) == 2 and [len(write.rows) for write in first.writes] == [1]


def test_replicas_take_turns_from_chunk_to_chunk() -> None:
    made = plan(spec(q_heads=2, kv_heads=1, tensor_parallel=2), spec(q_heads=2, kv_heads=1, chunk_tokens=16))
    assert made.chunk_tokens == 16
    assert [made.pieces(chunk, 16).source.tolist() for chunk in range(4)] == [[0], [1], [0], [1]]
    assert len(made.outgoing(0, 0, 16).writes) == 1
    assert made.outgoing(0, 1, 16).writes == () and made.outgoing(0, 1, 16).parts == ()


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), block_sizes, block_sizes, st.integers(64, 130),
       st.sampled_from(["int8", "fp8_e4m3"]), st.integers(1, 128))  # fmt: skip
@example(3, 4, 1, 64, 8, 64, "int8", 64)  # parts of 24, 24 and 16 tokens: 5 groups of 16, not 4
def test_quantised_pieces_fit_slots_and_buffers(
    tp_prefill: int, tp_decode: int, heads: int, one: int, other: int, chunk: int, wire: str, tokens: int
) -> None:
    shape = {"q_heads": heads * 8, "kv_heads": heads, "wire_dtype": wire}
    prefill = spec(**shape, tensor_parallel=tp_prefill, block_size=one, chunk_tokens=chunk)
    decode = spec(**shape, tensor_parallel=tp_decode, block_size=other, chunk_tokens=chunk, dtype="bfloat16")
    made = plan(prefill, decode)
    for index in range(3):
        for rank in range(tp_prefill):
            outgoing = made.outgoing(rank, index, min(tokens, made.chunk_tokens))
            assert outgoing.staging_bytes <= slot_bytes(prefill, rank)
            for write in outgoing.writes:
                assert write.end <= slot_bytes(decode, write.target)
    assert wire_bytes(wire, 2, 3, 1, 17) == 2 * 2 * (17 * 3 + 2 * 4)


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        ({}, {}, 64),
        ({"chunk_tokens": 512}, {"chunk_tokens": 500}, 496),
        ({"block_size": 8, "chunk_tokens": 100}, {"block_size": 32}, 64),
        ({"block_size": 24}, {"block_size": 16}, 48),  # whole blocks of both
        ({"block_size": 48}, {"block_size": 20}, 60),  # 240 does not fit: of the decode side
        ({"block_size": 128, "chunk_tokens": 128}, {"block_size": 16, "chunk_tokens": 100}, 96),
    ],
)
def test_chunk_length_of_a_pair(prefill: dict[str, int], decode: dict[str, int], expected: int) -> None:
    assert plan(spec(**prefill), spec(**decode)).chunk_tokens == expected


@pytest.mark.parametrize(
    ("prefill", "decode", "words"),
    [
        ({"layers": 3}, {}, ("layers", "3", "2")),
        ({"kv_heads": 2}, {}, ("kv_heads", "2", "4")),
        ({"q_heads": 4}, {}, ("q_heads", "4", "8")),
        ({"head_dim": 4}, {}, ("head_dim", "4", "3")),
        ({"wire_dtype": "int8"}, {}, ("wire_dtype", "'int8'", "''")),
        ({"wire_dtype": "int4"}, {"wire_dtype": "int4"}, ("wire_dtype", "int4", "fp8_e4m3")),
        ({"dtype": "float64"}, {}, ("float64", "bfloat16", "prefill")),
        ({}, {"dtype": "int8"}, ("int8", "decode")),
        ({"tensor_parallel": 9}, {}, ("9", "8")),
        ({}, {"tensor_parallel": 9}, ("9", "8", "decode")),
        ({}, {"tensor_parallel": 0}, ("decode", "positive")),
        ({"q_heads": 6, "kv_heads": 4}, {"q_heads": 6, "kv_heads": 4}, ("6", "4")),
        ({"chunk_tokens": 48}, {"block_size": 64}, ("48", "64", "block_size")),
    ],
)
def test_a_pair_that_cannot_be_served_is_named(
    prefill: dict[str, Any], decode: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(PlanError) as error:
        plan(spec(**prefill), spec(**decode))
    for word in words:
        assert word in str(error.value)


def test_the_narrower_dtype_crosses() -> None:
    def crosses(prefill: str, decode: str, wire: str = "") -> str:
        return plan(spec(dtype=prefill, wire_dtype=wire), spec(dtype=decode, wire_dtype=wire)).wire_dtype

    assert crosses("float32", "float32") == "float32"
    assert crosses("bfloat16", "float32") == crosses("float32", "bfloat16") == "bfloat16"
    assert crosses("float16", "bfloat16") == "float16" and crosses("bfloat16", "float16") == "bfloat16"
    assert crosses("float32", "bfloat16", "int8") == "int8"


def test_it_is_made_once_for_a_pair_and_once_for_each_kind_of_chunk() -> None:
    made = plan(spec(), spec())
    assert plan(spec(), spec()) is made
    assert made.pieces(0, 64) is made.pieces(7, 64) and made.outgoing(0, 0, 5) is made.outgoing(0, 1, 5)
    wide = plan(spec(q_heads=16, tensor_parallel=16), spec(q_heads=16))
    for tokens in range(1, 65):
        for rank in range(16):
            wide.outgoing(rank, 0, tokens)
    assert len(wide._outgoing) == 512
    for bad in ((-1, 64), (0, 0), (0, 65)):
        with pytest.raises(ValueError):
            made.pieces(*bad)


def test_neighbouring_rows_merge_only_where_both_memories_go_on() -> None:
    rows = np.array([[0, 10, 5], [5, 15, 3], [8, 19, 2], [10, 21, 4], [30, 25, 1]], np.uint64)
    assert merged(rows).tolist() == [[0, 10, 8], [8, 19, 6], [30, 25, 1]]
    assert merged(rows[:1]).tolist() == [[0, 10, 5]]
