"""Workers that each hold a part of the model (fsdp) train as those that hold all of it, and as one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmdiff_ray.batch import share
from mmdiff_ray.config import ConfigError
from mmdiff_ray.runs.job import Job, prepare
from tests import sprites as tiny
from tests.training import sharing

pytestmark = pytest.mark.slow
CHANGES = (
    "train.changes=[{at: 48, values: {loss.coefficients.l2: 0.5, modalities.shape.weights.scale: 0.1}}, "
    "{at: 96, values: {train.learning_rate: 0.001}}]"
)
TEXT = (
    "modalities.words={type: text, column: name, length: 8, context_channels: 8}",
    "tasks.joint.roles.words=generated",
    "tasks.prompt.roles.words=given",
)
DIT = {"preset": "nano", "options": {"width": 16, "depth": 2, "embedding_channels": 16, "head_channels": 8}}


@pytest.fixture(scope="module")
def jobs(sprites) -> dict[str, Job]:
    """Return jobs for 1, 2 and 3 workers, which share 4 lanes, with a learned label code and changes on the
    way."""

    def made(*overrides: str, model: dict[str, Any] = tiny.MODEL) -> Job:
        rows = ("data.lanes=4", f"train.global_batch={sharing.BATCH}", f"train.samples={sharing.END}")
        words = (*rows, "modalities.shape.code=learned", CHANGES, *overrides)
        return prepare(tiny.config(sprites, *words, plain={**tiny.PLAIN, "model": model}), Path("unused"))

    fsdp = "workers.strategy=fsdp"
    return {
        "ddp": made(),
        "fsdp": made(fsdp),
        "micro": made(fsdp, "train.micro_batch=4"),
        "dit": made(fsdp, model={**DIT, "backbone": "dit"}),
        "dit_tokens": made(fsdp, model={**DIT, "backbone": "dit_tokens"}),
        "bfloat16": made(fsdp, "train.precision=bfloat16"),
        "text": made(fsdp, *TEXT),
    }


@pytest.fixture(scope="module")
def seen(jobs, tmp_path_factory) -> dict[str, Any]:
    """Return what every run saw: in this process, then in two and three others."""
    folder = tmp_path_factory.mktemp("sharing")
    found = {f"{name} on 1": sharing.trained(jobs[name]) for name in sharing.ALONE}
    found["ddp on 1"] = sharing.trained(jobs["ddp"], folder / "ddp on 1")
    torch.multiprocessing.spawn(sharing.work, (jobs, folder), nprocs=3)
    found |= torch.load(folder / "0.pt")
    for written in sharing.WRITTEN:
        found[f"{written} -> ddp on 1"] = sharing.went_on(jobs["ddp"], folder / written)
    return found


def losses(report: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in report.items() if "loss/" in key or key == "train/grad_norm"}


def assert_same_end(run: dict[str, Any], other: dict[str, Any]) -> None:
    """Fail unless two runs end with the same losses, parameters and averages, but for rounding."""
    assert losses(run["report"]) == pytest.approx(losses(other["report"]), rel=1e-3)
    for kind in ("weights", "averaged"):
        assert run[kind].keys() == other[kind].keys()
        for name, value in other[kind].items():
            torch.testing.assert_close(run[kind][name], value, rtol=1e-3, atol=1e-5, msg=f"{kind} {name}")


@pytest.mark.parametrize(
    "run, alone",
    [
        ("ddp on 2", "ddp on 1"),
        ("fsdp on 2", "ddp on 1"),
        ("fsdp on 3", "ddp on 1"),
        ("micro", "ddp on 1"),
        ("dit", "dit on 1"),
        ("dit_tokens", "dit_tokens on 1"),
        ("text", "text on 1"),
    ],
)
def test_losses_weights_and_averages_are_those_of_one_process(seen, run, alone):
    run, alone = seen[run], seen[alone]
    for one, other in zip(alone["steps"], run["steps"], strict=True):
        assert losses(other) == pytest.approx(losses(one), rel=1e-4, abs=1e-9)
    assert run["validation"] == pytest.approx(alone["validation"], rel=1e-4)
    assert_same_end(run, alone)


def test_bfloat16_is_as_near_as_rounding_allows(seen):
    for one, other in zip(seen["bfloat16 on 1"]["steps"], seen["bfloat16"]["steps"], strict=True):
        assert other["loss/total"] == pytest.approx(one["loss/total"], rel=1e-2)


def test_a_worker_holds_its_share_of_model_average_and_moments(seen):
    assert all(0.45 < part < 0.6 for part in seen["held"].values()), seen["held"]


@pytest.mark.parametrize("written", sharing.WRITTEN)
@pytest.mark.parametrize("loaded", sharing.LOADED)
def test_checkpoint_goes_on_at_any_number_of_workers_by_either_strategy(seen, written, loaded):
    assert_same_end(seen[f"{written} -> {loaded}"], seen["ddp on 1"])


def test_shares_of_batches_are_of_one_length_and_hold_each_row_once(jobs):
    batches = tiny.held_out(jobs["ddp"])
    shares = [share(batches, rank, 2) for rank in (0, 1)]
    assert [len(part) for part in shares] == [2, 2] and len(batches) == 3
    ids = [int(row) for part in shares for batch in part for row in batch.where(batch.real).ids]
    assert sorted(ids) == sorted(int(row) for batch in batches for row in batch.where(batch.real).ids)


def test_parameters_that_cannot_be_shared_out_are_refused(sprites, monkeypatch):
    from mmdiff_ray.models.unet import UNet

    build = UNet.__init__

    def with_scalar(self: Any, *given: Any, **options: Any) -> None:
        build(self, *given, **options)
        self.loudness = nn.Parameter(torch.ones(()))

    monkeypatch.setattr(UNet, "__init__", with_scalar)
    tiny.job(sprites)
    with pytest.raises(ConfigError, match=r"cannot shard scalar parameters \(backbone.loudness\)"):
        tiny.job(sprites, "workers.strategy=fsdp")
