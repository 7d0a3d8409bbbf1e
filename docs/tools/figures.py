"""Draw the figures of the page on concepts with the package's own process: `python docs/tools/figures.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.config import WeightsConfig, from_plain
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN, Process
from mmdiff_ray.diffusion.schedule import make_schedule
from mmdiff_ray.diffusion.weights import make_profile, w_from_b
from mmdiff_ray.models.denoiser import build_modalities, build_process
from mmdiff_ray.models.input_path import InputPath
from mmdiff_ray.plotting import panels

FIGURES = Path(__file__).parents[1] / "figures"
CONFIG = from_plain(
    {
        "space": {"height": 32, "width": 32},
        "modalities": {
            "pixels": {"type": "image"},
            "mask": {"type": "mask", "classes": 2, "weights": {"scale": 1}},
            "label": {"type": "label", "classes": 4},
        },
        "tasks": {"joint": {"roles": {name: "generated" for name in ("pixels", "mask", "label")}}},
    }
)
MODALITIES = build_modalities(CONFIG)
PROCESS: Process = build_process(CONFIG, MODALITIES)
COLORS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#862e9c", "#868e96")


def main() -> None:
    """Write all figures to docs/figures."""
    for name, figure in (("forward", forward()), ("weights", weights()), ("input_paths", input_paths())):
        figure.savefig(FIGURES / f"{name}.png", dpi=144, facecolor="white")


def forward() -> Any:
    """Return what z_t holds over time of an image, and of a mask in each of its roles."""
    y, x = np.mgrid[0:32, 0:32] / 31
    disc = (x - 0.55) ** 2 + (y - 0.45) ** 2 < 0.1
    colors = np.stack([0.25 + 0.4 * x, 0.4 + 0.3 * y, 0.75 - 0.4 * x], axis=-1)
    colors[disc] = (0.93, 0.45, 0.15)
    pixels = torch.from_numpy(colors).permute(2, 0, 1)[None].float() * 4 - 2
    codes = {"pixels": pixels, "mask": torch.from_numpy(disc)[None, None].float() * 2 - 1}
    rows = [
        ("image\n(anchor)", "pixels", GENERATED, "√ᾱ$_t$ z$_0$"),
        ("mask,\ngenerated", "mask", GENERATED, "b$_t$ E(x)"),
        ("mask,\ngiven", "mask", GIVEN, "κ E(x)"),
        ("mask,\nabsent", "mask", ABSENT, "0"),
    ]
    times = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    figure, axes = panels(len(rows) * len(times), len(times), (1.25, 1.3))
    noise = torch.randn(1, PROCESS.channels, 32, 32, generator=torch.Generator().manual_seed(0))
    for index, panel in enumerate(axes):
        title, name, role, signal = rows[index // len(times)]
        t = torch.full((1,), times[index % len(times)], dtype=torch.float64)
        roles = {one: torch.full((1,), role if one == name else GENERATED) for one in codes}
        z_t = PROCESS.marginal(codes, roles, t).sample(noise)[0, PROCESS.layout[name]]
        panel.imshow(picture(z_t), interpolation="nearest", cmap="gray", vmin=0, vmax=1)
        panel.grid(False)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        if index < len(times):
            panel.set_title(f"t = {times[index]:g}", fontsize=10)
        if index % len(times) == 0:
            panel.set_ylabel(f"{title}\n{signal}", rotation=0, ha="right", va="center", fontsize=10)
    return figure


def picture(code: Tensor) -> np.ndarray:
    """Return a code (c, H, W) as a picture, (H, W, 3) or, of one channel, (H, W)."""
    shown = (code / 4 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    return shown if shown.shape[-1] == 3 else shown[..., 0]


def weights() -> Any:
    """Return profiles b(t), their step weights w_t, and the signal-to-noise ratios that they mean."""
    schedule = make_schedule(CONFIG.schedule, modalities=2)
    shown = [
        ("clock, shape 1: with the image", WeightsConfig()),
        ("clock, shape 0.3: before it", WeightsConfig(shape=0.3)),
        ("clock, shape 3: after it", WeightsConfig(shape=3)),
        ("clock, shape 1, scale 0.1: quieter", WeightsConfig(scale=0.1)),
        ("linear", WeightsConfig(family="linear")),
    ]
    figure, (left, middle, right) = panels(3, 3, (3.7, 3.2))
    t, grid = torch.linspace(0.002, 0.998, 400, dtype=torch.float64), schedule.grid()
    a = schedule.log_abar(torch.cat([grid.new_zeros(1), grid])).diff().exp()
    for (title, config), color in zip(shown, COLORS, strict=True):
        b = make_profile("mask", config, schedule)
        left.plot(t, b(t), color=color, label=title)
        middle.plot(grid, w_from_b(b(grid), a), color=color)
        right.plot(t, (b(t) / schedule.sigma(t)) ** 2, color=color)
    left.set(title="profile b$_t$(i)", xlabel="t")
    middle.set(title="step weights w$_t$(i), T = 1000", xlabel="t")
    middle.set_yscale("symlog", linthresh=1e-3)
    middle.set_yticks([-1e-2, -1e-3, 0, 1e-3, 1e-2, 1])
    right.set(title="signal to noise, b$_t^2$ / σ$_t^2$", xlabel="t", yscale="log", ylim=(1e-6, 1e4))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def input_paths() -> Any:
    """Return what every input channel holds under each `given.input`, where a mask is given.

    It asks the package: the network's input is computed for values that tell its parts apart.
    """
    one, noisy, no_given, code = torch.ones(1), 1.0, 2.0, 5.0
    kinds = {
        noisy: ("z$_t$: noise and codes", "#a5b4fc"),
        no_given: ("u$_t$: z$_t$ without given codes", "#c7d2fe"),
        code: ("the given code, clean", "#fdba74"),
        0.0: ("0", "#f1f3f5"),
    }
    roles = {name: (one * (GIVEN if name == "mask" else GENERATED)).long() for name in MODALITIES}
    given = {"mask": torch.full((1, 1, 1, 1), code)}
    space = torch.ones(1, PROCESS.channels, 1, 1)
    figure, (axes,) = panels(1, 1, (8.2, 2.9))
    for row, name in enumerate(("in_place", "u_plus_code", "z_plus_code", "z_only")):
        path = InputPath.of(name, MODALITIES, PROCESS, exact=True, zero_unused=False)
        seen = path.network_input(space * noisy, space * no_given, roles, given, given).flatten().tolist()
        for channel, value in enumerate(seen):
            axes.barh(row, 0.94, left=channel, height=0.7, color=kinds[value][1], edgecolor="#868e96")
    for name, where in PROCESS.layout.items():
        axes.text((where.start + where.stop) / 2 - 0.03, -0.62, name, ha="center", fontsize=9)
    axes.text(1.5 * PROCESS.channels + 3, -0.62, "condition channels", ha="center", fontsize=9)
    for value, (title, color) in kinds.items():
        axes.barh(0, 0, color=color, edgecolor="#868e96", label=title if value else "nothing (0)")
    axes.set(yticks=range(4), yticklabels=["in_place", "u_plus_code", "z_plus_code", "z_only"], xticks=[])
    axes.set(ylim=(3.5, -0.95), xlabel="channels of the network's input")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
