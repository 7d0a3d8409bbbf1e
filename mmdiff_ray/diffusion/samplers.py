"""Samplers: one update from z_t to z_s each, and `walk`, the full loop from noise to data.

With several signals, z_t = sum_k beta_k(t) c_k + sigma_t eps, and c^_k = E[c_k | z_t] (method: our own
extension of DDIM, Song et al., 2021, and of DPM-Solver++, Lu et al., 2022, to several signals with their own
profiles):

    first order    z_s = sum_k beta_k(s) c^_k + sigma_s eps^
    second order   z_s / sigma_s = z_t / sigma_t + sum_k c~_k Delta(beta_k / sigma),
                   c~_k = c^_k + Delta / (2 h) (c^_k - c^_k before),
                   Delta and h in that signal's own beta_k / sigma
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mmdiff_ray.diffusion.process import (
    ABSENT,
    GENERATED,
    GIVEN,
    Codes,
    Prediction,
    Process,
    Roles,
    over_cells,
)
from mmdiff_ray.registry import look_up, register

Predict = Callable[[Tensor, Tensor, Roles], Prediction]
"""(z_t, t, roles) -> prediction."""


class State(NamedTuple):
    """The state of a walk: z at time t, (B,), and the prediction of the previous step (None at the start)."""

    z: Tensor
    t: Tensor
    codes: Codes | None = None
    t_before: Tensor | None = None


Move = Callable[[Process, State, Tensor, Codes, Roles, Callable[[], Tensor]], Tensor]
"""(process, state, s, codes, roles, noise) -> z_s. codes: E[c | z_t] of generated and true codes of given
instances; noise: draws (B, C, H, W) standard normal numbers."""


def walk(
    process: Process,
    predict: Predict,
    noise: Callable[[str], Tensor],
    given: Codes,
    roles: Roles,
    steps: int,
    sampler: str = "ancestral",
) -> tuple[Prediction, Tensor]:
    """Sample from the prior to the data; return the last prediction and the z that it was made from.

    noise: purpose -> (B, C, H, W) standard normal; given: codes of given instances. The prior is N(B_T, I),
    with B_T of the given instances. steps: number of predictions, at times 1, 1 - 1 / steps, ..., 1 / steps.
    Returned codes of given instances equal the given codes.
    """
    move: Move = look_up("sampler", sampler)
    z = noise("prior")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=z.device)[:, None].expand(-1, len(z))
    if given:
        z = z + process.place(given, process.betas(times[0], process.only(roles, GIVEN)))
    state = State(z, times[0])
    for index in range(steps - 1):
        codes = known_codes(predict(state.z, state.t, roles).codes, given, roles)
        s = times[index + 1]
        z = move(process, state, s, codes, roles, partial(noise, f"step {index}"))
        state = State(z, s, codes, state.t)
    last = predict(state.z, state.t, roles)
    return Prediction(known_codes(last.codes, given, roles), last.heads), state.z


def known_codes(predicted: Codes, given: Codes, roles: Roles) -> dict[str, Tensor]:
    """Replace predicted codes by true codes in rows where an instance is given."""
    codes = dict(predicted)
    for name, code in given.items():
        guess = predicted.get(name, torch.zeros_like(code))
        codes[name] = torch.where((roles[name] == GIVEN)[:, None, None, None], code, guess)
    return codes


@register("sampler", "ancestral")
def ancestral(
    process: Process, state: State, s: Tensor, codes: Codes, roles: Roles, noise: Callable[[], Tensor]
) -> Tensor:
    """Draw z_s from the posterior: the reverse chain of the paper."""
    return process.posterior(state.z, codes, roles, state.t, s).sample(noise())


@register("sampler", "ddim")
def ddim(
    process: Process, state: State, s: Tensor, codes: Codes, roles: Roles, noise: Callable[[], Tensor]
) -> Tensor:
    """Move to z_s with the predicted noise kept: deterministic, first order."""
    eps = process.noise(state.z, codes, roles, state.t)
    return process.place(codes, process.betas(s, roles)) + over_cells(process.schedule.sigma(s), eps) * eps


@register("sampler", "dpm2")
def dpm2(
    process: Process, state: State, s: Tensor, codes: Codes, roles: Roles, noise: Callable[[], Tensor]
) -> Tensor:
    """Move to z_s: multistep, second order from the second step on; the step to t = 0 is first order."""
    sigma_t, sigma_s = process.schedule.sigma(state.t), process.schedule.sigma(s)
    now, then = _ratios(process, state.t, roles), _ratios(process, s, roles)
    change = {name: then[name] - now[name] for name in codes}
    total = state.z / over_cells(sigma_t, state.z) + process.place(codes, change)
    if state.codes is not None and state.t_before is not None:
        before = _ratios(process, state.t_before, roles)
        slopes = {name: _half_slope(change[name], now[name] - before[name]) * change[name] for name in codes}
        total = total + process.place({name: codes[name] - state.codes[name] for name in codes}, slopes)
    return over_cells(sigma_s, total) * total


def _ratios(process: Process, t: Tensor, roles: Roles) -> dict[str, Tensor]:
    """Return beta_k / sigma at t, which is the clock of signal k."""
    sigma = process.schedule.sigma(t)
    return {name: beta / sigma for name, beta in process.betas(t, roles).items()}


def _half_slope(change: Tensor, before: Tensor) -> Tensor:
    """Return Delta / (2 h), clamped to 2; 0 if the signal was constant, as in profiles that start late."""
    still = before.abs() < 1e-9
    return torch.where(still, 0, change / torch.where(still, 1, 2 * before)).clamp(-2, 2)


def guided(
    predict: Predict,
    process: Process,
    given: Codes,
    scales: Mapping[str, float],
    expected_codes: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> Predict:
    """Add classifier-free guidance (Ho and Salimans, 2022), for any modality, to a prediction.

    With a given instance i of scale g_i != 1, the heads predict

        h + sum_i (g_i - 1) (h - h with i absent).

    expected_codes: heads' predictions -> E[c | z_t]. Codes are computed from the guided heads: with
    extrapolated logits, they remain a mean of class codes, while extrapolated codes would not. For the
    prediction without i, its code is removed from z_t, which gives z_t the distribution with i absent. Costs
    one more prediction per guided instance.
    """
    pulled = {name: scale for name, scale in scales.items() if scale != 1 and name in given}

    def predict_guided(z: Tensor, t: Tensor, roles: Roles) -> Prediction:
        full = predict(z, t, roles)
        if not pulled:
            return full
        heads = dict(full.heads)
        betas = process.betas(t, process.only(roles, GIVEN))
        for name, scale in pulled.items():
            without = {**roles, name: torch.where(roles[name] == GENERATED, GENERATED, ABSENT)}
            lone = predict(z - process.place({name: given[name]}, betas), t, without)
            for other, value in full.heads.items():
                heads[other] = heads[other] + (scale - 1) * (value - lone.heads[other])
        return Prediction(expected_codes(heads), heads)

    return predict_guided
