"""The exact bound: L0 to L3 in nats per element of every modality, under its named likelihood."""

from collections import defaultdict

import torch
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.diffusion import rng
from mmdiff_ray.diffusion.objective import Objective, last_step_nats, posterior_nats
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, Codes, Prediction, Roles
from mmdiff_ray.evaluation.context import Context, Findings
from mmdiff_ray.evaluation.statistics import Tally
from mmdiff_ray.registry import register

TIMES_PER_ROW = 8
"""Random steps per row for the estimate of L1, which is a sum over T - 1 steps."""


@register("evaluator", "bound")
@torch.no_grad()
def evaluate_bound(context: Context) -> Findings:
    """Measure the bound on -log p of all modalities together, L0 + L1 + L2 + L3, each in nats per element.

    L1 draws t uniformly from steps 2 .. T and is unbiased; its parts (noise, S_t, cross) are also reported.
    L2 decodes at the same random t, so that the sum is still a bound. L3 is evaluated at step 1 of every row.
    """
    denoiser, seed, rows = context.denoiser, context.config.seed, len(context.batch)
    process, size = denoiser.process, denoiser.size
    objective = Objective(process, context.config.loss, dict(denoiser.modalities.items()))
    totals, counts = (
        defaultdict[str, Tensor](lambda: torch.zeros(rows, dtype=torch.float64)) for _ in range(2)
    )  # `term/instance` -> (B,) on the CPU
    for start, part in context.parts():
        chunk = slice(start, start + len(part))
        roles, codes = _all_generated(context, part), denoiser.encode(part.data)
        void = denoiser.void_cells(part.data)
        elements = objective.row_counts(roles, size[0] * size[1], void=void)
        for draw in range(TIMES_PER_ROW + 1):  # 0: the last step (L0, L3); others: a random step (L1, L2)
            visits = draw + (TIMES_PER_ROW + 1) * part.visits
            k = torch.ones(len(part), dtype=torch.float64, device=part.ids.device)
            if draw:
                uniform = rng.uniform(seed, "bound time", visits, part.ids, 1)[:, 0]
                k = 2 + (uniform * (process.schedule.steps - 1)).floor()
            t = k / process.schedule.steps
            noise = rng.normal(seed, "bound noise", visits, part.ids, (process.channels, *size))
            z_t = process.marginal(codes, roles, t).sample(noise)
            prediction = denoiser(z_t, t, roles, codes, denoiser.conditions(part.data))
            truth = dict(codes)
            for name, cells in void.items():  # ignore cells with unknown data
                truth[name] = torch.where(cells[:, None], prediction.codes[name], codes[name])
            terms = (_random_step if draw else _last_step)(objective, part, t, roles, truth, prediction)
            for key, value in terms.items():
                term, name = key.split("/")
                totals[key][chunk] += value.double().cpu()
                counts[key][chunk] += elements[f"{term.split('_')[0]}/{name}"].cpu()
    findings = Findings()
    for term, name in sorted(key.split("/") for key in totals):
        tally = Tally(totals[f"{term}/{name}"].numpy(), counts[f"{term}/{name}"].numpy())
        if tally.denominator.any():
            findings.add(f"{name}/{term}_nats", "lower", {"model": tally}, context.ids(), bound=True)
    return findings


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
    """Return roles that generate every instance that the row has and that a task can generate."""
    return {
        name: torch.where(
            part.present[name] & part.real & (name in context.model.generated), GENERATED, ABSENT
        )
        for name in context.denoiser.modalities
    }
