"""Can these two workers hand KV to each other? Compared once per control stream, before anything is moved."""

from __future__ import annotations

from kvtransfer.messages import PROTOCOL, Hello, KvGroup, KvSpec


def mismatch(mine: Hello, theirs: Hello) -> str:
    """Empty when the two can work together, else what differs, naming both values. Releases may differ."""
    pairs = [
        ("protocol", mine.protocol, theirs.protocol),
        ("transport", mine.transport, theirs.transport),
        ("kv.model", mine.kv.model, theirs.kv.model),
        ("kv.layers", mine.kv.layers, theirs.kv.layers),
        ("kv.kv_heads", mine.kv.kv_heads, theirs.kv.kv_heads),
        ("kv.head_dim", mine.kv.head_dim, theirs.kv.head_dim),
        ("kv.dtype", mine.kv.dtype, theirs.kv.dtype),
        ("kv.groups", _groups(mine.kv), _groups(theirs.kv)),
        ("kv.chunk_tokens", mine.kv.chunk_tokens, theirs.kv.chunk_tokens),
    ]
    wrong = [
        f"{name} is {ours!r} here and {other!r} at {theirs.worker_id}"
        for name, ours, other in pairs
        if ours != other
    ]
    return "; ".join(wrong)


def _groups(kv: KvSpec) -> list[str]:
    """In words, and in one order. A release that knew no groups said none: all its layers are full."""
    groups = kv.groups or (KvGroup("full", tuple(range(kv.layers))),)
    return sorted(
        f"{group.kind}{f' {group.window}' if group.window else ''}: layers {_ranges(group.layers)}"
        for group in groups
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
