"""RePaint with the ideal denoiser of four points: what is visible stays, and the rest comes to fit it."""

import torch

from mmdiff_ray.diffusion.process import GIVEN
from mmdiff_ray.diffusion.repaint import repaint
from tests.diffusion.ideal import OWN, IdealDenoiser, four_points, make_process, roles_of

DATA, ROWS = four_points(), 2000


def fill(repeats: int, visible: list[bool], given: str | None = None):
    """Return the true point of every row, and what RePaint makes of the visible cells of its image.

    given: an instance that is given, besides.
    """
    process = make_process(OWN)
    ideal = IdealDenoiser(process, DATA)
    generator = torch.Generator().manual_seed(0)
    point = torch.arange(ROWS) % 4
    told = {given: DATA.codes[given][point]} if given else {}
    drawn, z = repaint(
        process,
        lambda z, t, roles: ideal(z, t, roles, told, {}),
        lambda purpose: torch.randn(ROWS, 3, 1, 2, generator=generator),
        roles_of(ROWS, **dict.fromkeys(told, GIVEN)),
        DATA.codes["pixels"][point],
        torch.tensor(visible).expand(ROWS, 1, 2),
        steps=30,
        repeats=repeats,
        given=told,
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


def test_what_is_given_is_followed_and_what_is_visible_is_kept():
    """The label leaves some points; of these, those come in their shares."""
    point, codes, _ = fill(1, [False, False], given="label")
    found = DATA.point_of(codes)
    for index in range(4):
        rows = point == index
        law = DATA.law(label=int(DATA.alike("label")[index]))
        shares = torch.bincount(found[rows], minlength=5)[:4] / rows.sum()
        assert (shares - law).abs().max() < 0.1
    alone = (fill(4, [True, False])[1]["pixels"] - DATA.codes["pixels"][point]).abs().amax((1, 2, 3)) < 0.1
    point, codes, _ = fill(4, [True, False], given="label")
    assert torch.equal(codes["pixels"][..., 0], DATA.codes["pixels"][point][..., 0])
    right = (codes["pixels"] - DATA.codes["pixels"][point]).abs().amax((1, 2, 3)) < 0.1
    assert right.float().mean() > alone.float().mean()
