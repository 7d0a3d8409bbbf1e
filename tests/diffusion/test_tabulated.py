"""A process read from a table is the process itself."""

import pytest
import torch

from tests.diffusion.rows import ALL_ROLES, STEPS, Rows, make_config, make_objective


@pytest.mark.parametrize("place", ["own", "pixels"])
def test_a_tabulated_process_is_the_same_on_its_grid(place):
    """Every time of the grid, every role: weights and channels to the last bit, posteriors to rounding."""
    objective = make_objective(make_config(place))
    process, table = objective.process, objective.process.tabulated(torch.device("cpu"))
    rows = Rows(objective, ALL_ROLES * (STEPS + 1))
    t = (torch.arange(len(rows.t)) // len(ALL_ROLES)).double() / STEPS
    for first, second in zip(
        (process.betas(t, rows.roles), process.generated_betas(t, rows.roles)),
        (table.betas(t, rows.roles), table.generated_betas(t, rows.roles)),
        strict=True,
    ):
        assert all(torch.equal(first[name], second[name]) for name in process.layout)
    assert torch.equal(process.generated_channels(rows.roles), table.generated_channels(rows.roles))
    later, s = t.clamp_min(1 / STEPS), (t - 1 / STEPS).clamp_min(0)
    for one, other in zip(
        process.posterior(rows.z_t, rows.codes, rows.roles, later, s),
        table.posterior(rows.z_t, rows.codes, rows.roles, later, s),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
