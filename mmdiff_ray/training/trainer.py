"""The trainer: steps over batches, with loss terms added over workers and micro-batches. No Ray, no files."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config, RunError, in_force
from mmdiff_ray.denoiser import Denoiser, build_denoiser, build_process
from mmdiff_ray.diffusion import rng
from mmdiff_ray.diffusion.ema import Ema
from mmdiff_ray.diffusion.objective import Objective, Terms
from mmdiff_ray.diffusion.process import Roles
from mmdiff_ray.tasks import Tasks
from mmdiff_ray.training.optim import learning_rate, make_optimizer
from mmdiff_ray.training.parallel import (
    Losses,
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
"""Steps between which the speed is measured, by which `train.max_minutes` sizes the run: several, because
a run starts slowly (readers start, caches fill)."""


class TrainingError(RunError):
    """Training cannot go on, in words for the person who runs it."""


@dataclass
class Meters:
    """What is measured between two reports. Tensors stay on the device until a report is asked for.

    bad_step: the first step that was not finite, 0 if none; bad_terms: which of its loss terms were not.
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
        self.ema = Ema(denoiser, config.train.ema_samples)
        self.model = parallelize(Losses(denoiser, self.sums), config, device)
        self.average = parallelize(Losses(self.ema.model, self.sums), config, device)
        self.tasks = Tasks(
            config.tasks,
            list(denoiser.modalities),
            {name for name, modality in denoiser.modalities.items() if modality.only_given},
        )
        self.objective = Objective(denoiser.process, config.loss, dict(denoiser.modalities.items()))
        self.optimizer = make_optimizer(self.denoiser, config.train)
        self.progress = Progress(total_samples=config.train.samples)
        self.terms = sorted(self.objective.counts(self._no_roles(), 1))
        self.meters = self._new_meters()

    def go_on(self, progress: Progress) -> None:
        """Take over the progress of an earlier process; where the run ends is for this configuration to
        say."""
        self.progress = dataclasses.replace(progress)
        self.progress.total_samples = self._total_samples()
        self._keep_up()

    def _keep_up(self) -> None:
        """Take over what `train.changes` says for the samples seen: weights, coefficients, learning rate."""
        now = in_force(self.whole, self.progress.samples_seen)
        if now != self.config:
            self.config = now
            process = build_process(now, self.denoiser.modalities)
            self.denoiser.process = self.ema.model.process = process
            self.objective = Objective(process, now.loss, dict(self.denoiser.modalities.items()))

    def _new_meters(self) -> Meters:
        zeros = torch.zeros(len(self.terms), dtype=torch.float64, device=self.device)
        zero = torch.zeros((), device=self.device)
        return Meters(zeros, zeros.clone(), zero, zero.long(), zeros.bool())

    def _no_roles(self) -> Roles:
        return {
            name: torch.zeros(1, dtype=torch.int64, device=self.device) for name in self.denoiser.modalities
        }

    def advance(self, batches: Iterator[Batch], stop_at: int) -> dict[str, float]:
        """Train until samples_seen reaches stop_at (or the run's end) and return the report of what was
        done."""
        self._keep_up()
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
        _, roles = self.tasks.draw(batch, self.config.seed)
        cells = self.denoiser.size[0] * self.denoiser.size[1]
        counts = self._global(self.objective.counts(roles, cells))
        rate = learning_rate(self.config.train, self.progress.samples_seen, self.progress.total_samples)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._backward(batch, roles, counts)
        grad_norm = clip_gradients(self.denoiser, self.config.train.clip_norm)
        self.optimizer.step()
        self.progress.samples_seen += self.config.train.global_batch
        self.progress.steps += 1
        self.ema.update(self.denoiser, self.config.train.global_batch, self.progress.samples_seen)
        self._measure(sums, counts, grad_norm)

    def _backward(self, batch: Batch, roles: Roles, counts: Terms) -> Terms:
        """Add the gradients of all micro-batches; return this worker's sums."""
        size = self.config.train.micro_batch or len(batch)
        starts = range(0, len(batch), size)
        totals: Terms = {}
        for start in starts:
            part = batch.rows(start, start + size)
            part_roles = {name: role[start : start + size] for name, role in roles.items()}
            with without_sync(self.model, start != starts[-1]):
                sums = self.model(part, part_roles)
                # Workers' gradients are averaged, but counts are global: the factor makes it a sum.
                (self.objective.total(sums, counts) * world()[1]).backward()
            for key, value in sums.items():
                totals[key] = totals.get(key, 0) + value.detach().double()
        return totals

    def sums(self, model: Denoiser, batch: Batch, roles: Roles) -> Terms:
        """Return a model's loss terms of a micro-batch: draw t and noise, go forward, predict."""
        seed, steps = self.config.seed, self.denoiser.process.schedule.steps
        low, high = (round(time * steps) for time in self.config.train.times)
        drawn = rng.uniform(seed, "time", batch.visits, batch.ids, 1)[:, 0]
        t = (low + (drawn * max(1, high - low)).floor() + 1).clamp(max=high) / steps
        noise = rng.normal(
            seed, "noise", batch.visits, batch.ids, (self.denoiser.process.channels, *self.denoiser.size)
        )
        codes, conditions = model.encode(batch.data), model.conditions(batch.data)
        z_t = self.denoiser.process.marginal(codes, roles, t).sample(noise)
        seen = self._cut_out(z_t, batch)
        if self.config.train.channels_last:
            seen = seen.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            prediction = model(seen, t, roles, codes, conditions)
        objective = dataclasses.replace(self.objective, modalities=dict(model.modalities.items()))
        return objective.sums(z_t, t, roles, codes, batch.data, prediction.codes, prediction.heads)

    def _cut_out(self, z_t: Tensor, batch: Batch) -> Tensor:
        """Return what the model sees of z_t: in half of the rows, with `train.cutout`, not what is in the
        hole."""
        name = self.config.train.cutout
        if name is None:
            return z_t
        drawn = rng.uniform(self.config.seed, "cutout", batch.visits, batch.ids, 1)[:, 0]
        cut = (drawn < 0.5) & batch.present[name]
        visible = self.denoiser.modalities[name].visible(batch.data[name])
        return torch.where((cut[:, None, None] & ~visible)[:, None], 0, z_t)

    def autocast(self) -> torch.autocast:
        """Return the context of the configured precision."""
        enabled = self.config.train.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _global(self, counts: Terms) -> Terms:
        """Return counts added over workers, in one message."""
        values = add_over_workers(torch.stack([counts[key] for key in self.terms]))
        return dict(zip(self.terms, values.unbind(), strict=True))

    def _measure(self, sums: Terms, counts: Terms, grad_norm: Tensor) -> None:
        meters = self.meters
        values = torch.stack([sums[key] for key in self.terms])
        bad_terms = ~torch.isfinite(values)
        bad = bad_terms.any() | ~torch.isfinite(grad_norm)
        first = bad & (meters.bad_step == 0)
        meters.bad_step = torch.where(first, self.progress.steps, meters.bad_step)
        meters.bad_terms = torch.where(first, bad_terms, meters.bad_terms)
        meters.sums += values
        meters.counts += torch.stack([counts[key] for key in self.terms])
        meters.grad_norm += grad_norm.detach()
        meters.steps += 1

    def report(self) -> dict[str, float]:
        """Return the mean of every measured thing since the last report, the same on all workers, and start
        anew.

        Raises TrainingError on every worker alike if a loss term or gradient was not finite.
        """
        meters, self.meters = self.meters, self._new_meters()
        if not meters.steps:
            return {}
        self._check_finite(meters)
        sums = add_over_workers(meters.sums)
        means = (sums / meters.counts.clamp_min(1)).tolist()
        elapsed = time.perf_counter() - meters.started
        samples = meters.steps * self.config.train.global_batch
        losses = {f"loss/{key}": mean for key, mean in zip(self.terms, means, strict=True)}
        total = self.objective.total(
            dict(zip(self.terms, sums, strict=True)), dict(zip(self.terms, meters.counts, strict=True))
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
        """Return the loss terms of the averaged model on held-out rows, the same on all workers.

        batches: this worker's share, as many as every worker has (`batch.share`). Draws depend on the rows
        alone, so losses can be compared over time.
        """
        sums = torch.zeros(len(self.terms), device=self.device, dtype=torch.float64)
        counts = torch.zeros_like(sums)
        for batch in batches:
            batch = batch.to(self.device)
            _, roles = self.tasks.draw(batch, self.config.seed)
            cells = self.denoiser.size[0] * self.denoiser.size[1]
            part, count = self.average(batch, roles), self.objective.counts(roles, cells)
            sums += torch.stack([part[key] for key in self.terms])
            counts += torch.stack([count[key] for key in self.terms])
        both = add_over_workers(torch.stack([sums, counts]))
        sums, counts = both.unbind()
        if not float(counts.sum()):
            return {}
        terms = dict(zip(self.terms, sums, strict=True))
        total = self.objective.total(terms, dict(zip(self.terms, counts, strict=True)))
        means = (sums / counts.clamp_min(1)).tolist()
        return {
            "val/loss/total": float(total),
            **{f"val/loss/{key}": mean for key, mean in zip(self.terms, means, strict=True)},
        }

    def averaged(self) -> Denoiser | None:
        """Return the averaged model, whole, on the first worker, None on the others. All call it together."""
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
        """Measure the speed; where `train.max_minutes` is set, end the run at what fits into it."""
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
