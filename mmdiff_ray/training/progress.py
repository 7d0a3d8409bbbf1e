"""Where a run is."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run is. samples_seen: the master clock; total_samples: where it ends; seconds: spent in
    training.

    probed_s, probed_steps: where the speed was measured last; speed: samples per second before, 0 if never.
    """

    samples_seen: int = 0
    steps: int = 0
    total_samples: int = 0
    seconds: float = 0.0
    probed_s: float = 0.0
    probed_steps: int = 0
    speed: float = 0.0

    @property
    def done(self) -> bool:
        return self.samples_seen >= self.total_samples
