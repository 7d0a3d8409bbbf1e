"""The exact bound: L0 to L3 in nats per element of every modality, under its named likelihood."""

from collections import defaultdict

import torch
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.diffusion import rng
from mmdiff_ray.diffusion.objective import Objective, last_step_nats, posterior_nats
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, Codes, Prediction, Roles
from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.evaluation.statistics import Tally
from mmdiff_ray.registry import register

Rows = defaultdict[str, Tensor]
"""`term/instance` -> a number for every row, (n,) float64 on the CPU."""
TIMES_PER_ROW = 8
"""Steps drawn for every row; L1 is a sum over T - 1 of them, estimated from these."""


@register("evaluator", "bound")
@torch.no_grad()
def evaluate_bound(context: Context) -> Findings:
    """Measure the bound on -log p of all modalities together, L0 + L1 + L2 + L3, each in nats per element.

    L1 draws t evenly over steps 2 .. T and is unbiased; its parts (noise, S_t, cross) stand beside it. L2
    decodes at the same random t, which keeps the sum a bound. L3 is taken at step 1 of every row.
    """
    totals, counts = (_zeros(len(context.batch)) for _ in range(2))
    for start, part in context.parts():
        for turn in range(TIMES_PER_ROW + 1):
            _add(context, start, part, turn, totals, counts)
    figures = []
    for term, name in sorted(key.split("/") for key in totals):
        tally = Tally(totals[f"{term}/{name}"].numpy(), counts[f"{term}/{name}"].numpy())
        if tally.denominator.any():
            figures.append(
                Figure.of(f"{name}/{term}_nats", "lower", {"model": tally}, context.ids(), bound=True)
            )
    return Findings(figures)


def _zeros(rows: int) -> Rows:
    return defaultdict(lambda: torch.zeros(rows, dtype=torch.float64))


def _add(context: Context, start: int, part: Batch, turn: int, totals: Rows, counts: Rows) -> None:
    """Add one look at a chunk: turn 0 at the last step (L0, L3), the others at a random one (L1, L2).

    start: the number of its first row.
    """
    denoiser, steps = context.denoiser, context.denoiser.process.schedule.steps
    objective = Objective(denoiser.process, context.config.loss, dict(denoiser.modalities.items()))
    visits, seed = turn + (TIMES_PER_ROW + 1) * part.visits, context.config.seed
    k = torch.ones(len(part), dtype=torch.float64, device=part.ids.device)
    if turn:
        k = 2 + (rng.uniform(seed, "bound time", visits, part.ids, 1)[:, 0] * (steps - 1)).floor()
    roles, codes, t = _all_generated(context, part), denoiser.encode(part.data), k / steps
    noise = rng.normal(seed, "bound noise", visits, part.ids, (denoiser.process.channels, *denoiser.size))
    z_t = denoiser.process.marginal(codes, roles, t).sample(noise)
    prediction = denoiser(z_t, t, roles, codes, denoiser.conditions(part.data))
    per_element = objective.row_counts(roles, denoiser.size[0] * denoiser.size[1])
    look, rows = _random_step if turn else _last_step, slice(start, start + len(part))
    for key, value in look(objective, part, t, roles, codes, prediction).items():
        term, name = key.split("/")
        totals[key][rows] += value.double().cpu()
        counts[key][rows] += per_element[f"{term.split('_')[0]}/{name}"].cpu()


def _last_step(
    objective: Objective, part: Batch, t: Tensor, roles: Roles, codes: Codes, prediction: Prediction
) -> dict[str, Tensor]:
    """Return L0 and L3 of every row, (B,)."""
    anchor = objective.process.anchor
    nats = last_step_nats(
        objective.process, objective.modalities[anchor], t, part.data[anchor], prediction.codes[anchor]
    )
    return {
        **objective.prior_nats(codes, roles),
        f"l3/{anchor}": nats * (roles[anchor] == GENERATED),
    }


def _random_step(
    objective: Objective, part: Batch, t: Tensor, roles: Roles, codes: Codes, prediction: Prediction
) -> dict[str, Tensor]:
    """Return L1, its parts, and L2 of every row, (B,)."""
    steps = objective.process.schedule.steps
    parts = posterior_nats(objective.process, t, t - 1 / steps, roles, codes, prediction.codes)
    found = {}
    for name in objective.owners:
        found[f"l1/{name}"] = parts[name]["total"] * (steps - 1)
        for piece in ("eps", "s", "cross"):
            found[f"l1_{piece}/{name}"] = parts[name][piece] * (steps - 1)
    for name in objective.decoded:
        nats = objective.modalities[name].negative_log_likelihood(prediction.heads[name], part.data[name])
        found[f"l2/{name}"] = nats * (roles[name] == GENERATED)
    return found


def _all_generated(context: Context, part: Batch) -> dict[str, Tensor]:
    """Return roles that generate everything a row has and some task generates."""
    return {
        name: torch.where(part.present[name] & part.real & (name in context.generated), GENERATED, ABSENT)
        for name in context.denoiser.modalities
    }
