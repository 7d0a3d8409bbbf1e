"""Inpainting by replacement with resampling. Works with models that were not trained on masked images.

Source: RePaint (Lugmayr et al., CVPR 2022), for the anchor's channels; other instances are sampled at the
same time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmdiff_ray.diffusion.process import GIVEN, Codes, Prediction, Process, Roles
from mmdiff_ray.diffusion.samplers import Predict, known_codes


def repaint(
    process: Process,
    predict: Predict,
    noise: Callable[[str], Tensor],
    roles: Roles,
    known: Tensor,
    visible: Tensor,
    steps: int,
    repeats: int,
    given: Codes | None = None,
) -> tuple[Prediction, Tensor]:
    """Sample data whose visible cells equal the known ones; return the same as `walk`.

    known: the anchor's code, (B, c, H, W), arbitrary in cells that are not visible. visible: bool (B, H, W).
    given: codes of given instances. repeats: how often to take each step, with a step back up in between, so
    that visible and generated cells become consistent. Costs about steps x repeats predictions.

    After every step, visible cells are replaced by the known code with fresh noise. In the returned anchor
    code, visible cells equal the known code exactly.
    """
    anchor = process.anchor
    cells, where = visible[:, None], process.layout[anchor]
    given = given or {}
    z = noise("prior")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=z.device)[:, None].expand(-1, len(z))
    if given:
        z = z + process.place(given, process.betas(times[0], process.only(roles, GIVEN)))
    for index in range(steps - 1):
        t, s = times[index], times[index + 1]
        for repeat in range(repeats):
            codes = known_codes(predict(z, t, roles).codes, given, roles)
            z_s = process.posterior(z, codes, roles, t, s).sample(noise(f"step {index}.{repeat}"))
            seen = process.marginal({**codes, anchor: known}, roles, s)
            kept = seen.sample(noise(f"known {index}.{repeat}"))[:, where]
            z_s[:, where] = torch.where(cells, kept, z_s[:, where])
            if repeat + 1 < repeats:
                z_s = process.transition(z_s, codes, roles, t, s).sample(noise(f"back {index}.{repeat}"))
            z = z_s
    last = predict(z, times[steps - 1], roles)
    codes = {**known_codes(last.codes, given, roles), anchor: torch.where(cells, known, last.codes[anchor])}
    return Prediction(codes, last.heads), z
