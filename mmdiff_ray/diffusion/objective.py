"""The loss: four sub-losses as terms (sum, count) per modality instance.

    L0  KL( q(z_T | X) || p(z_T) )            L2  sum over generated i of -log p( x_i | z_t ), the decoders
    L1  sum over t >= 2 of the posteriors' KL  L3  -log p( z_0 | z_1 ), the last step

Source: MT-Diffusion (ICLR 2024) for the four sub-losses; the definition of an element and the split over
instances are ours. Sums and counts are added over workers and micro-batches before division, because a mean
of per-worker means is not the global mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmdiff_ray.config import LossConfig
from mmdiff_ray.diffusion.constants import constant
from mmdiff_ray.diffusion.process import GENERATED, Codes, Process, Roles, over_cells

Terms = dict[str, Tensor]
"""`term/instance` (`l1/pixels`) -> a scalar: a sum, or a count."""


@dataclass(frozen=True)
class Objective:
    """The loss of a configuration.

    modalities: instance -> its likelihood (`Modality`).
    """

    process: Process
    config: LossConfig
    modalities: Mapping[str, Any]

    def __post_init__(self) -> None:
        _ = self.owners, self.decoded  # torch.compile cannot trace the lock of cached_property

    @cached_property
    def owners(self) -> dict[str, slice]:
        """Return instance -> channels whose L1 counts as this instance's loss.

        Of instances that share channels, the widest owns all of them, the anchor first; the others own none.
        """
        owned: dict[str, slice] = {}
        for name, where in sorted(
            self.process.layout.items(),
            key=lambda item: (item[1].start - item[1].stop, item[0] != self.process.anchor),
        ):
            if not any(where.start < other.stop and where.stop > other.start for other in owned.values()):
                owned[name] = where
        return owned

    def counts(
        self,
        roles: Roles,
        present_cells: int,
        known: Tensor | None = None,
        void: Mapping[str, Tensor] | None = None,
    ) -> Terms:
        """Return the count of every term in a batch, before any forward pass (`row_counts`)."""
        counts = self.row_counts(roles, present_cells, known, void)
        return dict(zip(counts, torch.stack(list(counts.values())).sum(1).unbind(), strict=True))

    def row_counts(
        self,
        roles: Roles,
        present_cells: int,
        known: Tensor | None = None,
        void: Mapping[str, Tensor] | None = None,
    ) -> Terms:
        """Return the count of every term in every row, (B,) float64.

        present_cells: H * W. known: cells of a generated anchor that are not predicted, bool (B, H, W); L1
        and L3 ignore them. void: instance -> cells with unknown data, bool (B, H, W); L1 and L2 ignore them.
        """
        owned = self._by_owner(self.process.generated_channels(roles).double()) * present_cells  # (B, owners)
        counts: Terms = {}
        for name, cells in zip(self.owners, owned.unbind(1), strict=True):
            counts[f"l0/{name}"] = counts[f"l1/{name}"] = cells
        anchor = self.process.anchor
        generated = (torch.stack(list(roles.values()), dim=1) == GENERATED).double()
        rows = dict(zip(roles, generated.unbind(1), strict=True))
        for term, name in (*(("l2", name) for name in self.decoded), ("l3", anchor)):
            counts[f"{term}/{name}"] = rows[name] * self.modalities[name].elements
        if known is not None:
            predicted = 1 - known.flatten(1).double().mean(1)
            counts[f"l1/{anchor}"] = counts[f"l1/{anchor}"] * predicted
            counts[f"l3/{anchor}"] = counts[f"l3/{anchor}"] * predicted
        for name, cells in (void or {}).items():
            share = 1 - cells.flatten(1).double().mean(1)
            for key in (f"l1/{name}", f"l2/{name}"):
                if key in counts:
                    counts[key] = counts[key] * share
        return counts

    def row_sums(
        self,
        z_t: Tensor,
        t: Tensor,
        roles: Roles,
        codes: Codes,
        data: Mapping[str, Tensor],
        predicted: Codes,
        heads: Mapping[str, Tensor],
        known: Tensor | None = None,
        void: Mapping[str, Tensor] | None = None,
        weighted_only: bool = False,
    ) -> Terms:
        """Return every term of every row, (B,); t must lie on the schedule's grid.

        predicted: instance -> E[c | z_t]; heads: instance -> the head's prediction; known, void: as in
        `row_counts`; in known cells, the predicted z_0 is replaced by the true one. weighted_only: skip L0
        and L2 if their coefficient is 0. Simplified weightings average over all steps and report the last one
        as L3; `elbo` estimates the exact terms.
        """
        last = t <= 1.5 / self.process.schedule.steps
        sums: Terms = {}
        if not weighted_only or self.config.coefficients.l0:
            sums = self.prior_nats(codes, roles)
        for name, cells in (void or {}).items():  # no error where the truth is unknown
            codes = {**codes, name: torch.where(cells[:, None], predicted[name].to(codes[name]), codes[name])}
        per_row = self._posterior(z_t, t, roles, codes, predicted)
        for name, value in per_row.items():
            sums[f"l1/{name}"] = torch.where(last, 0, value)
        for name in self.decoded:
            if weighted_only and not self.coefficient(f"l2/{name}"):
                continue
            nats = self.modalities[name].negative_log_likelihood(heads[name], data[name])
            sums[f"l2/{name}"] = nats * (roles[name] == GENERATED)
        anchor = self.process.anchor
        sums[f"l3/{anchor}"] = self._last_step(t, roles, data, predicted, per_row, last, known)
        return sums

    def total(self, sums: Terms, counts: Mapping[str, Tensor | float]) -> Tensor:
        """Return the loss: the sum over terms of coefficient x mean; 0, with a gradient, for a count of 0."""
        values, found = torch.stack(list(sums.values())), [counts[key] for key in sums]
        weights = tuple(self.coefficient(key) for key in sums)
        tensors = [count for count in found if isinstance(count, Tensor)]
        if len(tensors) == len(found):
            divided = values / torch.stack(tensors).clamp_min(1).to(values)
            return (divided * _constants(weights, values.device, values.dtype)).sum()
        scales = tuple(w / max(float(count), 1.0) for w, count in zip(weights, found, strict=True))
        return (values * _constants(scales, values.device, values.dtype)).sum()

    def coefficient(self, key: str) -> float:
        """Return the coefficient of a term, `term/instance`."""
        term, name = key.split("/")
        own = {"l1": self.config.channels, "l2": self.config.modalities}.get(term, {})
        return getattr(self.config.coefficients, term) * own.get(name, 1.0)

    @cached_property
    def decoded(self) -> list[str]:
        """Return the instances of L2: all that can be generated, except the anchor, which L3 decodes."""
        return [
            name for name, m in self.modalities.items() if name != self.process.anchor and not m.only_given
        ]

    def prior_sums(self, codes: Codes, roles: Roles) -> Terms:
        """Return L0 summed over a batch."""
        return {key: nats.sum() for key, nats in self.prior_nats(codes, roles).items()}

    def prior_nats(self, codes: Codes, roles: Roles) -> Terms:
        """Return L0 of every row, (B,): 1/2 (mean^2 + var - 1 - log var) of z_T.

        Excludes given modalities, because the prior knows them.
        """
        end = torch.ones(len(next(iter(roles.values()))), dtype=torch.float64, device=_device(codes))
        mean = self.process.place(codes, self.process.generated_betas(end, roles))
        variance = over_cells(self.process.schedule.sigma(end).square(), mean)
        nats = 0.5 * (mean.square() + variance - 1 - variance.log())
        nats = nats * self.process.generated_channels(roles)[:, :, None, None]
        rows = self._by_owner(nats.sum((2, 3)))  # (B, owners)
        return {f"l0/{name}": row for name, row in zip(self.owners, rows.unbind(1), strict=True)}

    def _by_owner(self, channels: Tensor) -> Tensor:
        """Sum (B, C) over the channels of every owner; returns (B, owners)."""
        return torch.stack([channels[:, where].sum(1) for where in self.owners.values()], dim=1)

    def _posterior(
        self, z_t: Tensor, t: Tensor, roles: Roles, codes: Codes, predicted: Codes
    ) -> dict[str, Tensor]:
        """Return L1 of every owner, (B,), summed over the cells of its channels with a generated modality."""
        if self.config.weighting == "elbo":
            before = (t - 1 / self.process.schedule.steps).clamp_min(0)
            parts = posterior_nats(self.process, t, before, roles, codes, predicted)
            rows = {name: part["total"] * self.process.schedule.steps for name, part in parts.items()}
            return {name: rows[name] for name in self.owners}
        betas = self.process.generated_betas(t, roles)
        power = self.process.generated_power(betas)
        difference = self.process.place(
            _errors(codes, predicted), betas
        )  # (B, C, H, W): sum beta_k (c_k - c^_k)
        noise = self.process.schedule.sigma(t).square().float()[:, None]
        weight = self._weight(power / noise)
        head_only = torch.ones(self.process.channels, dtype=torch.bool, device=weight.device)
        head_only[self.process.layout[self.process.anchor]] = False
        weight = torch.where(head_only, weight.clamp(max=self.config.channel_cap), weight)
        weight = torch.where(power > 0, weight / power.clamp_min(1e-20), 0)
        squares = self._by_owner(difference.square().sum((2, 3)) * weight)  # (B, owners)
        return dict(zip(self.owners, squares.unbind(1), strict=True))

    def _weight(self, snr: Tensor) -> Tensor:
        """Return the weight of the squared code error at a signal-to-noise ratio.

        In terms of z_0: eps has snr, v has snr + 1, x0 has 1, min-SNR has min(snr, gamma) (Hang et al.,
        2023).
        """
        return {
            "eps": lambda: snr,
            "v": lambda: snr + 1,
            "x0": lambda: torch.ones_like(snr),
            "min_snr": lambda: snr.clamp(max=self.config.gamma),
        }[self.config.weighting]()

    def _last_step(
        self,
        t: Tensor,
        roles: Roles,
        data: Mapping[str, Tensor],
        predicted: Codes,
        per_row: Mapping[str, Tensor],
        last: Tensor,
        known: Tensor | None,
    ) -> Tensor:
        """Return L3 of every row, 0 but at the last step, (B,): exact under `elbo`, else simplified."""
        anchor = self.process.anchor
        rows = last & (roles[anchor] == GENERATED)
        if self.config.weighting != "elbo":
            return torch.where(rows, per_row[anchor], 0)
        nats = last_step_nats(
            self.process, self.modalities[anchor], t, data[anchor], predicted[anchor], known
        )
        return torch.where(rows, nats * self.process.schedule.steps, 0)


@constant
def _constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers as a tensor on a device; cached, so they are copied once."""
    return torch.tensor(values, dtype=dtype, device=device)


def last_step_nats(
    process: Process, anchor: Any, t: Tensor, data: Tensor, predicted: Tensor, known: Tensor | None = None
) -> Tensor:
    """Return L3 of every row in nats, (B,): the data under the anchor's likelihood around E[z_0 | z_1].

    The standard deviation is fixed, not learned: sigma_1, that of z_0 given z_1 under a unit-variance prior.
    known: cells to ignore, bool (B, H, W).
    """
    std = over_cells(process.schedule.sigma(t), predicted)
    return anchor.code_negative_log_likelihood(predicted, std, data, known)


def posterior_nats(
    process: Process, t: Tensor, s: Tensor, roles: Roles, codes: Codes, predicted: Codes
) -> dict[str, dict[str, Tensor]]:
    """Return KL( q(z_s | z_t, z_0, X) || p(z_s | z_t) ) per instance with channels, in nats per row, (B,).

    1 / (2 var) || k (eps - eps^) + (S - S^) ||^2 as one norm, with its parts: total = eps + s + cross. Rows
    at the last step (var 0) give 0. Source: MT-Diffusion (ICLR 2024), L1.
    """
    generated = process.only(roles, GENERATED)
    step, errors = process.step(t, s, generated), _errors(codes, predicted)
    betas, sigma = process.betas(t, generated), process.schedule.sigma(t)
    scale = torch.where(step.var > 1e-12, 0.5 / step.var.clamp_min(1e-12), 0)
    eps = process.place(errors, {name: -step.k * betas[name] / sigma for name in errors})
    shift = process.place(errors, {name: step.w[name] for name in errors})
    parts = {
        "eps": eps.square(),
        "s": shift.square(),
        "cross": 2 * eps * shift,
        "total": (eps + shift).square(),
    }
    carried = process.generated_channels(roles)[:, :, None, None] * over_cells(scale, eps)
    return {
        name: {part: (value * carried)[:, where].sum((1, 2, 3)) for part, value in parts.items()}
        for name, where in process.layout.items()
    }


def _errors(codes: Codes, predicted: Codes) -> dict[str, Tensor]:
    """Return c - c^ of every predicted instance, (B, c, H, W) float32."""
    return {name: codes[name] - value for name, value in predicted.items() if name in codes}


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next(iter(tensors.values())).device
