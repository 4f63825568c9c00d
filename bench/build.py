"""From what people write on the command line to the values of a session. Every mistake is a ValueError with a remedy.

Called by `bench.command`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec

from bench.baton_door import GrpcDoor
from bench.door import Asking, Door
from bench.openai_door import PATHS, HttpDoor
from bench.session import Side
from bench.synthetic import Synthetic
from bench.traces import Trace, load
from bench.workload import Workload

SYNTHETIC = "synthetic"
PROMPTS = ("auto", "ids", "text")
_RATE = 1.0  # of a made-up trace when none is given


@dataclass(frozen=True, slots=True)
class MadeUp:
    """Options that only a made-up trace has. None and 0: not given."""

    input_tokens: str | None = None
    output_tokens: str | None = None
    arrivals: str | None = None
    prefix_groups: int = 0
    prefix_tokens: int = 0
    prefix_share: float = 1.0


def source(trace: str, made_up: MadeUp) -> Trace | Synthetic:
    """A file is read; `synthetic` is a shape. An option of the other kind would have no effect and is refused."""
    if trace != SYNTHETIC:
        if made_up != MadeUp():
            raise ValueError(
                f"lengths, arrivals and prefixes of {trace} are its own; --input-tokens, --output-tokens, --arrivals "
                "and --prefix-* are for --trace synthetic"
            )
        return load(Path(trace))
    default = Synthetic(_RATE)
    return Synthetic(
        _RATE,
        arrivals=made_up.arrivals or default.arrivals,
        input_tokens=made_up.input_tokens or default.input_tokens,
        output_tokens=made_up.output_tokens or default.output_tokens,
        prefix_groups=made_up.prefix_groups,
        prefix_tokens=made_up.prefix_tokens,
        prefix_share=made_up.prefix_share,
    )


def rate(workload: Workload, wanted: float | None, speedup: float | None) -> float:
    """Requests a second, from one of the two ways to say it; else the source's own."""
    if wanted is not None and speedup is not None:
        raise ValueError("--rate and --speedup say the same thing; give one")
    if speedup is not None and isinstance(workload.source, Synthetic):
        raise ValueError("a made-up trace has no times of its own; use --rate instead of --speedup")
    if any(value is not None and not 0 < value < float("inf") for value in (wanted, speedup)):
        raise ValueError(
            f"--rate and --speedup must be above 0, not {wanted if speedup is None else speedup}"
        )
    return wanted if wanted is not None else workload.rate * (speedup or 1.0)


def rates(text: str) -> list[float]:
    """`1,2,4`; empty: none."""
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0.0]
    if any(not 0 < each < float("inf") for each in found):
        raise ValueError(f"--rates {text!r}: write requests a second with commas, such as 1,2,4")
    return found


def scale(text: str) -> float:
    """`0.5` or `1/32`."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if value <= 0:
        raise ValueError(
            f"{text!r} is no scale of lengths; write a number above 0, or a fraction such as 1/32"
        )
    return value


def fields(text: str) -> dict[str, Any]:
    """A JSON object; empty: no fields."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any]) if text else {}
    except msgspec.DecodeError as error:
        raise ValueError(f"--body {text!r} is no JSON object: {error}") from None


def sides(urls: Sequence[str], api: str, asking: Asking, headers: Sequence[str], vary: str) -> list[Side]:
    """A side for each URL, or for each value of the header that varies."""
    if api not in PATHS:
        raise ValueError(f"--api {api!r}: there are {', '.join(PATHS)}")
    if asking.prompts not in PROMPTS:
        raise ValueError(f"--prompts {asking.prompts!r}: there are {', '.join(PROMPTS)}")
    common = dict(_header(each) for each in headers)
    if vary:
        if len(urls) > 1:
            raise ValueError("--vary-header makes sides of one --url; give only one")
        name, values = _header(vary)
        made = [(value, urls[0], {**common, name: value}) for value in _values(vary, values)]
    else:
        made = [(*_named(url, place), common) for place, url in enumerate(urls)]
    names = [name for name, _, _ in made]
    if len(set(names)) < len(names):
        raise ValueError(f"two sides have the same name: {', '.join(names)}; write --url NAME=URL")
    return [Side(name, _door(url, api, asking, more)) for name, url, more in made]


def told(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the report keeps them. Values of headers may be secrets."""
    kept = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    kept["header"] = [each.partition(":")[0] for each in options.get("header") or ()]
    return kept


def _door(url: str, api: str, asking: Asking, headers: dict[str, str]) -> Door:
    scheme, _, address = url.partition("://")
    if scheme != "grpc":
        return HttpDoor(url, api, asking, clock=time.perf_counter, headers=headers)
    if headers:
        raise ValueError("--header and --vary-header have no effect over gRPC")
    return GrpcDoor(address.rstrip("/"), asking, clock=time.perf_counter)


def _named(url: str, place: int) -> tuple[str, str]:
    """NAME=URL; a URL alone is called A, B, C after its place."""
    name, equals, rest = url.partition("=")
    return (name, rest) if equals and "://" not in name else (chr(ord("A") + place % 26), url)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"{text!r} is no header; write 'Name: value'")
    return name.strip(), value.strip()


def _values(vary: str, values: str) -> list[str]:
    found = [value.strip() for value in values.split("|")]
    if len(found) < 2 or not all(found):
        raise ValueError(f"--vary-header {vary!r}: write 'Name: a|b' with two values or more")
    return found
