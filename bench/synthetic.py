"""Made-up traces: arrivals, lengths and shared prefixes drawn from distributions, the same for the same seed. Pure.

Used by `baton bench --trace synthetic` and by whoever needs a workload of a known shape. It draws from
`random.Random` and not from numpy's generators, whose streams may change between releases.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.traces import Trace, TraceRequest

BLOCK_TOKENS = 16
Draw = Callable[[random.Random], float]

ARRIVALS = "poisson, uniform, gamma:CV"
LENGTHS = "N, uniform:LOW:HIGH, exponential:MEAN, lognormal:MEAN:CV"


class SpecError(ValueError):
    """A distribution that cannot be drawn from; the message names it and what there is."""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """The shape of a workload. Arrivals and lengths are written as in `ARRIVALS` and `LENGTHS`.

    `prefix_groups` prefixes of `prefix_tokens` exist, rounded to whole blocks; a share `prefix_share` of the requests
    begins with one of them, each as likely. Such a prompt is at least one token longer than its prefix.
    """

    rate: float  # mean requests a second
    arrivals: str = "poisson"
    input_tokens: str = "lognormal:512:1"
    output_tokens: str = "lognormal:128:1"
    prefix_groups: int = 0
    prefix_tokens: int = 0
    prefix_share: float = 1.0
    max_tokens: int = 1 << 20  # of input and of output: what a long tail is cut to
    block_tokens: int = BLOCK_TOKENS


def generate(shape: Synthetic, *, seed: int, duration_s: float) -> Trace:
    """What arrives in `duration_s` seconds. Raises SpecError for a shape that makes no sense."""
    _check(shape, duration_s)
    gap, inputs, outputs = _gaps(shape), lengths(shape.input_tokens), lengths(shape.output_tokens)
    # A stream of chance for each thing: a longer answer must not move the arrivals.
    at_random, in_random, out_random, group_random = (
        random.Random(f"{seed}/{thing}") for thing in ("arrivals", "inputs", "outputs", "groups")
    )
    whole = round(shape.prefix_tokens / shape.block_tokens)
    requests: list[TraceRequest] = []
    now = gap(at_random)
    while now < duration_s:
        input_tokens = _tokens(inputs(in_random), shape.max_tokens)
        blocks: tuple[int, ...] = ()
        if shape.prefix_groups and group_random.random() < shape.prefix_share:
            group = group_random.randrange(shape.prefix_groups)
            blocks = tuple(range(group * whole, (group + 1) * whole))
            input_tokens = max(input_tokens, whole * shape.block_tokens + 1)
        output_tokens = _tokens(outputs(out_random), shape.max_tokens)
        requests.append(TraceRequest(len(requests), now, input_tokens, output_tokens, blocks))
        now += gap(at_random)
    return Trace("synthetic", tuple(requests), duration_s, shape.block_tokens)


def lengths(text: str) -> Draw:
    """A distribution of lengths from its text, see `LENGTHS`."""
    name, *parameters = text.split(":")
    try:
        numbers = [float(parameter) for parameter in parameters]
        match name, numbers:
            case "uniform", [low, high] if 1 <= low <= high:
                return lambda chance: chance.uniform(low, high)
            case "exponential", [mean] if mean >= 1:
                return lambda chance: chance.expovariate(1 / mean)
            case "lognormal", [mean, cv] if mean >= 1 and cv > 0:
                sigma = math.sqrt(math.log1p(cv * cv))
                mu = math.log(mean) - sigma * sigma / 2
                return lambda chance: chance.lognormvariate(mu, sigma)
            case _, [] if float(name) >= 1 and math.isfinite(float(name)):
                constant = float(name)
                return lambda chance: constant
    except ValueError:
        pass
    raise SpecError(f"{text!r} is no distribution of lengths; there are {LENGTHS}, in tokens from 1")


def _gaps(shape: Synthetic) -> Draw:
    """Seconds between arrivals."""
    mean_s = 1 / shape.rate
    name, *parameters = shape.arrivals.split(":")
    try:
        match name, [float(parameter) for parameter in parameters]:
            case "poisson", []:
                return lambda chance: chance.expovariate(shape.rate)
            case "uniform", []:
                return lambda chance: mean_s
            case "gamma", [cv] if cv > 0:
                k = 1 / (cv * cv)
                return lambda chance: chance.gammavariate(k, mean_s / k)
    except ValueError:
        pass
    raise SpecError(f"{shape.arrivals!r} are no arrivals; there are {ARRIVALS}")


def _check(shape: Synthetic, duration_s: float) -> None:
    if not shape.rate > 0:
        raise SpecError(f"the rate must be above 0 requests/s, not {shape.rate}")
    if not duration_s > 0:
        raise SpecError(f"the duration must be above 0 s, not {duration_s}")
    if not 0 <= shape.prefix_share <= 1:
        raise SpecError(
            f"the share of requests with a shared prefix must be in [0, 1], not {shape.prefix_share}"
        )
    if bool(shape.prefix_groups) != bool(shape.prefix_tokens):
        raise SpecError(
            f"{shape.prefix_groups} groups with a prefix of {shape.prefix_tokens} tokens share nothing; give both"
        )
    if shape.prefix_tokens and shape.prefix_tokens < shape.block_tokens / 2:
        raise SpecError(
            f"a shared prefix of {shape.prefix_tokens} tokens is less than half a block of {shape.block_tokens}"
        )


def _tokens(drawn: float, most: int) -> int:
    return min(most, max(1, round(drawn)))
