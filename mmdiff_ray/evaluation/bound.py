"""The exact bound: L0 to L3 in nats per element of every modality, under its named likelihood."""

from collections import defaultdict

import torch
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.diffusion import rng
from mmdiff_ray.diffusion.objective import Objective, last_step_nats, posterior_nats
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, Codes, Prediction, Roles
from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.registry import register

Sums = defaultdict[str, float]
TIMES_PER_ROW = 8
"""Steps drawn for every row; L1 is a sum over T - 1 of them, estimated from these."""


@register("evaluator", "bound")
@torch.no_grad()
def evaluate_bound(context: Context) -> Findings:
    """Measure the bound on -log p of all modalities together, L0 + L1 + L2 + L3, each in nats per element.

    L1 draws t evenly over steps 2 .. T and is unbiased; its parts (noise, S_t, cross) stand beside it. L2
    decodes at the same random t, which keeps the sum a bound. L3 is taken at step 1 of every row.
    """
    totals: Sums = defaultdict(float)
    counts: Sums = defaultdict(float)
    for _, part in context.parts():
        for turn in range(TIMES_PER_ROW + 1):
            _add(context, part, turn, totals, counts)
    figures = [
        Figure(
            f"{name}/{term}_nats", totals[f"{term}/{name}"] / count, "lower", len(context.batch), bound=True
        )
        for term, name in sorted(key.split("/") for key in totals)
        if (count := counts[f"{term}/{name}"])
    ]
    return Findings(figures)


def _add(context: Context, part: Batch, turn: int, totals: Sums, counts: Sums) -> None:
    """Add one look at a chunk: turn 0 at the last step (L0, L3), the others at a random one (L1, L2)."""
    denoiser, steps = context.denoiser, context.denoiser.process.schedule.steps
    objective = Objective(denoiser.process, context.config.loss, dict(denoiser.modalities.items()))
    visits, seed = torch.full_like(part.ids, turn), context.config.seed
    k = torch.ones(len(part), dtype=torch.float64, device=part.ids.device)
    if turn:
        k = 2 + (rng.uniform(seed, "bound time", visits, part.ids, 1)[:, 0] * (steps - 1)).floor()
    roles, codes, t = _all_generated(context, part), denoiser.encode(part.data), k / steps
    noise = rng.normal(seed, "bound noise", visits, part.ids, (denoiser.process.channels, *denoiser.size))
    z_t = denoiser.process.marginal(codes, roles, t).sample(noise)
    prediction = denoiser(z_t, t, roles, codes, denoiser.conditions(part.data))
    per_element = objective.counts(roles, denoiser.size[0] * denoiser.size[1])
    look = _random_step if turn else _last_step
    for key, value in look(objective, part, t, roles, codes, prediction).items():
        totals[key] += float(value)
        term, name = key.split("/")
        counts[key] += float(per_element[f"{term.split('_')[0]}/{name}"])


def _last_step(
    objective: Objective, part: Batch, t: Tensor, roles: Roles, codes: Codes, prediction: Prediction
) -> dict[str, Tensor]:
    anchor = objective.process.anchor
    nats = last_step_nats(
        objective.process, objective.modalities[anchor], t, part.data[anchor], prediction.codes[anchor]
    )
    return {
        **objective.prior_sums(codes, roles),
        f"l3/{anchor}": (nats * (roles[anchor] == GENERATED)).sum(),
    }


def _random_step(
    objective: Objective, part: Batch, t: Tensor, roles: Roles, codes: Codes, prediction: Prediction
) -> dict[str, Tensor]:
    steps = objective.process.schedule.steps
    parts = posterior_nats(objective.process, t, t - 1 / steps, roles, codes, prediction.codes)
    found = {}
    for name in objective.owners:
        found[f"l1/{name}"] = parts[name]["total"].sum() * (steps - 1)
        for piece in ("eps", "s", "cross"):
            found[f"l1_{piece}/{name}"] = parts[name][piece].sum() * (steps - 1)
    for name in objective.decoded:
        nats = objective.modalities[name].negative_log_likelihood(prediction.heads[name], part.data[name])
        found[f"l2/{name}"] = (nats * (roles[name] == GENERATED)).sum()
    return found


def _all_generated(context: Context, part: Batch) -> dict[str, Tensor]:
    """Return roles that generate everything a row has and some task generates."""
    return {
        name: torch.where(part.present[name] & part.real & (name in context.generated), GENERATED, ABSENT)
        for name in context.denoiser.modalities
    }
