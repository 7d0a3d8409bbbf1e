"""The forward process of several modalities in one space, and its closed forms.

    S_t = sum_i w_t^(i) E_i(x_i)
    transition  q(z_t | z_{t-1}, X) = N( sqrt(a_t) (z_{t-1} + S_t),  (1 - a_t) I )
    marginal    q(z_t | z_0, X)     = N( sqrt(abar_t) z_0 + B_t,     (1 - abar_t) I )
                B_t = sum_i b_t^(i) E_i(x_i)

Source: MT-Diffusion (ICLR 2024), forward process; roles as choices of b are our own. Every modality is one
signal beta_k(t) c_k. If generated, the anchor's beta is sqrt(abar), and that of the others is their profile.
If given, beta is the constant kappa; if absent, 0.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mmdiff_ray.diffusion.constants import constant
from mmdiff_ray.diffusion.schedule import Schedule
from mmdiff_ray.diffusion.weights import Profile

ABSENT, GIVEN, GENERATED = 0, 1, 2

Roles = Mapping[str, Tensor]
"""instance -> (B,) int64: ABSENT, GIVEN or GENERATED."""
Codes = Mapping[str, Tensor]
"""instance -> (B, c, H, W): its code in its own channels."""


class Gaussian(NamedTuple):
    """A Gaussian with independent dimensions. mean: (B, C, H, W); std: (B,)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std * noise."""
        return self.mean + over_cells(self.std, self.mean) * noise


class Prediction(NamedTuple):
    """The prediction of a denoiser from z_t.

    codes: instance -> E[c | z_t], (B, c, H, W) float32, for samplers and posterior. heads: instance -> output
    of the decoder head, for the likelihood.
    """

    codes: dict[str, Tensor]
    heads: dict[str, Tensor]


class Step(NamedTuple):
    """The coefficients of one step from s to t > s. a, k, var: (B,); w: instance -> (B,).

    a: a_t of the step; w: its step weights; k: the factor of the noise's error in the posterior mean;
    var: the posterior variance.
    """

    a: Tensor
    w: dict[str, Tensor]
    k: Tensor
    var: Tensor


@dataclass(frozen=True)
class Process:
    """The forward process.

    profiles: instance -> b(t) when generated (the anchor's entry is not used). kappas: instance -> constant
    weight when given. layout: instance -> its channels. channels: C of the diffusion space.
    """

    schedule: Schedule
    profiles: Mapping[str, Profile]
    kappas: Mapping[str, float]
    layout: Mapping[str, slice]
    anchor: str
    channels: int

    def betas(self, t: Tensor, roles: Roles) -> dict[str, Tensor]:
        """Return every instance's signal weight at times t, instance -> (B,) in the dtype of t."""
        return {name: self._beta(name, t, role) for name, role in roles.items()}

    def generated_betas(self, t: Tensor, roles: Roles) -> dict[str, Tensor]:
        """Return instance -> signal weight if generated, else 0, (B,)."""
        return self.betas(t, self.only(roles, GENERATED))

    def _beta(self, name: str, t: Tensor, role: Tensor) -> Tensor:
        """Return one instance's signal weight; at t = 0 only the anchor is there (b_0 = 0), unless given."""
        if name == self.anchor:
            generated = self.schedule.abar(t).sqrt()
        else:
            generated = torch.where(t > 0, self.profiles[name](t), torch.zeros_like(t))
        kappa = torch.full_like(t, self.kappas[name])
        return torch.where(
            role == GENERATED, generated, torch.where(role == GIVEN, kappa, torch.zeros_like(t))
        )

    def place(self, codes: Codes, weights: Mapping[str, Tensor]) -> Tensor:
        """Return sum_i weights_i codes_i in the diffusion space, (B, C, H, W), float32 or more.

        weights: instance -> (B,). Raises ValueError for a code of the wrong shape.
        """
        return place(codes, weights, self.layout, self.channels)

    def marginal(self, codes: Codes, roles: Roles, t: Tensor) -> Gaussian:
        """Return q(z_t | z_0, X), the noisy code at times t.

        codes: instance -> (B, c, H, W), the anchor's being z_0; t: (B,) in [0, 1]. Raises ValueError for a
        code of the wrong shape. Source: MT-Diffusion (ICLR 2024), marginal of the forward process.
        """
        return Gaussian(self.place(codes, self.betas(t, roles)), self.schedule.sigma(t))

    def step(self, t: Tensor, s: Tensor, roles: Roles) -> Step:
        """Return the coefficients of the step from s to t, 0 <= s < t <= 1, all (B,).

        Source: MT-Diffusion (ICLR 2024), posterior; w from b as in `weights`, on the grid (s, t).
        """
        log_a = self.schedule.log_abar(t) - self.schedule.log_abar(s)
        a, one_minus_a = log_a.exp(), -torch.expm1(log_a)
        above, below = self.betas(t, roles), self.betas(s, roles)
        # All modalities enter with w_1 = b_1 / sqrt(a_1), given or not: b_0 = 0 for all but the anchor.
        w = {
            name: above[name] / a.sqrt()
            - torch.where((s > 0) | ((roles[name] == GENERATED) & (name == self.anchor)), below[name], 0)
            for name in roles
        }
        sigma_t, sigma_s = self.schedule.sigma(t), self.schedule.sigma(s)
        return Step(a, w, one_minus_a / (sigma_t * a.sqrt()), one_minus_a * (sigma_s / sigma_t).square())

    def transition(self, z_s: Tensor, codes: Codes, roles: Roles, t: Tensor, s: Tensor) -> Gaussian:
        """Return q(z_t | z_s, X) of the step from s to t."""
        step = self.step(t, s, roles)
        mean = over_cells(step.a.sqrt(), z_s) * (z_s + self.place(codes, step.w))
        return Gaussian(mean, (1 - step.a).clamp_min(0).sqrt())

    def noise(self, z_t: Tensor, codes: Codes, roles: Roles, t: Tensor) -> Tensor:
        """Return eps, the noise in z_t if these are its codes, (B, C, H, W)."""
        mean, std = self.marginal(codes, roles, t)
        return (z_t - mean) / over_cells(std, z_t)

    def posterior(self, z_t: Tensor, codes: Codes, roles: Roles, t: Tensor, s: Tensor) -> Gaussian:
        """Return q(z_s | z_t, z_0, X) of the step from s to t; with expected codes, the model's p(z_s | z_t).

        Source: MT-Diffusion (ICLR 2024), mean of the posterior: (z_t - k' eps) / sqrt(a) - S_t.
        """
        step = self.step(t, s, roles)
        eps = self.noise(z_t, codes, roles, t)
        mean = z_t / over_cells(step.a.sqrt(), z_t) - over_cells(step.k, z_t) * eps
        return Gaussian(mean - self.place(codes, step.w), step.var.sqrt())

    def generated_channels(self, roles: Roles) -> Tensor:
        """Return which channels have a generated modality, bool (B, C)."""
        return generated_channels(roles, self.layout, self.channels)

    def generated_power(self, betas: Mapping[str, Tensor]) -> Tensor:
        """Return sum beta_k^2 in every channel, (B, C) float32. betas: instance -> (B,)."""
        squares = torch.stack(list(betas.values()), dim=1).double().square()
        return (squares @ _members(_spans(betas, self.layout), self.channels, squares.device)).float()

    def only(self, roles: Roles, role: int) -> dict[str, Tensor]:
        """Keep one role; make all instances with other roles absent."""
        return {name: torch.where(value == role, value, ABSENT) for name, value in roles.items()}

    def tabulated(self, device: torch.device) -> "TabulatedProcess":
        """Return an equal process for times on the schedule's grid only, with 1/5 of the operations."""
        times = torch.arange(self.schedule.steps + 1, dtype=torch.float64) / self.schedule.steps
        names = tuple(self.layout)
        roles = [torch.full(times.shape, role) for role in (ABSENT, GIVEN, GENERATED)]
        betas = [torch.stack([self._beta(name, times, role) for role in roles], dim=1) for name in names]
        log_abar = self.schedule.log_abar(times).to(device)
        steps = self.schedule.steps
        return TabulatedProcess(
            schedule=Schedule(lambda t: log_abar[(t * steps).round().long()], steps),
            profiles=self.profiles,
            kappas=self.kappas,
            layout=self.layout,
            anchor=self.anchor,
            channels=self.channels,
            names=names,
            table=torch.stack(betas, dim=1).to(device),  # (T + 1, I, roles)
        )

    def prior_nats(self, name: str) -> float:
        """Return L0 of one generated instance, in nats per dimension: KL(q(z_T) || N(0, I)).

        Assumes a code of unit RMS.
        """
        end = torch.ones(1, dtype=torch.float64)
        beta = self._beta(name, end, torch.full((1,), GENERATED))
        variance = -torch.expm1(self.schedule.log_abar(end))
        return float(0.5 * (beta.square() + variance - 1 - variance.log()))


@dataclass(frozen=True)
class TabulatedProcess(Process):
    """A forward process read from a table; every time must be a k / T of the schedule's grid, or 0.

    names: the instances in the table's order. table: (T + 1, I, 3), the signal weight in every role, float64.
    """

    names: tuple[str, ...]
    table: Tensor

    def betas(self, t: Tensor, roles: Roles) -> dict[str, Tensor]:
        """Return every instance's signal weight at times t, instance -> (B,) float64."""
        found = self._at(t).gather(2, self._roles(roles)[..., None])[..., 0]  # (B, I)
        return dict(zip(self.names, found.unbind(1), strict=True))

    def generated_betas(self, t: Tensor, roles: Roles) -> dict[str, Tensor]:
        """Return instance -> signal weight if generated, else 0, (B,)."""
        found = self._at(t)[..., GENERATED] * (self._roles(roles) == GENERATED)  # (B, I)
        return dict(zip(self.names, found.unbind(1), strict=True))

    def _at(self, t: Tensor) -> Tensor:
        """Look up the table at times t, (B, I, 3)."""
        return self.table[(t * self.schedule.steps).round().long()]

    def _roles(self, roles: Roles) -> Tensor:
        """Return the roles in the table's order, (B, I)."""
        return torch.stack([roles[name] for name in self.names], dim=1)


def place(codes: Codes, weights: Mapping[str, Tensor], layout: Mapping[str, slice], channels: int) -> Tensor:
    """Return sum_i weights_i codes_i in the diffusion space (`Process.place`)."""
    first = next(iter(codes.values()))
    for name, code in codes.items():
        width = layout[name].stop - layout[name].start
        if code.shape[1] != width or code.shape[2:] != first.shape[2:]:
            raise ValueError(f"code of {name}: got {tuple(code.shape)}, want {width} channels")
    order = sorted(codes, key=lambda name: layout[name].start)
    dtype = torch.promote_types(first.dtype, torch.float32)
    if any(layout[one].stop > layout[other].start for one, other in pairwise(order)):  # shared channels
        total = first.new_zeros(len(first), channels, *first.shape[2:], dtype=dtype)
        for name, code in codes.items():
            total[:, layout[name]] += over_cells(weights[name], total) * code
        return total
    parts, at = [], 0
    for name in order:
        if layout[name].start > at:
            parts.append(first.new_zeros(len(first), layout[name].start - at, *first.shape[2:]))
        parts.append(codes[name])
        at = layout[name].stop
    if at < channels:
        parts.append(first.new_zeros(len(first), channels - at, *first.shape[2:]))
    scales = torch.stack([weights[name] for name in order], dim=1).to(dtype)
    scales = scales.index_select(1, _owners(_spans(order, layout), channels, first.device))  # (B, C)
    return torch.cat(parts, dim=1) * scales[:, :, None, None]


def generated_channels(roles: Roles, layout: Mapping[str, slice], channels: int) -> Tensor:
    """Return which channels have a generated modality, bool (B, C)."""
    generated = torch.stack(list(roles.values()), dim=1) == GENERATED
    return generated.double() @ _members(_spans(roles, layout), channels, generated.device) > 0


def _spans(names: Iterable[str], layout: Mapping[str, slice]) -> tuple[tuple[int, int], ...]:
    return tuple((layout[name].start, layout[name].stop) for name in names)


@constant
def _members(spans: tuple[tuple[int, int], ...], channels: int, device: torch.device) -> Tensor:
    """Return the membership matrix: 1 if a span contains a channel, else 0, (spans, C) float64."""
    found = torch.zeros(len(spans), channels, dtype=torch.float64)
    for row, (start, stop) in zip(found, spans, strict=True):
        row[start:stop] = 1
    return found.to(device)


@constant
def _owners(spans: tuple[tuple[int, int], ...], channels: int, device: torch.device) -> Tensor:
    """Return the index of the span that contains each channel, 0 if none does, (C,) int64."""
    return _members(spans, channels, torch.device("cpu")).argmax(0).to(device)


def over_cells(value: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) so that it broadcasts over `like`, (B, C, H, W), in its dtype."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
