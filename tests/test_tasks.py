"""Which roles are drawn: as often as configured, for what a row has, and the same wherever the row lies."""

import dataclasses

import pytest
import scipy.stats
import torch

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import ConfigError, TaskConfig
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN
from mmdiff_ray.tasks import Tasks

INSTANCES = ["pixels", "alpha", "label", "masked"]


def batch(count: int, visit: int = 0, lacking: dict[str, torch.Tensor] | None = None) -> Batch:
    present = {name: torch.ones(count, dtype=torch.bool) for name in INSTANCES}
    for name, rows in (lacking or {}).items():
        present[name] = ~rows
    return Batch(
        ids=torch.arange(count) * 7_919 + 3,
        visits=torch.full((count,), visit),
        real=torch.ones(count, dtype=torch.bool),
        data={},
        present=present,
    )


def tasks(only_given: tuple[str, ...] = ("masked",), **rows: dict) -> Tasks:
    return Tasks({name: TaskConfig(**row) for name, row in rows.items()}, INSTANCES, set(only_given))


def p_value(observed: torch.Tensor, expected: list[float]) -> float:
    share = torch.tensor(expected, dtype=torch.float64) / sum(expected)
    return float(scipy.stats.chisquare(observed.numpy(), (share * observed.sum()).numpy()).pvalue)


JOINT = {"roles": {"pixels": "generated", "alpha": "generated"}, "drop": 0.0}
READ = {"roles": {"pixels": "given", "alpha": "generated", "label": "generated"}, "drop": 0.0}
RESTORE = {"roles": {"masked": "given", "pixels": "generated"}, "drop": 0.0}


def test_tasks_are_drawn_as_often_as_their_frequencies_say():
    drawn, _ = tasks(
        a={**JOINT, "frequency": 0.5}, b={**READ, "frequency": 0.0}, c={**READ, "frequency": 1.5}, d=RESTORE
    ).draw(batch(20_000), seed=1)
    counts = torch.bincount(drawn, minlength=4)
    assert counts[1] == 0
    assert p_value(counts[[0, 2, 3]], [0.5, 1.5, 1.0]) > 1e-3


def test_roles_are_those_of_the_task_drawn():
    rows = tasks(a=JOINT, b=READ, c=RESTORE)
    drawn, roles = rows.draw(batch(500), seed=0)
    for index, expected in enumerate(
        (
            [GENERATED, GENERATED, ABSENT, ABSENT],
            [GIVEN, GENERATED, GENERATED, ABSENT],
            [GENERATED, ABSENT, ABSENT, GIVEN],
        )
    ):
        chosen = drawn == index
        assert chosen.sum() > 100
        for name, role in zip(INSTANCES, expected, strict=True):
            assert (roles[name][chosen] == role).all()


def test_given_instances_are_dropped_at_their_rate_independently_and_generated_ones_never():
    row = {"roles": {"pixels": "given", "label": "given", "alpha": "generated"}, "drop": 0.3}
    _, roles = tasks(a=row).draw(batch(20_000), seed=2)
    assert (roles["alpha"] == GENERATED).all()
    pixels, label = roles["pixels"] == ABSENT, roles["label"] == ABSENT
    cells = torch.stack([(pixels & label), (pixels & ~label), (~pixels & label), (~pixels & ~label)], 1).sum(
        0
    )
    assert p_value(cells, [0.09, 0.21, 0.21, 0.49]) > 1e-3


def test_dropping_does_not_depend_on_what_a_list_drew():
    row = {"roles": {"pixels": "generated", "alpha": ["given", "absent"]}, "drop": 0.5}
    _, roles = tasks(a=row).draw(batch(20_000), seed=2)
    assert p_value(torch.bincount(roles["alpha"])[:2], [0.75, 0.25]) > 1e-3


def test_every_task_has_its_own_drop_rate():
    rows = tasks(a={**READ, "drop": 0.0}, b={**READ, "drop": 0.9})
    drawn, roles = rows.draw(batch(4_000), seed=0)
    assert (roles["pixels"][drawn == 0] == GIVEN).all()
    assert float((roles["pixels"][drawn == 1] == GIVEN).float().mean()) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(
    "alternatives",
    [
        ["generated", "given"],
        ["generated", "given", "absent"],
        ["generated"] * 3 + ["given"] * 2 + ["absent"],
    ],
)
def test_roles_of_a_list_are_drawn_evenly(alternatives):
    row = {"roles": {"pixels": "generated", "alpha": alternatives}, "drop": 0.0}
    _, roles = tasks(a=row).draw(batch(20_000), seed=3)
    expected = [alternatives.count(role) for role in ("absent", "given", "generated")]
    kept = [index for index, count in enumerate(expected) if count]
    counts = torch.bincount(roles["alpha"], minlength=3)[kept]
    assert p_value(counts, [expected[index] for index in kept]) > 1e-3


def test_lists_of_several_instances_are_drawn_independently():
    row = {"roles": {"pixels": "generated", "alpha": ["given", "absent"], "label": ["given", "absent"]}}
    _, roles = tasks(a={**row, "drop": 0.0}).draw(batch(20_000), seed=4)
    both = torch.bincount((roles["alpha"] == GIVEN).long() * 2 + (roles["label"] == GIVEN).long())
    assert p_value(both, [1, 1, 1, 1]) > 1e-3


def test_something_is_always_generated_and_no_instance_is_preferred():
    three = {name: ["generated", "given", "absent"] for name in ("pixels", "alpha", "label")}
    _, roles = tasks(a={"roles": three, "drop": 0.5}).draw(batch(30_000), seed=5)
    generated = torch.stack([roles[name] == GENERATED for name in three], 1)
    assert generated.any(1).all()
    # One third each by the lists, and a third of the (2/3)^3 of the rows in which they generate nothing.
    share = generated.double().mean(0)
    torch.testing.assert_close(share, torch.full((3,), 1 / 3 + (2 / 3) ** 3 / 3).double(), atol=0.01, rtol=0)


def test_what_a_row_lacks_is_absent_and_tasks_that_would_generate_nothing_are_not_drawn():
    lacks = torch.arange(9_000) % 3 == 0
    rows = tasks(a={**READ, "frequency": 3.0}, b=RESTORE, c=JOINT)
    drawn, roles = rows.draw(batch(9_000, lacking={"alpha": lacks, "label": lacks}), seed=6)
    assert (roles["alpha"][lacks] == ABSENT).all()
    assert (drawn[lacks] != 0).all() and (roles["pixels"][lacks] == GENERATED).all()
    assert (
        p_value(torch.bincount(drawn[lacks], minlength=3)[1:], [1, 1]) > 1e-3
    )  # the others keep their ratio
    assert p_value(torch.bincount(drawn[~lacks], minlength=3), [3, 1, 1]) > 1e-3


def test_where_no_task_can_generate_every_role_is_absent():
    lacks = torch.arange(10) < 5
    _, roles = tasks(a=READ).draw(batch(10, lacking={"alpha": lacks, "label": lacks}), seed=0)
    for role in roles.values():
        assert (role[lacks] == ABSENT).all()
    assert (roles["pixels"][~lacks] == GIVEN).all()


def test_padding_has_no_role():
    padded = dataclasses.replace(batch(100), real=torch.arange(100) < 60)
    _, roles = tasks(a=JOINT, b=READ, c=RESTORE).draw(padded, seed=0)
    generated = torch.stack([role == GENERATED for role in roles.values()], 1).any(1)
    assert generated[:60].all()
    assert all((role[60:] == ABSENT).all() for role in roles.values())


def test_roles_depend_on_seed_visit_and_row_alone_and_not_on_the_batch():
    rows = tasks(a={**JOINT, "drop": 0.5}, b={**READ, "drop": 0.5}, c=RESTORE)
    whole = batch(200)
    drawn, roles = rows.draw(whole, seed=8)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled = whole._map(lambda tensor: tensor[order])
    again, other_roles = rows.draw(shuffled, seed=8)
    assert torch.equal(again, drawn[order])
    part, part_roles = rows.draw(whole.rows(50, 60), seed=8)
    assert torch.equal(part, drawn[50:60])
    for name in INSTANCES:
        assert torch.equal(other_roles[name], roles[name][order])
        assert torch.equal(part_roles[name], roles[name][50:60])
    for other in (rows.draw(batch(200, visit=1), seed=8)[0], rows.draw(whole, seed=9)[0]):
        assert not torch.equal(other, drawn)


def test_a_named_tasks_roles_are_not_drawn():
    rows = tasks(a={"roles": {"pixels": ["given", "generated"], "alpha": "generated"}, "drop": 0.9})
    lacks = torch.arange(6) < 2
    roles = rows.roles("a", batch(6, lacking={"alpha": lacks}))
    assert (roles["pixels"] == GIVEN).all()
    assert torch.equal(roles["alpha"] == GENERATED, ~lacks) and torch.equal(roles["alpha"] == ABSENT, lacks)
    with pytest.raises(ConfigError, match="tasks: unknown 'b'; known: a"):
        rows.roles("b", batch(6))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"a": {"roles": {"masked": "generated", "pixels": "generated"}}},
            r"tasks\.a\.roles\.masked: .*never",
        ),
        (
            {"a": {"roles": {"masked": ["given", "generated"], "pixels": "generated"}}},
            r"tasks\.a\.roles\.masked",
        ),
        ({"a": {"roles": {"pixels": ["generated"] * 4}}}, r"tasks\.a\.roles\.pixels: got 4 alternatives"),
        ({"a": {"roles": {"pixels": "generated", "alpha": []}}}, r"tasks\.a\.roles\.alpha: got 0"),
        ({"a": {**JOINT, "frequency": 0.0}}, "tasks: every frequency is 0"),
    ],
)
def test_rows_of_roles_that_cannot_be_are_refused(rows, message):
    with pytest.raises(ConfigError, match=message):
        tasks(**rows)


def test_only_the_share_of_a_task_that_says_so_trains_in_one_pass():
    rows = tasks(a={**JOINT, "one_pass": 0.3}, b=READ)
    whole = batch(20_000)
    drawn, _ = rows.draw(whole, seed=1)
    found = rows.draw_one_pass(drawn, whole, seed=1)
    assert not found[drawn == 1].any()
    assert p_value(torch.stack([found[drawn == 0].sum(), (~found[drawn == 0]).sum()]), [0.3, 0.7]) > 0.001
    assert torch.equal(found[50:60], rows.draw_one_pass(drawn[50:60], whole.rows(50, 60), seed=1))
    assert tasks(a=JOINT, b=READ).draw_one_pass(drawn, whole, seed=1) is None
