"""What a person reads while a run goes on."""

import io
import math

import pytest
from rich.console import Console

from mmdiff_ray.distributed import display as module
from mmdiff_ray.distributed.display import Display, duration, progress_line

PROGRESS = {"samples_seen": 1200, "total_samples": 4000}
METRICS = {
    "loss/total": 1.25,
    "loss/l0/pixels": 0.5,
    "loss/l1/pixels": 0.25,
    "loss/l1/alpha": 0.5,
    "loss/l2/alpha": 1.0,
    "train/samples_per_s": 140.0,
    "train/data_wait_share": 0.031,
}


@pytest.mark.parametrize(
    "seconds, said",
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (math.nan, "?"),
    ],
)
def test_duration_is_said_as_a_person_says_it(seconds, said):
    assert duration(seconds) == said


def test_line_holds_samples_speed_time_left_losses_and_wait():
    line = progress_line(PROGRESS, METRICS, METRICS)
    assert line == "1,200 of 4,000 samples  140/s  20 s left  loss 1.250 (L1 0.75 L2 1.00)  data wait 3%"


def test_line_can_be_written_before_anything_is_known():
    assert progress_line(PROGRESS, {}, {}) == "1,200 of 4,000 samples  0/s  ? left"


def test_log_file_gets_a_line_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    written = io.StringIO()
    with Display(Console(file=written, width=120, markup=False)) as display:
        for _ in range(100):
            display.show({"progress": PROGRESS, "metrics": METRICS})
            now[0] += 1.0
    assert len(written.getvalue().splitlines()) == math.ceil(100 / (module.LINE_EVERY_S + 1))


def test_text_in_brackets_is_said_as_it_is(capsys):
    Display().say("set evaluate.evaluators=[joint] or [red]none[/red]")
    assert capsys.readouterr().out == "set evaluate.evaluators=[joint] or [red]none[/red]\n"


def test_terminal_is_left_clean():
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120)
    with Display(console) as display:
        display.show({"progress": PROGRESS, "metrics": METRICS})
        display.say("a line that stays")
    assert "a line that stays" in written.getvalue()
