"""What one simulated run is like: sizes, load and how much goes wrong. Drawn from a seed, or made by a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from engine.scheduler import Limits
from simulation.mover import Weather
from simulation.node import NodeSpec


@dataclass(slots=True)
class Settings:
    """`faults` are how often each kind of fault strikes during the run."""

    nodes: list[NodeSpec]
    requests: int = 30
    begin_s: float = 0.0
    load_s: float = 1.0  # the requests arrive within this time after `begin_s`
    prompt_tokens: int = 60  # at most
    answer_tokens: int = 20  # at most
    salts: int = 1
    remote: float = 0.8
    twins: float = 0.3
    cancels: float = 0.1
    forks: float = 0.2  # of the requests ask for several choices
    sessions: int = 2
    faults: dict[str, int] = field(default_factory=dict)
    fault_s: float = 2.0  # faults strike within this time
    weather: Weather = field(default_factory=Weather)
    lost_done: float = 0.0


LONG_S = 1000.0
# Query and kv heads: one rank's worth, kv heads that several ranks store, some that do not divide evenly.
HEADS = ((1, 1), (4, 4), (4, 2), (6, 3), (4, 1))
SOAK_FAULTS = 3
FAULTS = ("kill", "break", "part", "freeze", "session")


def draw_settings(random: Random, *, soak: bool = False) -> Settings:
    """Anything from a calm, roomy cluster to a cramped one in a storm.

    `soak`: at least two workers of each role, 50 requests and 3 faults.
    """
    heads = random.choice(HEADS)
    ranks = {role: random.choice((1, 1, 2, 3, 4)) for role in ("decode", "prefill")}
    # With the longest, nothing but a real event may be what goes on: a wait that only its deadline ends is found.
    timeout_s = random.choice((0.1, 0.5, 2.0, LONG_S, LONG_S))
    cramped = random.random() < 0.5
    sizes = (2, 2, 3) if soak else (1, 2, 2, 3)
    nodes = [
        _node(random, name, heads, min(ranks[name.partition("-")[0]], heads[0]), timeout_s, cramped)
        for name in [f"decode-{i}" for i in range(random.choice(sizes))]
        + [f"prefill-{i}" for i in range(random.choice(sizes))]
    ]
    requests = random.choice((50, 60, 80) if soak else (5, 20, 40))
    load_s = random.choice((0.05, 0.5, 2.0, 4.0) if soak else (0.05, 0.5, 2.0))
    settings = Settings(nodes, requests=requests, load_s=load_s)
    # Usually when the nodes know each other.
    settings.begin_s = random.choice((0.0, 0.2, 0.2, 0.2) if soak else (0.0, 0.15, 0.15))
    settings.prompt_tokens = random.choice((20, 60, 120))
    settings.answer_tokens = random.choice((1, 8, 40))
    settings.salts = random.choice((1, 1, 2))
    settings.remote = random.choice((0.5, 0.9, 1.0))
    settings.twins = random.choice((0.0, 0.3, 0.8))
    settings.cancels = random.choice((0.0, 0.1, 0.5))
    settings.sessions = random.choice((1, 3))
    settings.forks = random.choice((0.0, 0.2, 0.7))
    if soak or random.random() < 0.8:
        settings.faults = {kind: random.choice((0, 0, 1, 3)) for kind in FAULTS}
        while soak and sum(settings.faults.values()) < SOAK_FAULTS:
            settings.faults[random.choice(FAULTS)] += 1
        settings.fault_s = settings.begin_s + random.choice((0.3, 2.0))
        settings.weather = Weather(*(random.choice((0.0, 0.0, 0.05, 0.3)) for _ in range(3)))
        if timeout_s < LONG_S:  # a lost announcement may be noticed by nothing else
            settings.lost_done = random.choice((0.0, 0.0, 0.1))
    return settings


def _node(
    random: Random, name: str, heads: tuple[int, int], ranks: int, timeout_s: float, cramped: bool
) -> NodeSpec:
    decode = name.startswith("decode")
    # In a decode worker chunks begin on blocks; in a prefill worker they need not.
    block_size = random.choice((4, 8) if decode else (3, 4, 8))
    tokens = random.choice((40, 72, 120)) if cramped else random.choice((400, 1200))
    return NodeSpec(
        worker_id=name,
        decode=decode,
        blocks=tokens // block_size,
        block_size=block_size,
        chunk_tokens=random.choice((8, 16, 24)),
        slots=random.choice((0, 1, 2, 3, 4, 8)) if decode else 0,
        limits=Limits(random.choice((3, 8, 32, 128)), random.choice((1, 2, 4, 16))),
        max_waiting=random.choice((4, 100, 100)),
        handoff_timeout_s=timeout_s,
        step_s=random.choice(((0.001, 0.004), (0.005, 0.02), (0.0, 0.1))),
        token_s=random.choice((0.0, 0.0001, 0.001)),
        heads=heads,
        tensor_parallel=ranks,
    )
