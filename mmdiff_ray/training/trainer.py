"""The trainer: optimizer steps over batches, with loss terms summed over workers and micro-batches."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config, RunError, in_force
from mmdiff_ray.diffusion.ema import Ema
from mmdiff_ray.diffusion.objective import Objective, Terms
from mmdiff_ray.diffusion.process import Process, Roles
from mmdiff_ray.models.denoiser import Denoiser, build_denoiser, build_modalities, build_process
from mmdiff_ray.tasks import Tasks
from mmdiff_ray.training.loss import TrainingLoss
from mmdiff_ray.training.optim import learning_rate, make_optimizer
from mmdiff_ray.training.parallel import (
    add_over_workers,
    clip_gradients,
    gather,
    is_sharded,
    largest_over_workers,
    parallelize,
    same_everywhere,
    without_sync,
    world,
)
from mmdiff_ray.training.progress import Progress

PROBE_STEPS = (5, 25, 125, 500, 2000)
"""Steps at which to measure the speed for `train.max_minutes`. Several, because the first steps are slow
(readers start, caches fill)."""


class TrainingError(RunError):
    """Training cannot continue; the message is for the user."""


@dataclass
class Meters:
    """Measurements between two reports. Tensors stay on the device until the report.

    sums, counts: of every loss term; terms with coefficient 0 are only measured in the first step.
    bad_step: the first non-finite step, 0 if none; bad_terms: its non-finite loss terms.
    """

    sums: Tensor
    counts: Tensor
    grad_norm: Tensor
    bad_step: Tensor
    bad_terms: Tensor
    steps: int = 0
    wait_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)


class Trainer:
    """Train a denoiser. One instance per worker; every worker gets its own rows of each global batch."""

    def __init__(self, config: Config, denoiser: Denoiser, device: torch.device) -> None:
        self.whole, self.config = config, in_force(config, 0)
        self.device = device
        self.denoiser = denoiser
        denoiser.process = _process(self.config)  # applies changes at 0 samples
        self.ema = Ema(denoiser, config.train.ema_samples)
        self.loss = TrainingLoss(denoiser, self.config)
        self.average_loss = TrainingLoss(self.ema.model, self.config)
        self.model = parallelize(self.loss, config, device)
        self.average = parallelize(self.average_loss, config, device)
        self.tasks = Tasks(
            config.tasks,
            list(denoiser.modalities),
            {name for name, modality in denoiser.modalities.items() if modality.only_given},
        )
        self.optimizer = make_optimizer(self.denoiser, config.train)
        self.progress = Progress(total_samples=config.train.samples)
        self.terms = sorted(self.objective.counts(self._no_roles(), 1))
        self.expected = {key: float(count) for key, count in self.loss.expected_counts(self.tasks).items()}
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self.meters = self._new_meters()

    @property
    def objective(self) -> Objective:
        """Return the current objective."""
        return self.loss.objective

    def resume_from(self, progress: Progress) -> None:
        """Restore the progress of an earlier process. The total samples follow from this configuration."""
        self.progress = dataclasses.replace(progress)
        self.progress.total_samples = self._total_samples()
        self._apply_changes()

    def _apply_changes(self) -> None:
        """Apply the `train.changes` up to samples_seen: weights, coefficients, learning rate."""
        now = in_force(self.whole, self.progress.samples_seen)
        if now != self.config:
            self.config = now
            process = _process(now)
            for loss in (self.loss, self.average_loss):
                loss.set(now, process)

    def _new_meters(self) -> Meters:
        zeros = torch.zeros(len(self.terms), dtype=torch.float64, device=self.device)
        zero = torch.zeros((), device=self.device)
        return Meters(zeros, zeros.clone(), zero, zero.long(), zeros.bool())

    def _no_roles(self) -> Roles:
        return {
            name: torch.zeros(1, dtype=torch.int64, device=self.device) for name in self.denoiser.modalities
        }

    def advance(self, batches: Iterator[Batch], stop_at: int) -> dict[str, float]:
        """Train until samples_seen reaches stop_at or the end of the run; return the report."""
        self._apply_changes()
        self.meters.started = time.perf_counter()
        while self.progress.samples_seen < min(stop_at, self.progress.total_samples):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            self.step(batch)
            self.meters.wait_s += waited
            self.progress.seconds += time.perf_counter() - asked
            self._size_by_time()
        return self.report()

    def step(self, batch: Batch) -> None:
        """Do one optimizer step on this worker's rows of a global batch."""
        batch = batch.to(self.device)
        task, roles = self.tasks.draw(batch, self.config.seed)
        one_pass = self.tasks.draw_one_pass(task, batch, self.config.seed)
        counts = self.loss.counts(batch, roles)
        rate = learning_rate(self.config.train, self.progress.samples_seen, self.progress.total_samples)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._backward(batch, roles, one_pass, self._divisors(counts))
        grad_norm = clip_gradients(self.denoiser, self.config.train.clip_norm)
        self.optimizer.step()
        self.progress.samples_seen += self.config.train.global_batch
        self.progress.steps += 1
        self.ema.update(self.denoiser, self.config.train.global_batch, self.progress.samples_seen)
        self._measure(sums, counts, grad_norm)

    def _divisors(self, counts: Terms) -> Mapping[str, Tensor | float]:
        """Return the divisors of the sums of a global batch, according to `loss.normalize`.

        They are the expected counts, or the counts of this batch, summed over workers in one message.
        """
        if self.config.loss.normalize == "expected":
            rows = self.config.train.global_batch
            return {key: count * rows for key, count in self.expected.items()}
        values = add_over_workers(torch.stack([counts[key] for key in self.terms]))
        return dict(zip(self.terms, values.unbind(), strict=True))

    def _backward(
        self, batch: Batch, roles: Roles, one_pass: Tensor | None, divisors: Mapping[str, Tensor | float]
    ) -> Terms:
        """Add the gradients of all micro-batches; return this worker's sums."""
        size = self.config.train.micro_batch or len(batch)
        starts = range(0, len(batch), size)
        total: Tensor | None = None
        for start in starts:
            part = batch.rows(start, start + size)
            part_roles = {name: role[start : start + size] for name, role in roles.items()}
            with without_sync(self.model, start != starts[-1]):
                at_noise = None if one_pass is None else one_pass[start : start + size]
                sums = self.model(part, part_roles, self.meters.steps > 0, at_noise)
                # DDP averages gradients over workers, but divisors are global: this makes it a sum.
                (self.objective.total(sums, divisors) * world()[1]).backward()
            values = torch.stack(list(sums.values())).detach().double()
            total = values if total is None else total + values
        assert total is not None, "a batch has rows"
        return dict(zip(sums, total.unbind(), strict=True))

    def _measure(self, sums: Terms, counts: Terms, grad_norm: Tensor) -> None:
        meters = self.meters
        zero = self._zero
        values = torch.stack([sums.get(key, zero) for key in self.terms])
        bad_terms = ~torch.isfinite(values)
        bad = bad_terms.any() | ~torch.isfinite(grad_norm)
        first = bad & (meters.bad_step == 0)
        meters.bad_step = torch.where(first, self.progress.steps, meters.bad_step)
        meters.bad_terms = torch.where(first, bad_terms, meters.bad_terms)
        meters.sums += values
        meters.counts += torch.stack([counts[key] if key in sums else zero for key in self.terms])
        meters.grad_norm += grad_norm.detach()
        meters.steps += 1

    def report(self) -> dict[str, float]:
        """Return the mean of every measurement since the last report, equal on all workers; then reset.

        Raises TrainingError on all workers if a loss term or gradient was not finite.
        """
        meters, self.meters = self.meters, self._new_meters()
        if not meters.steps:
            return {}
        self._check_finite(meters)
        sums, counts = add_over_workers(torch.stack([meters.sums, meters.counts])).unbind()
        means = (sums / counts.clamp_min(1)).tolist()
        elapsed = time.perf_counter() - meters.started
        samples = meters.steps * self.config.train.global_batch
        losses = {f"loss/{key}": mean for key, mean in zip(self.terms, means, strict=True)}
        total = self.objective.total(
            dict(zip(self.terms, sums, strict=True)), dict(zip(self.terms, counts, strict=True))
        )
        return {
            "loss/total": float(total),
            **losses,
            "train/grad_norm": float(meters.grad_norm) / meters.steps,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "train/samples_per_s": samples / elapsed,
            "train/data_wait_share": meters.wait_s / elapsed,
        }

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the loss terms of the averaged model on held-out rows, the same on all workers: over all
        rows, `val/loss/...`, and over the rows of each task, `val/task/NAME/...`.

        batches: this worker's share, as many as every worker has (`batch.share`). Tasks, roles, times and
        noise depend on the rows alone, so losses can be compared over time.
        """
        names = self.tasks.names
        sums = torch.zeros(1 + len(names), len(self.terms), device=self.device, dtype=torch.float64)
        counts = torch.zeros_like(sums)
        for batch in batches:
            batch = batch.to(self.device)
            task, roles = self.tasks.draw(batch, self.config.seed)
            one_pass = self.tasks.draw_one_pass(task, batch, self.config.seed)
            rows = self.average(batch, roles, False, one_pass, True)
            row_counts = self.loss.counts(batch, roles, True)
            groups = torch.cat(
                [torch.ones(1, len(batch)), torch.stack([task == i for i in range(len(names))])]
            )
            groups = groups.to(sums)  # (1 + tasks, B): all rows, then those of each task
            sums += groups @ torch.stack([rows[key] for key in self.terms], 1).double()
            counts += groups @ torch.stack([row_counts[key] for key in self.terms], 1)
        sums, counts = add_over_workers(torch.stack([sums, counts])).unbind()
        found: dict[str, float] = {}
        for name, above, below in zip(
            ["loss", *(f"task/{name}" for name in names)], sums, counts, strict=True
        ):
            if not float(below.sum()):
                continue
            terms, sizes = (dict(zip(self.terms, values, strict=True)) for values in (above, below))
            found[f"val/{name}/total"] = float(self.objective.total(terms, sizes))
            means = zip(self.terms, (above / below.clamp_min(1)).tolist(), below.tolist(), strict=True)
            found |= {f"val/{name}/{key}": mean for key, mean, size in means if size or name == "loss"}
        return found

    def averaged(self) -> Denoiser | None:
        """Return the complete EMA model on the first worker, and None on the others. Collective."""
        model = self.ema.model
        if is_sharded(model):
            state = gather(model)
            if world()[0] == 0:
                model = build_denoiser(self.config)
                model.load_state_dict(state)
                model.to(self.device)
        return model if world()[0] == 0 else None

    def _check_finite(self, meters: Meters) -> None:
        age = torch.where(meters.bad_step > 0, self.progress.steps + 1 - meters.bad_step, 0)
        oldest, *bad_terms = largest_over_workers(torch.cat([age[None], meters.bad_terms.long()])).tolist()
        if not oldest:
            return
        terms = [key for key, bad in zip(self.terms, bad_terms, strict=True) if bad] or ["the gradient"]
        done = self.progress.steps
        raise TrainingError(
            f"not finite: {', '.join(terms)} at step {done + 1 - oldest} (of {done} "
            "done). The last checkpoint is from before; resume from it with a lower train.learning_rate or "
            "clip_norm, or train.precision=float32"
        )

    def _size_by_time(self) -> None:
        """Measure the speed. With `train.max_minutes`, set the end of the run to what fits into it."""
        progress = self.progress
        if progress.steps not in PROBE_STEPS:
            return
        now = same_everywhere(progress.seconds)
        if progress.probed_steps:
            samples = (progress.steps - progress.probed_steps) * self.config.train.global_batch
            progress.speed = samples / max(1e-9, now - progress.probed_s)
        progress.probed_s, progress.probed_steps = now, progress.steps
        progress.total_samples = self._total_samples()

    def _total_samples(self) -> int:
        train, progress = self.config.train, self.progress
        if train.max_minutes is None or not progress.speed:
            return train.samples
        left = progress.speed * max(0.0, train.max_minutes * 60 - progress.probed_s)
        return min(
            train.samples, (progress.probed_steps + int(left) // train.global_batch) * train.global_batch
        )


def _process(config: Config) -> Process:
    """Build the process of a configuration. A denoiser's own modalities keep their original weights."""
    return build_process(config, build_modalities(config))
