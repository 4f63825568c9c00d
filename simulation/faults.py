"""What breaks, and when: drawn from the run's own dice, so that a seed replays it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from simulation.client import Client
from simulation.deployment import Deployment
from simulation.settings import Settings
from simulation.world import World

RESTART_S = (0.01, 1.0)
FREEZE_S = (0.05, 2.0)
PART_S = (0.05, 2.0)


class Faults:
    """Strikes `settings.faults[kind]` times with each kind, at random moments."""

    def __init__(self, world: World, deployment: Deployment, client: Client, settings: Settings) -> None:
        self.world = world
        self.deployment = deployment
        self.client = client
        strikes: dict[str, Callable[[], None]] = {
            "kill": self._kill,
            "break": self._break,
            "part": self._part,
            "freeze": self._freeze,
            "session": client.lose_session,
        }
        deployment.fabric.weather = settings.weather
        deployment.network.lost_done = settings.lost_done
        for kind, times in settings.faults.items():
            for _ in range(times):
                world.after(world.between(0.02, settings.fault_s), partial(self._strike, kind, strikes[kind]))

    def _strike(self, kind: str, strike: Callable[[], None]) -> None:
        self.world.facts[kind] += 1
        strike()

    def _kill(self) -> None:
        node = self.world.random.choice(self.deployment.nodes)
        self.deployment.kill(node, self.world.between(*RESTART_S))

    def _break(self) -> None:
        streams = self.deployment.network.streams()
        if streams:
            self.deployment.network.cut(self.world.random.choice(streams))

    def _part(self) -> None:
        decodes = self.deployment.alive(decode=True)
        prefills = self.deployment.alive(decode=False)
        if decodes and prefills:
            choice = self.world.random.choice
            self.deployment.network.part(choice(decodes), choice(prefills), self.world.between(*PART_S))

    def _freeze(self) -> None:
        """As SIGSTOP; the others may give its streams up, or may never notice."""
        node = self.world.random.choice(self.deployment.nodes)
        node.frozen_until = max(node.frozen_until, self.world.now + self.world.between(*FREEZE_S))
        for stream in self.deployment.network.streams():
            if node in (stream.decode, stream.prefill) and self.world.chance(0.5):
                self.deployment.network.cut(stream)
