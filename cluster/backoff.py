"""How long to wait before a dead process is started again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Doubles from `first_s` up to `most_s`; starts again after a life of at least `reset_s`. Pure: lives are told."""

    first_s: float
    most_s: float
    reset_s: float
    deaths: int = 0

    def after(self, lived_s: float) -> float:
        """The pause after a life of `lived_s` seconds."""
        if lived_s >= self.reset_s:
            self.deaths = 0
        pause_s = min(self.most_s, self.first_s * 2.0 ** min(self.deaths, 60))
        self.deaths += 1
        return pause_s
