"""The life of a run: what happens when, how it is stopped, how it goes on."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mmdiff_ray.batch import Batch
from mmdiff_ray.training.checkpoint import CheckpointStore, complete, read_state
from mmdiff_ray.training.fit import Curves, crossed, fit
from mmdiff_ray.training.progress import Progress
from mmdiff_ray.training.trainer import Trainer, TrainingError
from tests import sprites as tiny

TIMES = ("train.log_every_samples=32", "checkpoint.every_samples=64", "evaluate.every_samples=48")


class Diary:
    """Write down what happens. stop_at: samples from which on somebody asks for the run to stop."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.seen = 0
        self.began: int | None = None
        self.reports: dict[int, dict[str, float]] = {}
        self.evaluated: list[int] = []

    def resumed(self, progress: Progress) -> None:
        self.began = self.seen = progress.samples_seen

    def report(self, progress: Progress, metrics: dict[str, float]) -> None:
        self.seen = progress.samples_seen
        self.reports[progress.samples_seen] = metrics

    def evaluate(self, trainer: Trainer, pictures: bool) -> Curves:
        self.evaluated.append(trainer.progress.samples_seen)
        return {"val/shape/guessed": (float(trainer.progress.samples_seen != 128), "higher")}

    def should_stop(self, progress) -> bool:
        return self.stop_at is not None and self.seen + 32 > self.stop_at


@pytest.fixture(scope="module")
def job(sprites):
    return tiny.job(sprites, *TIMES)


def run(
    job,
    folder: Path,
    diary: Diary,
    spoil: Callable[[Iterator[Batch]], Iterator[Batch]] = lambda batches: batches,
) -> tuple[str, Trainer]:
    trainer = tiny.trainer(job)
    ended = fit(
        trainer,
        CheckpointStore(folder, job.config.checkpoint),
        lambda start: spoil(tiny.batches(job, start)),
        lambda: tiny.held_out(job),
        diary,
        {"facts": "kept"},
    )
    return ended, trainer


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """Return how an undisturbed run ended, its trainer, its diary and its checkpoints."""
    folder, diary = tmp_path_factory.mktemp("whole"), Diary()
    return *run(job, folder, diary), diary, folder


def test_reports_evaluations_and_checkpoints_come_at_their_samples(whole):
    ended, trainer, diary, folder = whole
    assert ended == "finished" and trainer.progress.done
    assert diary.began == 0
    assert list(diary.reports) == [32, 48, 64, 96, 128, 144, 160]
    assert diary.evaluated == [48, 96, 144]  # at the end the whole evaluation follows
    assert [int(path.name) for path in complete(folder)] == [128, 160]  # of 64, 128 and the end, two are kept


def test_held_out_loss_is_reported_with_every_checkpoint_and_evaluation(whole):
    _, _, diary, folder = whole
    with_loss = [seen for seen, metrics in diary.reports.items() if "val/loss/total" in metrics]
    assert with_loss == [48, 64, 96, 128, 144, 160]
    assert [seen for seen, found in diary.reports.items() if "val/shape/guessed" in found] == [48, 96, 144]
    for path in complete(folder):
        state = read_state(path)
        assert state["metric"] == diary.reports[int(path.name)]["val/loss/total"]
        assert state["facts"] == "kept"


def test_evaluation_changes_no_weight_and_no_loss(job, whole, tmp_path):
    """Held-out losses have draws of their own: training goes as it goes without them."""
    quiet = dataclasses.replace(job.config.evaluate, every_samples=0)
    diary = Diary()
    _, trainer = run(
        dataclasses.replace(job, config=dataclasses.replace(job.config, evaluate=quiet)), tmp_path, diary
    )
    assert diary.evaluated == [] and list(diary.reports) == [32, 64, 96, 128, 160]
    assert tiny.same(tiny.weights(trainer.denoiser), tiny.weights(whole[1].denoiser))
    assert diary.reports[160]["val/loss/total"] == whole[2].reports[160]["val/loss/total"]
    assert diary.reports[32]["loss/total"] == whole[2].reports[32]["loss/total"]


def test_stated_figure_chooses_the_best_checkpoint(job, tmp_path):
    def ending(best: str, folder: Path) -> tuple[Diary, CheckpointStore]:
        config = dataclasses.replace(
            job.config,
            evaluate=dataclasses.replace(job.config.evaluate, best=best),
            checkpoint=dataclasses.replace(job.config.checkpoint, keep_last=1),
        )
        diary = Diary()
        run(dataclasses.replace(job, config=config), folder, diary)
        return diary, CheckpointStore(folder, config.checkpoint)

    diary, store = ending("shape/guessed", tmp_path / "figure")
    assert set(diary.evaluated) == {48, 64, 96, 128, 144, 160}
    best = store.best()
    assert best is not None and best.name == f"{64:012d}" and read_state(best)["metric"] == -1
    assert [int(path.name) for path in complete(tmp_path / "figure")] == [64, 160]
    _, store = ending("task/restore/total", tmp_path / "loss")
    assert {read_state(path)["figure"] for path in complete(tmp_path / "loss")} == {"task/restore/total"}
    with pytest.raises(TrainingError, match=r"evaluate.best: unknown curve 'shape/gessed'; known: loss/"):
        ending("shape/gessed", tmp_path / "typo")
    assert complete(tmp_path / "typo")  # nothing of what was trained is lost
    silent = Diary()
    silent.evaluate = lambda trainer, pictures: {}  # as where an evaluation fails
    config = dataclasses.replace(
        job.config, evaluate=dataclasses.replace(job.config.evaluate, best="shape/guessed")
    )
    run(dataclasses.replace(job, config=config), tmp_path / "failed", silent)
    assert complete(tmp_path / "failed")[-1].name == f"{160:012d}"


def test_stopped_run_saves_and_goes_on_to_the_same_end_bit_for_bit(job, whole, tmp_path):
    stopped = Diary(stop_at=80)
    ended, half = run(job, tmp_path, stopped)
    assert ended == "stopped" and half.progress.samples_seen == 96
    assert int(complete(tmp_path)[-1].name) == 96
    again = Diary(stop_at=80)  # what a worker is that was lost after that checkpoint
    ended, half = run(job, tmp_path, again)
    assert (ended, again.began, half.progress.samples_seen, again.reports) == ("stopped", 96, 96, {})
    resumed = Diary()
    ended, end = run(job, tmp_path, resumed)
    assert ended == "finished" and resumed.began == 96
    assert list(resumed.reports) == [128, 144, 160]
    assert tiny.same(tiny.weights(end.denoiser), tiny.weights(whole[1].denoiser))
    assert tiny.same(tiny.weights(end.ema.model), tiny.weights(whole[1].ema.model))
    losses = {key: value for key, value in resumed.reports[160].items() if "loss/" in key}
    assert losses == {key: value for key, value in whole[2].reports[160].items() if "loss/" in key}


def test_finished_run_has_nothing_left_to_do(job, whole):
    diary = Diary()
    ended, trainer = run(job, whole[3], diary)
    assert ended == "finished" and diary.reports == {} and diary.began == 160
    assert tiny.same(tiny.weights(trainer.ema.model), tiny.weights(whole[1].ema.model))


def test_request_to_stop_at_the_very_end_does_not_undo_it(job, tmp_path):
    assert run(job, tmp_path, Diary(stop_at=160))[0] == "finished"


def test_nothing_is_saved_from_a_loss_that_is_not_finite_on_and_what_was_being_saved_is_kept(job, tmp_path):
    def poisoned(batches: Iterator[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches, start=1):
            if number == 5:  # the step after the checkpoint at 64 samples
                factors = torch.full_like(batch.data["factors"], float("nan"))
                batch = dataclasses.replace(batch, data={**batch.data, "factors": factors})
            yield batch

    diary = Diary()
    with pytest.raises(TrainingError, match=r"factors.* at step 5 "):
        run(job, tmp_path, diary, poisoned)
    assert list(diary.reports) == [32, 48, 64]
    assert [path.name for path in tmp_path.iterdir()] == ["000000000064"]
    assert run(job, tmp_path, Diary())[0] == "finished"  # with sound rows it goes on from there


@pytest.mark.parametrize(
    "before, now, every, answer",
    [
        (0, 63, 64, False),
        (0, 64, 64, True),
        (63, 64, 64, True),
        (64, 127, 64, False),
        (60, 70, 0, False),
        (10, 300, 64, True),
    ],
)
def test_crossing_a_multiple(before, now, every, answer):
    assert crossed(before, now, every) is answer
