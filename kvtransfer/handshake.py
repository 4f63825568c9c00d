"""Can these two workers hand KV to each other, and by which plan? Asked once per control stream, before anything
moves.

Both roles call `agree` with the other's hello. Releases, tensor parallelism, block sizes and dtypes may differ; what
the plan cannot serve is an error that names both values. What a release can do is told by name, so that one that
learns something new still talks to one that has not.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from kvtransfer.messages import DTYPE_BYTES, PROTOCOL, Hello, KvSpec
from kvtransfer.plan import Plan, PlanError, plan

# How pieces are told from damaged ones, how they lie in a slot, and in which forms KV can cross.
DIGEST = "digest:xxh3-128"
LAYOUT = "layout:head-major"
WIRE_FORMS = {"": "wire:stored", "int8": "wire:int8", "fp8_e4m3": "wire:fp8_e4m3"}

# Behind its slots a decode worker has 4 MiB into which its peers may write to measure (`kvtransfer.preflight`).
PREFLIGHT = "preflight:4mib"

CAPABILITIES = (DIGEST, LAYOUT, *WIRE_FORMS.values(), PREFLIGHT)  # of this release; said in every hello

Side = Literal["prefill", "decode"]


class Mismatch(ValueError):
    """These two cannot hand off; says what differs, with both values."""


def agree(mine: Hello, theirs: Hello, side: Side) -> Plan:
    """The plan of the pair, of which this worker is `side`. Raises Mismatch."""
    wrong = _differences(mine, theirs) + _needs(mine, theirs) + _claims(theirs, sends=side == "decode")
    if wrong:
        raise Mismatch("; ".join(wrong))
    prefill, decode = (mine, theirs) if side == "prefill" else (theirs, mine)
    try:
        made = plan(prefill.kv, decode.kv)
    except PlanError as error:
        raise Mismatch(f"{theirs.worker_id}: {error}") from error
    small = _small_slots(made, decode)
    if small:
        raise Mismatch("; ".join(small))
    return made


def _differences(mine: Hello, theirs: Hello) -> list[str]:
    """What must be equal and is not."""
    pairs = [
        ("protocol", mine.protocol, theirs.protocol),
        ("transport", mine.transport, theirs.transport),
        ("kv.model", mine.kv.model, theirs.kv.model),
        ("kv.layers", mine.kv.layers, theirs.kv.layers),
        ("kv.q_heads", mine.kv.q_heads, theirs.kv.q_heads),
        ("kv.kv_heads", mine.kv.kv_heads, theirs.kv.kv_heads),
        ("kv.head_dim", mine.kv.head_dim, theirs.kv.head_dim),
        ("kv.groups", _groups(mine.kv), _groups(theirs.kv)),
        ("kv.wire_dtype", mine.kv.wire_dtype, theirs.kv.wire_dtype),
    ]
    return [
        f"{name} is {ours!r} here and {other!r} at {theirs.worker_id}"
        for name, ours, other in pairs
        if ours != other
    ]


def _needs(mine: Hello, theirs: Hello) -> list[str]:
    """What the hand-offs of this pair take and one of the two cannot do."""
    form = mine.kv.wire_dtype
    needed = {DIGEST, LAYOUT, WIRE_FORMS.get(form, f"wire:{form}")}
    return [
        f"{hello.worker_id} (release {hello.release or 'unknown'}) lacks {', '.join(sorted(missing))}: "
        f"it can {', '.join(sorted(hello.capabilities)) or 'nothing of that kind'}, "
        f"{other.worker_id} can {', '.join(sorted(other.capabilities)) or 'nothing of that kind'}"
        for hello, other in ((mine, theirs), (theirs, mine))
        if (missing := needed - set(hello.capabilities))
    ]


def _claims(theirs: Hello, *, sends: bool) -> list[str]:
    """What a hello says of its own worker and cannot be. `sends`: it has no slots of its own."""
    kv, name = theirs.kv, theirs.worker_id
    wrong = []
    if kv.dtype not in DTYPE_BYTES:
        wrong.append(f"kv.dtype is {kv.dtype!r} at {name}, and one of {', '.join(DTYPE_BYTES)} here")
    if min(kv.block_size, kv.chunk_tokens, kv.tensor_parallel) < 1:
        wrong.append(
            f"{name} has blocks of {kv.block_size} tokens, chunks of {kv.chunk_tokens} and {kv.tensor_parallel} "
            "ranks: each must be at least 1"
        )
    if kv.tensor_parallel > kv.q_heads:
        wrong.append(f"{name} has {kv.tensor_parallel} ranks for {kv.q_heads} query heads")
    if len(theirs.endpoints) != kv.tensor_parallel:
        wrong.append(f"{name} has {len(theirs.endpoints)} endpoints for {kv.tensor_parallel} ranks")
    if not sends and len(theirs.slot_bytes) != kv.tensor_parallel:
        wrong.append(f"{name} has slots of {len(theirs.slot_bytes)} ranks for {kv.tensor_parallel} ranks")
    if not sends and not theirs.slot_count:
        wrong.append(f"{name} has no landing slots")
    return wrong


def _small_slots(made: Plan, decode: Hello) -> list[str]:
    """Ranks whose slots are smaller than what one chunk has for them."""
    pieces = made.pieces(0, made.chunk_tokens)
    needed = np.zeros(decode.kv.tensor_parallel, dtype=np.int64)
    np.maximum.at(needed, pieces.target, pieces.offset + pieces.size_bytes)
    return [
        f"rank {rank} of {decode.worker_id} has slots of {slot} bytes, "
        f"a chunk of {made.chunk_tokens} tokens needs {need}"
        for rank, (slot, need) in enumerate(zip(decode.slot_bytes, needed.tolist(), strict=True))
        if slot < need
    ]


def _groups(kv: KvSpec) -> list[str]:
    """In words, and in one order. A release that knew no groups said none: all its layers are full."""
    if not kv.groups:  # not listed: a peer may say any number
        return [f"full: layers {f'0-{kv.layers - 1}' if kv.layers > 1 else '0'}"]
    return sorted(
        f"{group.kind}{f' {group.window}' if group.window else ''}: layers {_ranges(group.layers)}"
        for group in kv.groups
    )


def _ranges(layers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2,5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" if first != last else str(first) for first, last in runs)


assert PROTOCOL == 1, "a new protocol version needs a rule here for what it still talks to"
