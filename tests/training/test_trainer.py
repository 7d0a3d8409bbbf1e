"""The trainer: what a step does, what a report says, and when training ends."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import ConfigError
from mmdiff_ray.diffusion.process import ABSENT
from mmdiff_ray.training import trainer as module
from mmdiff_ray.training.optim import learning_rate
from mmdiff_ray.training.trainer import Trainer, TrainingError
from tests import sprites as tiny

LABEL_ONLY = (
    "modalities={shape: {type: label, channels: own}, pixels: {type: image}}",
    "tasks={joint: {roles: {shape: generated, pixels: generated}}}",
)


@pytest.fixture(scope="module")
def job(sprites):
    return tiny.job(sprites)


def losses(report: dict[str, float]) -> dict[str, float]:
    """Return what of a report does not depend on the clock."""
    return {key: value for key, value in report.items() if "loss/" in key or key == "train/grad_norm"}


def trained(job, steps: int) -> tuple[Trainer, list[dict[str, float]]]:
    """Return a trainer after so many steps, with a report of each."""
    trainer, batches = tiny.trainer(job), tiny.batches(job)
    size = job.config.train.global_batch
    return trainer, [losses(trainer.advance(batches, (step + 1) * size)) for step in range(steps)]


def with_data(batch: Batch, **data) -> Batch:
    return dataclasses.replace(batch, data={**batch.data, **data})


def without(batch: Batch, *names: str) -> Batch:
    """Return the batch with instances that no row has."""
    gone = {name: torch.zeros_like(batch.real) for name in names}
    return dataclasses.replace(batch, present={**batch.present, **gone})


def test_losses_are_the_same_for_any_number_of_micro_batches(job, sprites):
    whole = trained(job, 5)[1]
    for size in (8, 4, 3):  # 3: the last micro-batch of 16 rows has one
        if size == 3:
            config = dataclasses.replace(job.config.train, micro_batch=3)
            cut_job = dataclasses.replace(job, config=dataclasses.replace(job.config, train=config))
        else:
            cut_job = tiny.job(sprites, f"train.micro_batch={size}")
        cut = trained(cut_job, 5)[1]
        for one, other in zip(whole, cut, strict=True):
            assert other == pytest.approx(one, rel=1e-5, abs=1e-9)


def test_training_lowers_the_loss(sprites):
    job = tiny.job(sprites, "train.samples=800", "train.learning_rate=1e-2")
    trainer, batches = tiny.trainer(job), tiny.batches(job)
    before = trainer.validate(tiny.held_out(job))["val/loss/total"]
    trainer.advance(batches, 800)
    assert trainer.validate(tiny.held_out(job))["val/loss/total"] < 0.7 * before


def test_report_holds_means_over_all_steps_since_the_last(job):
    single = trained(job, 3)[1]
    trainer, batches = tiny.trainer(job), tiny.batches(job)
    together = trainer.advance(batches, 48)
    assert together["train/grad_norm"] == pytest.approx(sum(r["train/grad_norm"] for r in single) / 3)
    assert min(r["loss/l1/pixels"] for r in single) <= together["loss/l1/pixels"]
    assert together["loss/l1/pixels"] <= max(r["loss/l1/pixels"] for r in single)
    assert trainer.report() == {}  # nothing since


def test_speed_and_wait_leave_out_what_happened_between_two_reports(job, monkeypatch):
    now = [0.0]

    def clock() -> float:
        return now[0]

    def slow(batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            now[0] += 3.0  # seconds to wait for a batch; a step takes no time on this clock
            yield batch

    monkeypatch.setattr(module.time, "perf_counter", clock)
    trainer, batches = tiny.trainer(job), slow(tiny.batches(job))
    now[0] += 1000.0  # an evaluation, say
    report = trainer.advance(batches, 32)
    assert report["train/samples_per_s"] == pytest.approx(32 / 6)
    assert report["train/data_wait_share"] == pytest.approx(1.0)
    assert trainer.progress.seconds == 6.0
    now[0] += 1000.0
    assert trainer.advance(batches, 64)["train/samples_per_s"] == pytest.approx(32 / 6)


def test_learning_rate_of_a_report_is_that_of_its_last_step(job):
    trainer = tiny.trainer(job)
    report = trainer.advance(tiny.batches(job), 48)
    assert report["train/learning_rate"] == learning_rate(job.config.train, 32, 160)


def test_two_trainers_of_one_seed_end_with_the_same_weights_bit_for_bit(job):
    first, second = trained(job, 4)[0], trained(job, 4)[0]
    assert tiny.same(tiny.weights(first.denoiser), tiny.weights(second.denoiser))
    assert tiny.same(tiny.weights(first.ema.model), tiny.weights(second.ema.model))


# --- what is not finite --------------------------------------------------------------------------------


def test_loss_that_is_not_finite_is_an_error_that_names_step_and_term(job):
    trainer, batches = tiny.trainer(job), tiny.batches(job)
    calls = itertools.count(1)

    def spoil(head, inputs, prediction):
        return prediction * float("nan") if next(calls) == 3 else prediction

    trainer.denoiser.heads["shape"].register_forward_hook(spoil)
    with pytest.raises(TrainingError) as caught:
        trainer.advance(batches, 96)  # the next report comes after step 6, when everything is spoilt
    assert "not finite: l1/shape, l2/shape at step 3 (of 6 done)" in str(caught.value)


def test_gradient_that_alone_is_not_finite_is_named_as_such(job):
    trainer, batches = tiny.trainer(job), tiny.batches(job)
    next(iter(trainer.denoiser.heads["shape"].parameters())).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match="not finite: the gradient at step 1 "):
        trainer.advance(batches, 16)


# --- what is missing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [("factors",), ("factors", "shapes"), ("pixels", "masked")])
def test_instance_that_no_row_has_weighs_nothing_and_training_goes_on(job, gone):
    trainer, batches = tiny.trainer(job), tiny.batches(job)
    report = trainer.advance((without(batch, *gone) for batch in batches), 32)
    for name in gone:
        for term in ("l1", "l2", "l3"):
            assert report.get(f"loss/{term}/{name}", 0.0) == 0.0
    assert report["loss/l2/shape"] > 0 and report["train/grad_norm"] > 0
    assert all(p.grad is not None for p in trainer.denoiser.parameters() if p.requires_grad)


def test_data_of_an_absent_instance_changes_nothing(job):
    ends = []
    for filler in (0, 1):
        trainer, batches = tiny.trainer(job), tiny.batches(job)
        changed = (
            with_data(without(b, "shapes"), shapes=torch.full_like(b.data["shapes"], filler)) for b in batches
        )
        trainer.advance(changed, 32)
        ends.append(tiny.weights(trainer.denoiser))
    assert tiny.same(*ends)


def test_labels_alone_can_be_learned_where_the_anchor_is_absent(sprites):
    job = tiny.job(sprites, *LABEL_ONLY, "train.learning_rate=0.01", "train.samples=640")
    trainer, batch = tiny.trainer(job), without(next(tiny.batches(job)), "pixels")
    first = trainer.advance(itertools.repeat(batch), 16)
    trainer.advance(itertools.repeat(batch), 624)
    last = trainer.advance(itertools.repeat(batch), 640)
    assert first["loss/l3/pixels"] == first["loss/l1/pixels"] == 0.0
    assert 0 < last["loss/l2/shape"] < 0.5 * first["loss/l2/shape"]


def test_padding_weighs_nothing(job):
    real = next(tiny.batches(job))
    half = dataclasses.replace(real, real=torch.arange(len(real)) < 8)
    changed = with_data(half, pixels=torch.cat([half.data["pixels"][:8], 255 - half.data["pixels"][8:]]))
    reports = []
    for batch in (half, changed):
        trainer = tiny.trainer(job)
        reports.append(losses(trainer.advance(iter([batch]), 16)))
        _, roles = trainer.tasks.draw(batch, 0)
        assert all(bool((role[8:] == ABSENT).all()) for role in roles.values())
    assert reports[0] == reports[1]


# --- precision, averaging, validation ------------------------------------------------------------------


def test_bfloat16_stays_finite_and_near_float32(job, sprites):
    half = tiny.job(sprites, "train.precision=bfloat16")
    trainer, reports = trained(half, 4)
    assert all(value.dtype == torch.float32 for value in trainer.denoiser.parameters())
    for single, low in zip(trained(job, 4)[1], reports, strict=True):
        assert low["loss/total"] == pytest.approx(single["loss/total"], rel=0.05)


def test_average_forgets_half_within_its_half_life(job):
    trainer, batches = tiny.trainer(job), tiny.batches(job)
    trainer.progress.samples_seen = 100_000  # far from the start, where the half-life grows
    trainer.progress.total_samples = 200_000
    start = tiny.weights(trainer.ema.model)
    with torch.no_grad():
        for value in trainer.denoiser.parameters():
            value += 1.0
    frozen = tiny.weights(trainer.denoiser)
    for group in trainer.optimizer.param_groups:
        group["params"], group["kept"] = [], group["params"]
    for _ in range(4):  # 64 samples, the half-life
        trainer.step(next(batches))
    for name, value in trainer.ema.model.named_parameters():
        torch.testing.assert_close(value, (start[name] + frozen[name]) / 2)


def test_validation_is_the_same_whenever_it_is_asked_and_however_it_is_cut(job):
    trainer = trained(job, 2)[0]
    first = trainer.validate(tiny.held_out(job))
    assert first == trainer.validate(tiny.held_out(job))
    parts = {key: value for key, value in first.items() if key.startswith("val/task/")}
    assert {key.split("/")[2] for key in parts} == set(job.config.tasks)
    assert "val/task/restore/l1/pixels" in parts and "val/task/restore/l2/shape" not in parts
    assert trainer.validate(tiny.held_out(job, size=6)) == pytest.approx(first, rel=1e-6)
    assert first["val/loss/total"] > 0


def test_validation_judges_the_averaged_model_and_leaves_training_as_it_was(job):
    plain, checked = tiny.trainer(job), tiny.trainer(job)
    first, second = tiny.batches(job), tiny.batches(job)
    for seen in (16, 32, 48):
        plain.advance(first, seen)
        checked.advance(second, seen)
        before = checked.validate(tiny.held_out(job))
    assert tiny.same(tiny.weights(plain.denoiser), tiny.weights(checked.denoiser))
    with torch.no_grad():
        for value in checked.denoiser.parameters():
            value.zero_()
    assert checked.validate(tiny.held_out(job)) == before


def test_validation_without_rows_says_nothing(job):
    assert tiny.trainer(job).validate([]) == {}


# --- training sized by time ----------------------------------------------------------------------------


def timed(job, monkeypatch, seconds_per_step: float) -> tuple[Trainer, Iterator[Batch]]:
    """Return a trainer, and batches that make each step take so long on the clock it reads."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    batch = next(tiny.batches(job))

    def batches() -> Iterator[Batch]:
        for number in itertools.count():
            now[0] += 100.0 if number < 3 else seconds_per_step  # the first steps are slow everywhere
            yield batch

    return tiny.trainer(job), batches()


def test_run_ends_at_the_samples_that_fit_into_its_minutes(sprites, monkeypatch):
    job = tiny.job(sprites, "train.samples=16000", "train.max_minutes=6", "train.final_lr_ratio=0.1")
    trainer, batches = timed(job, monkeypatch, 2.0)
    trainer.advance(batches, 25 * 16)
    # after 25 steps 344 of 360 s are gone; the other 16 s hold 8 steps of 2 s
    assert trainer.progress.total_samples == (25 + 8) * 16
    report = trainer.advance(batches, 16000)
    assert trainer.progress.done and trainer.progress.seconds == pytest.approx(360.0)
    last = learning_rate(job.config.train, 32 * 16, 33 * 16)
    assert report["train/learning_rate"] == last < 0.11 * job.config.train.learning_rate


def test_run_that_fits_into_its_minutes_keeps_its_samples(sprites, monkeypatch):
    job = tiny.job(sprites, "train.samples=432", "train.max_minutes=60")
    trainer, batches = timed(job, monkeypatch, 1.0)
    trainer.advance(batches, 432)
    assert trainer.progress.total_samples == 432 and trainer.progress.done


@pytest.mark.parametrize("steps", [3, 10, 24])
def test_run_that_is_restarted_before_its_speed_is_known_is_sized_too(sprites, monkeypatch, steps):
    job = tiny.job(sprites, "train.samples=16000", "train.max_minutes=6")
    trainer, batches = timed(job, monkeypatch, 2.0)
    trainer.advance(batches, steps * 16)
    again = tiny.trainer(job)
    again.resume_from(trainer.progress)
    again.advance(batches, 25 * 16)
    assert again.progress.total_samples == (25 + 8) * 16


def test_length_of_a_run_can_be_changed_where_it_goes_on(sprites, monkeypatch):
    job = tiny.job(sprites, "train.samples=16000", "train.max_minutes=6")
    trainer, batches = timed(job, monkeypatch, 2.0)
    trainer.advance(batches, 26 * 16)
    for override, samples in (
        ("train.max_minutes=6", (25 + 8) * 16),
        ("train.max_minutes=7", (25 + 38) * 16),
        ("train.max_minutes=null", 16000),
        ("train.samples=480", 480),
    ):
        again = tiny.trainer(tiny.job(sprites, "train.samples=16000", "train.max_minutes=6", override))
        again.resume_from(trainer.progress)
        assert again.progress.total_samples == samples
        assert again.progress.samples_seen == 26 * 16


def seen_by_the_model(
    sprites, monkeypatch, *overrides: str
) -> tuple[Trainer, Batch, torch.Tensor, torch.Tensor]:
    """Return a trainer, a batch, and z_t and t as its model sees them."""
    job = tiny.job(sprites, *overrides)
    trainer, batch = tiny.trainer(job), next(tiny.batches(job))
    seen = []
    forward = trainer.denoiser.forward
    monkeypatch.setattr(
        trainer.denoiser, "forward", lambda z, t, *rest: seen.append((z, t)) or forward(z, t, *rest)
    )
    trainer.step(batch)
    return trainer, batch, *seen[0]


def test_times_are_drawn_from_the_part_that_is_asked_for(sprites, monkeypatch):
    for low, high in ((0.0, 1.0), (0.5, 0.6), (1.0, 1.0)):
        _, _, _, t = seen_by_the_model(sprites, monkeypatch, f"train.times=[{low}, {high}]")
        assert bool((t > low - 1e-9 if low < 1 else t == 1).all()) and bool((t <= high).all())
        assert float(t.max() - t.min()) > 0.5 * (high - low) or low == high


def test_rows_of_one_pass_are_pure_noise_and_the_others_as_ever(sprites, monkeypatch):
    name = next(iter(tiny.job(sprites).config.tasks))
    _, _, _, plain = seen_by_the_model(sprites, monkeypatch)
    _, _, _, t = seen_by_the_model(sprites, monkeypatch, f"tasks.{name}.one_pass=0.9")
    assert bool((t == 1).any()) and bool(((t == 1) | (t == plain)).all()) and bool((t != 1).any())


def test_logit_normal_times_have_the_mean_and_spread_that_are_asked_for(sprites):
    job = tiny.job(
        sprites, "train.time_sampling=logit_normal", "train.time_mean=-0.5", "train.time_std=0.7",
        "schedule.steps=10000",
    )  # fmt: skip
    ids = torch.arange(4096)
    batch = Batch(ids, torch.zeros_like(ids), torch.ones(4096, dtype=torch.bool), {}, {})
    logits = torch.logit(tiny.trainer(job).loss._times(batch))
    assert abs(float(logits.mean()) + 0.5) < 4 * 0.7 / 64
    assert abs(float(logits.std()) - 0.7) < 0.04


def test_cutout_hides_the_hole_from_the_model_in_about_half_of_the_rows(sprites, monkeypatch):
    _, batch, plain, _ = seen_by_the_model(sprites, monkeypatch)
    _, _, cut, _ = seen_by_the_model(sprites, monkeypatch, "train.cutout=masked")
    hole = (batch.data["masked"][:, 3] == 0)[:, None].expand_as(cut)
    hidden = torch.stack(
        [bool((z[h] == 0).all()) * torch.ones(()) for z, h in zip(cut, hole, strict=True)]
    ).bool()
    assert 0 < int(hidden.sum()) < len(cut)
    assert torch.equal(cut[~hidden], plain[~hidden])
    assert torch.equal(cut[hidden][~hole[hidden]], plain[hidden][~hole[hidden]])


def test_what_hides_nothing_is_refused_as_cutout(sprites):
    with pytest.raises(ConfigError, match=r"train.cutout \(shapes\) hides nothing"):
        tiny.job(sprites, "train.cutout=shapes")
