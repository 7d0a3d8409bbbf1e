"""RePaint with the ideal denoiser of four points: what is visible stays, and the rest comes to fit it."""

import torch

from mmdiff_ray.diffusion.repaint import repaint
from tests.diffusion.ideal import OWN, IdealDenoiser, four_points, make_process, roles_of

DATA, ROWS = four_points(), 2000


def fill(repeats: int, visible: list[bool]):
    """Return the true point of every row, and what RePaint makes of the visible cells of its image."""
    process = make_process(OWN)
    ideal = IdealDenoiser(process, DATA)
    generator = torch.Generator().manual_seed(0)
    point = torch.arange(ROWS) % 4
    drawn, z = repaint(
        process,
        lambda z, t, roles: ideal(z, t, roles, {}, {}),
        lambda purpose: torch.randn(ROWS, 3, 1, 2, generator=generator),
        roles_of(ROWS),
        DATA.codes["pixels"][point],
        torch.tensor(visible).expand(ROWS, 1, 2),
        steps=30,
        repeats=repeats,
    )
    return point, drawn.codes, z


def test_the_hole_fits_what_is_visible_and_better_with_repeats():
    """The first cell of each image is its own; replacement alone mixes too little to find all that it
    tells."""
    right = {}
    for repeats in (1, 10):
        point, codes, z = fill(repeats, [True, False])
        assert torch.equal(codes["pixels"][..., 0], DATA.codes["pixels"][point][..., 0])
        assert torch.isfinite(z).all()
        off = (codes["pixels"] - DATA.codes["pixels"][point]).abs().flatten(1).amax(1)
        right[repeats] = float((off < 0.1).float().mean())
    assert right[10] > right[1] + 0.05 > 0.3  # 0.25 by chance


def test_without_a_visible_cell_it_is_the_ancestral_chain():
    _, codes, _ = fill(1, [False, False])
    shares = torch.bincount(DATA.point_of(codes), minlength=5)[:4] / ROWS
    assert (shares - DATA.shares).abs().max() < 0.06
