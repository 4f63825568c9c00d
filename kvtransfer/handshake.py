"""Can these two workers hand KV to each other? Compared once per control stream, before anything is moved."""

from __future__ import annotations

from kvtransfer.messages import PROTOCOL, Hello


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
        ("kv.chunk_tokens", mine.kv.chunk_tokens, theirs.kv.chunk_tokens),
    ]
    wrong = [
        f"{name} is {ours!r} here and {other!r} at {theirs.worker_id}"
        for name, ours, other in pairs
        if ours != other
    ]
    return "; ".join(wrong)


assert PROTOCOL == 1, "a new protocol version needs a rule here for what it still talks to"
