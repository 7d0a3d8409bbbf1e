"""Two processes train as one does, and agree on what happens."""

from typing import Any

import pytest
import torch

from mmdiff_ray.config import CheckpointConfig, ConfigError, TrainConfig
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.training.checkpoint import CheckpointStore, complete, restore
from mmdiff_ray.training.loss import TrainingLoss
from mmdiff_ray.training.parallel import choose_device, parallelize, same_everywhere, world
from tests import sprites as tiny
from tests.modalities import tiny as modalities
from tests.training import two_workers

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def jobs(sprites) -> dict[str, Any]:
    return {"plain": tiny.job(sprites), "micro": tiny.job(sprites, "train.micro_batch=4")}


@pytest.fixture(scope="module")
def alone(jobs, tmp_path_factory):
    """Return what one process saw, the weights at its end, and the folder in which its checkpoint lies."""
    folder, job = tmp_path_factory.mktemp("workers"), jobs["plain"]
    trainer, batches = tiny.trainer(job), tiny.batches(job)
    steps = [trainer.advance(batches, seen) for seen in range(16, 81, 16)]
    validation = trainer.validate(tiny.held_out(job))
    store = CheckpointStore(folder / "one", CheckpointConfig())
    store.save(trainer, {})
    store.wait()
    trainer.advance(batches, 160)
    return {"steps": steps, "validation": validation, "end": tiny.weights(trainer.denoiser), "folder": folder}


@pytest.fixture(scope="module")
def seen(jobs, alone) -> Seen:
    """Return what each of two processes saw."""
    torch.multiprocessing.spawn(two_workers.work, (jobs, alone["folder"]), nprocs=2)
    return [torch.load(alone["folder"] / f"{rank}.pt") for rank in (0, 1)]


def losses(report: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in report.items() if "loss/" in key or key == "train/grad_norm"}


@pytest.mark.slow
def test_values_are_added_compared_and_shared(seen: Seen):
    for rank in (0, 1):
        assert seen[rank]["reduced"] == [[3.0, 9.0], [2.0, 5.0], [1.0 + rank, 5.0 - rank], 10.0]


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["plain", "micro"])
def test_losses_of_two_processes_are_those_of_one_whole_or_in_micro_batches(seen: Seen, alone, cut):
    for one, first, second in zip(alone["steps"], *(s[cut]["steps"] for s in seen), strict=True):
        assert losses(first) == losses(second)
        assert losses(first) == pytest.approx(losses(one), rel=1e-5, abs=1e-9)


@pytest.mark.slow
def test_weights_of_two_processes_are_the_same_bit_for_bit(seen: Seen):
    assert tiny.same(seen[0]["plain"]["weights"], seen[1]["plain"]["weights"])


@pytest.mark.slow
def test_held_out_losses_of_two_processes_are_those_of_one(seen: Seen, alone):
    assert seen[0]["plain"]["validation"] == seen[1]["plain"]["validation"]
    assert seen[0]["plain"]["validation"] == pytest.approx(alone["validation"], rel=1e-5)


@pytest.mark.slow
def test_instance_that_no_row_has_keeps_its_gradients_in_step(seen: Seen):
    assert losses(seen[0]["lacking"]) == losses(seen[1]["lacking"])
    assert seen[0]["lacking"]["loss/l2/factors"] == 0.0
    assert seen[0]["lacking"]["loss/l2/shape"] > 0.0


@pytest.mark.slow
def test_checkpoint_of_one_process_goes_on_in_two(seen: Seen, alone):
    assert tiny.same(seen[0]["went_on"], seen[1]["went_on"])
    for name, value in alone["end"].items():
        torch.testing.assert_close(seen[0]["went_on"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_checkpoint_of_two_processes_goes_on_in_one(seen: Seen, alone, jobs):
    trainer = tiny.trainer(jobs["plain"])
    restore(trainer, complete(alone["folder"] / "two")[-1])
    assert tiny.same(tiny.weights(trainer.denoiser), seen[0]["saved"])
    trainer.advance(tiny.batches(jobs["plain"], trainer.progress.steps), 160)
    for name, value in alone["end"].items():
        torch.testing.assert_close(trainer.denoiser.get_parameter(name).detach(), value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_asking_for_a_checkpoint_while_it_is_written_gets_in_nobodys_way(seen: Seen):
    assert seen[0]["polled"] == seen[1]["polled"] == [7, 8]


@pytest.mark.slow
def test_all_processes_say_alike_what_was_not_finite_in_one_of_them(seen: Seen):
    assert seen[0]["poisoned"] == seen[1]["poisoned"]
    assert "factors" in seen[0]["poisoned"] and "at step 2 (of 4 done)" in seen[0]["poisoned"]


@pytest.mark.slow
def test_request_to_stop_that_reaches_one_process_stops_both(seen: Seen, alone):
    assert seen[0]["stopped"] == seen[1]["stopped"] == ("stopped", 64)
    assert [int(path.name) for path in complete(alone["folder"] / "stopped")] == [64]


def test_one_process_is_a_world_of_one():
    assert world() == (0, 1) and same_everywhere(2.5) == 2.5
    config = modalities.config()
    loss = TrainingLoss(build_denoiser(config), config)
    assert parallelize(loss, config, torch.device("cpu")) is loss


def test_device_is_the_one_that_was_asked_for():
    assert choose_device(TrainConfig(device="cpu")) == torch.device("cpu")
    assert choose_device(TrainConfig()).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match=r"train.device: .*banana"):
        choose_device(TrainConfig(device="banana"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named_with_the_way_out():
    with pytest.raises(
        ConfigError, match=r"train.device is cuda, but PyTorch finds no GPU; use train.device=cpu"
    ):
        choose_device(TrainConfig(device="cuda"))
