"""One run from one seed, and what came of it."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field

from kvtransfer.join import Join
from simulation.client import Client
from simulation.deployment import Deployment
from simulation.faults import Faults
from simulation.mover import SimulatedMover
from simulation.node import MakeRole, make_role
from simulation.settings import Settings, draw_settings
from simulation.transitions import Transition, taken
from simulation.world import World

ANSWERED_BY_S = 180.0  # virtual seconds; far more than any deadline adds up to
AT_REST_AFTER_S = 20.0


@dataclass(slots=True)
class Report:
    """What a run did; `violations` is empty in a good one."""

    seed: int
    violations: list[str]
    facts: Counter[str] = field(default_factory=Counter)
    transitions: Counter[Transition] = field(default_factory=Counter)
    events: int = 0
    seconds: float = 0.0


def run_seed(
    seed: int,
    settings: Settings | None = None,
    *,
    soak: bool = False,
    make: MakeRole = make_role,
    mover: type[SimulatedMover] = SimulatedMover,
    join: type[Join] = Join,
) -> Report:
    """Everything, chance included, follows from the arguments: the same seed gives the same run.

    `soak`: the larger clusters of `simulation.soak`.
    """
    world = World(seed)
    before = taken()
    settings = settings or draw_settings(world.random, soak=soak)
    try:
        deployment = Deployment(world, settings.nodes, make, mover, join)
        client = deployment.router = Client(world, deployment, settings)
        Faults(world, deployment, client, settings)
        _run(world, deployment, client, settings)
    except Exception:
        world.violate(traceback.format_exc())
    return Report(seed, world.violations, world.facts, taken() - before, world.events, world.now)


def _run(world: World, deployment: Deployment, client: Client, settings: Settings) -> None:
    world.run(lambda: client.done, ANSWERED_BY_S)
    if world.violations:
        world.violations[-1] += f"; open: {client.open_requests()}"
        return
    # Faults may still strike, and then the cluster must come to rest.
    calm_at = max(world.now, settings.fault_s)
    world.at(calm_at, lambda: None)
    world.run(lambda: world.now >= calm_at and all(node.alive for node in deployment.nodes), ANSWERED_BY_S)
    world.run(lambda: not deployment.watch.at_rest(deployment.nodes), world.now + AT_REST_AFTER_S)
    if world.violations:
        world.violations += deployment.watch.at_rest(deployment.nodes)
    for node in deployment.nodes:
        world.facts.update(
            {f"count_{name}": count for name, count in node.role.load().counters.items() if count}
        )
