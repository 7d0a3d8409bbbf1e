"""One GPU: compiled, data-parallel training in bfloat16, its checkpoint and samples; images per second.

It runs on a machine without ray, mlflow, omegaconf and lpips, too (`benchmarks/gpu/run.sh` does).
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmdiff_ray.config import CheckpointConfig
from mmdiff_ray.runs.job import Job, prepare
from mmdiff_ray.sampling.generator import Generator
from mmdiff_ray.training.checkpoint import CheckpointStore, complete, restore
from mmdiff_ray.training.parallel import is_sharded
from mmdiff_ray.training.trainer import Trainer
from tests import sprites as tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]
ROWS, STEPS = 256, 20
PLAIN = {**tiny.PLAIN, "evaluate": {"evaluators": []}}
FAST = {"precision": "bfloat16", "compile": True, "global_batch": ROWS, "samples": 1_000_000}


def fast_job(data: str, strategy: str = "ddp") -> Job:
    """Return the job of a U-Net that is worth a GPU."""
    plain = {
        **PLAIN,
        "space": {"height": 16, "width": 16},
        "model": {"backbone": "unet", "preset": "tiny"},
        "train": {**PLAIN["train"], **FAST},
        "workers": {"strategy": strategy},
    }
    return prepare(tiny.config(data, plain=plain), Path("unused"))


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of one, as a single worker with a GPU has."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_gpu_trains_compiled_in_bfloat16_and_data_parallel(sprites, one_process, tmp_path, capsys):
    job = fast_job(sprites)
    device = torch.device("cuda", 0)
    trainer = Trainer(job.config, job.denoiser(), device)
    trainer.model = DistributedDataParallel(trainer.model, device_ids=[0], broadcast_buffers=False)
    batches = itertools.cycle([batch.to(device) for batch in itertools.islice(tiny.batches(job), 4)])
    first = trainer.advance(batches, 3 * ROWS)  # compiles
    torch.cuda.synchronize()
    begun = time.perf_counter()
    last = trainer.advance(batches, (3 + STEPS) * ROWS)
    torch.cuda.synchronize()
    rate = STEPS * ROWS / (time.perf_counter() - begun)
    with capsys.disabled():
        name = torch.cuda.get_device_name(0)
        print(f"\n{name}: {rate:,.0f} images/s (16 x 16, unet tiny, {ROWS} rows a step)")
    assert 0 < last["loss/total"] < first["loss/total"]

    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    store.save(trainer, {})
    store.wait()
    again = Trainer(job.config, job.denoiser(), device)
    restore(again, complete(tmp_path / "checkpoints")[0])
    assert tiny.same(tiny.weights(again.denoiser), tiny.weights(trainer.denoiser))
    drawn = Generator(job.config, trainer.ema.model).draw({}, 4, steps=4)
    assert drawn.data["pixels"].device.type == "cuda" and drawn.data["pixels"].shape == (4, 3, 16, 16)


def test_gpu_trains_a_shared_model_to_the_losses_of_a_whole_one(sprites, one_process, tmp_path):
    """All of fsdp but a second worker: blocks compiled each for itself, gathered and scattered by nccl."""
    device = torch.device("cuda", 0)
    last = {}
    for strategy in ("ddp", "fsdp"):
        job = fast_job(sprites, strategy)
        trainer = Trainer(job.config, job.denoiser(), device)
        last[strategy] = trainer.advance(tiny.batches(job), 5 * ROWS)["loss/total"]
    assert is_sharded(trainer.denoiser) and last["fsdp"] == pytest.approx(last["ddp"], rel=2e-2)
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    store.save(trainer, {})
    store.wait()
    whole = Trainer(fast_job(sprites).config, job.denoiser(), device)
    restore(whole, complete(tmp_path / "checkpoints")[0])
    assert tiny.same(tiny.weights(whole.ema.model), tiny.weights(trainer.averaged()))
    drawn = Generator(job.config, trainer.averaged()).draw({}, 4, steps=4)
    assert drawn.data["pixels"].device.type == "cuda"


def test_gpu_gives_the_losses_of_the_cpu(sprites):
    job = prepare(tiny.config(sprites, plain=PLAIN), Path("unused"))
    reports = []
    for device in ("cpu", "cuda"):
        trainer = Trainer(job.config, job.denoiser(), torch.device(device))
        reports.append(trainer.advance(tiny.batches(job), 16))
    losses = [{key: value for key, value in report.items() if "loss/" in key} for report in reports]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-4)
