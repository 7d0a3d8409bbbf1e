"""The progress of a run."""

from dataclasses import dataclass


@dataclass
class Progress:
    """The progress of a run.

    samples_seen: the master clock; total_samples: its value at the end; seconds: training time. probed_s,
    probed_steps: seconds and steps at the last measurement of the speed; speed: its result in samples per
    second, 0 before the first.
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
