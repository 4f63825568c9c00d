"""Reading fields of a model's JSON files, with errors that name the key and the value. No torch.

Used by `model_config` and `rope_config` only. Absent and null are the same, except where a caller asks itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class UnsupportedModel(ValueError):
    """The folder is not a model that this engine computes exactly; the message names the key and the value."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UnsupportedModel when it is none, FileNotFoundError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise UnsupportedModel(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{file}: expected an object, found {type(value).__name__}")
    return value


def refuse(raw: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    """Raises unless the key is absent or has one of the `allowed` values."""
    value = raw.get(key)
    if value is not None and value not in allowed:
        raise UnsupportedModel(f"{key}={value!r}: not supported")


def integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{key}={value!r}: expected a positive integer")
    return value


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise UnsupportedModel(f"{key}={value!r}: expected a positive number")
    return float(value)


def boolean(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise UnsupportedModel(f"{key}={value!r}: expected true or false")
    return value


def token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One id, a list of them, or none."""
    value = raw.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise UnsupportedModel(f"{key}={value!r}: expected token ids")
    return ids
