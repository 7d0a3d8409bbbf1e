"""What a sweep found and its report: ranks, Pareto front, importances, figures."""

import re

import numpy as np

from mmdiff_ray.sweeps.findings import at_same_samples, best_first, front, importances, ranges, short_names
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.plots import COLORS, draw
from mmdiff_ray.sweeps.record import Record
from mmdiff_ray.sweeps.report import verdict, write_report
from tests.sweeps import tiny
from tests.sweeps.tiny import WEIGHTS

SPACE = {f"{WEIGHTS}.scale": {"uniform": [0, 1]}, "loss.modalities.shape": {"uniform": [0, 1]}}


def trial(number: int, values: list[float], outcome: str = "finished", metric: str = "m", **swept) -> Trial:
    reports = [{"samples": 10 * (i + 1), "figures": {metric: value}} for i, value in enumerate(values)]
    return Trial(number, swept, reports=reports, outcome=outcome)


def drawn(sweep, trials, name: str, panel: int = 0) -> dict[int, tuple]:
    """Return number -> x, y and colour of the trials in a panel of a figure of the report."""
    (plot,) = [one for one in draw(Record(sweep, "id", "tiny", trials, {}, {}, {}), {}) if one.name == name]
    lines = [line for line in plot.figure.axes[panel].lines if line.get_gid()]
    return {
        int(line.get_gid().split("-")[1]): (*line.get_xdata(), *line.get_ydata(), line.get_color())
        for line in lines
    }


def test_the_best_that_finished_stand_before_those_that_came_far(tmp_path):
    trials = [trial(0, [3.0, 2.0]), trial(1, [0.1], "stopped"), trial(2, [2.0, 1.0]), trial(3, [], "failed")]
    for way, order in (("min", [2, 0, 1, 3]), ("max", [0, 2, 1, 3])):
        sweep = tiny.sweep(tmp_path, metrics={"m": way})
        assert [one.number for one in best_first(sweep, trials)] == order


def test_the_front_holds_what_nothing_beats_and_the_report_shows_it(tmp_path):
    sweep = tiny.sweep(tmp_path, space=SPACE, metrics={"a": "min", "b": "max", "c": "max"})
    points = [(3.0, 3.0, 1.0), (2.0, 2.0, 1.0), (2.0, 1.5, 1.0), (1.0, 1.0, 1.0)]
    trials = [
        Trial(
            i,
            {},
            reports=[{"samples": 1, "figures": dict(zip("abc", point, strict=True))}],
            outcome="finished",
        )
        for i, point in enumerate(points)
    ]
    trials.append(Trial(4, {}, reports=trials[0].reports, outcome="stopped"))
    assert [one.number for one in front(sweep, trials)] == [3, 1, 0]
    record = Record(sweep, "id", "tiny", trials, {}, {}, {})
    lines = verdict(record)
    assert "3 trials are on the Pareto front." in lines
    assert lines.index("Trial 3: a 1, b 1, c 1.") < lines.index("Trial 0: a 3, b 3, c 1.")
    for panel, pair in enumerate(("ab", "ac", "bc")):
        at = ["abc".index(letter) for letter in pair]
        assert drawn(sweep, trials, "pareto", panel) == {
            i: (*(point[j] for j in at), COLORS["finished" if i == 2 else "on the front"])
            for i, point in enumerate(points)
        }
    (tmp_path / "best").mkdir()
    old, own = tmp_path / "trial-9.png", tmp_path / "notes.txt"
    for file in (old, tmp_path / "best" / "1-trial-9.yaml", own):
        file.write_text("of an earlier report, but for the notes")
    files = write_report(record, tmp_path)
    assert all(file.exists() for file in files) and own.exists()
    assert not old.exists() and not list((tmp_path / "best").iterdir())
    assert {"pareto.png", "parallel.png", "report.html"} <= {file.name for file in files}
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    assert "<h1>Tiny</h1>" in page and page.count('data-trial="4"') and "http" not in page.split("<svg")[0]
    assert not re.findall("@[a-z]+@", page)


def test_the_base_configuration_is_a_level_to_compare_with_and_no_point_of_the_space(tmp_path):
    metric, rng = "shape/head_nll", np.random.default_rng(0)
    sweep = tiny.sweep(tmp_path, space=SPACE, metrics={metric: "min"}, baseline=True)
    keys = list(sweep.space)
    points = [
        trial(i, [x, x], metric=metric, **dict(zip(keys, (x, y), strict=True)))
        for i, (x, y) in enumerate(rng.random((8, 2)), 1)
    ]
    base = trial(0, [0.5], "stopped", metric=metric)
    lines = verdict(Record(sweep, "id", "tiny", [base, *points], {}, {}, {}))
    assert "The base configuration itself (trial 0, stopped at 10 samples): shape/head_nll 0.5." in lines
    none = verdict(Record(sweep, "id", "tiny", points, {}, {}, {}))
    assert not any("base configuration" in line for line in none)
    assert importances(sweep, [base, *points], metric) == importances(sweep, points, metric) != []
    for ended, levels in (("stopped", []), ("finished", [0.5])):
        base = trial(0, [0.6, 0.5], ended, metric=metric)
        plots = draw(Record(sweep, "id", "tiny", [base, *points], {}, {}, {}), {})
        (slices,) = [plot for plot in plots if plot.name == "slices-shape_head_nll"]
        for axes in slices.figure.axes:
            lines = [line for line in axes.lines if not line.get_gid()]
            assert [line.get_ydata()[0] for line in lines] == levels, "only a finished base is a level"
    assert {plot.name for plot in draw(Record(sweep, "id", "tiny", [base], {}, {}, {}), {})} >= {"trials"}


def test_names_are_short_and_never_those_of_another_section():
    keys = [
        f"{WEIGHTS}.scale",
        "modalities.pixels.weights.scale",
        "loss.modalities.shape",
        "loss.channels.shape",
        "seed",
    ]
    assert list(short_names(keys).values()) == [
        "shape.weights.scale", "pixels.weights.scale", "loss.modalities.shape", "channels.shape", "seed",
    ]  # fmt: skip
    assert list(short_names(keys).keys()) == keys


def test_trials_are_compared_where_half_of_them_came_to():
    trials = [trial(0, [1, 2, 3]), trial(1, [4, 5, 6]), trial(2, [7, 8], "stopped"), trial(3, [9], "stopped")]
    assert {one.number: one.reports[-1]["figures"]["m"] for one in at_same_samples(trials)} == {0: 3, 1: 6}
    assert [one.number for one in at_same_samples([*trials[:1], *trials[2:]])] == [0, 2]


def test_what_the_metric_depends_on_is_found_and_early_ends_do_not_hide_it(tmp_path):
    sweep = tiny.sweep(tmp_path, space=SPACE, metrics={"m": "max"})
    rng = np.random.default_rng(0)
    trials = []
    for number in range(30):
        scale, other = rng.uniform(size=2)
        values = [scale, scale + 10] if number % 2 else [scale]  # later reports are larger for all
        swept = {f"{WEIGHTS}.scale": scale, "loss.modalities.shape": other}
        trials.append(trial(number, values, "finished" if number % 2 else "stopped", **swept))
    first, second = importances(sweep, trials, "m")
    assert first.key == f"{WEIGHTS}.scale" and first.share > 0.9 > 0.3 > second.share
    assert first.low <= first.share <= 1 and first.low > second.high
    assert importances(sweep, trials[:3], "m") == []


def test_members_of_a_population_are_shown_at_their_final_values(tmp_path):
    population = {"name": "pbt", "grace": 0.2, "quantile": 0.25}
    sweep = tiny.sweep(tmp_path, space=SPACE, scheduler=population, metrics={"m": "max"})
    key, other = f"{WEIGHTS}.scale", "loss.modalities.shape"
    members = [trial(number, [0.1, number / 10], **{key: 0.9, other: 0.5}) for number in range(8)]
    for member in members:
        member.changes.append({"at": 10, "values": {key: member.number / 10}, "source": 0})
    assert ranges(sweep, members[2:4]) == {key: [0.2, 0.3], other: [0.5, 0.5]}
    assert importances(sweep, members, "m") == []
    assert {n: point[0] for n, point in drawn(sweep, members, "slices-m").items()} == {
        number: number / 10 for number in range(8)
    }
    steps = drawn(sweep, members, "lineage")
    assert steps[3][:-1] == (0, 10, 20, 0.9, 0.3, 0.3), "samples, then values"
