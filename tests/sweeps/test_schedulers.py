"""Which trials the schedulers of a sweep stop."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from mmdiff_ray.distributed.tune.schedulers import make_scheduler
from mmdiff_ray.distributed.tune.sweep import make_configs
from mmdiff_ray.distributed.tune.trial import SCORE
from tests.sweeps import tiny


@dataclass(frozen=True)
class Running:
    """A trial as far as schedulers know one."""

    trial_id: str
    status: str = "RUNNING"


@pytest.mark.parametrize("name", ["asha", "median"])
@pytest.mark.parametrize("baseline", [True, False])
def test_the_base_configuration_itself_is_never_stopped(sprites, tmp_path, name, baseline):
    sweep = tiny.sweep(tmp_path, sprites, scheduler__name=name, baseline=baseline)
    scheduler = make_scheduler(sweep, make_configs(sweep), [])
    trials = [Running(str(number)) for number in range(5)]
    controller = SimpleNamespace(get_live_trials=lambda: set(trials))
    stopped = set()
    for number, trial in reversed(list(enumerate(trials))):  # the worst report last: numbers 1 and 0
        scheduler.on_trial_add(controller, trial)
        for samples in (16, 32, 48):
            told = {SCORE: float(number), "samples_seen": samples, "number": number}
            if scheduler.on_trial_result(controller, trial, told) == scheduler.STOP:
                stopped.add(number)
                break
    assert 1 in stopped
    assert (0 in stopped) is not baseline
