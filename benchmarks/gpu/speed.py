"""Part 2: images per second, model FLOP utilisation, peak memory and kernels of a training step.

    python3 -m benchmarks.gpu.speed FOLDER MODE MODEL [MODEL ...] [--tiny]

MODE: ceiling (no model: the matrix product and the copy), plain (eager and compiled) or graphs (compiled,
with CUDA graphs). Processes started together compile together; then each has the GPU for itself in turn.
Results go to FOLDER/speed-MODEL-MODE.json.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bare import BareLoop
from benchmarks.gpu.cells import SPEED
from benchmarks.gpu.shared import device_of, random_batch, read_config, synchronize, turn
from mmdiff_ray.config import Config
from mmdiff_ray.models.cost import forward_flops
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.training.checkpoint import write_json
from mmdiff_ray.training.trainer import Trainer

TURNS, TURN_S, WARM_STEPS = 3, 0.6, 3
AHEAD_S = 0.15
"""How far the host may run ahead of the device."""
PROFILED = 20
"""How many kernels a profile lists."""

Step = Callable[[], None]


class Model:
    """A trainer and its bare loop on one device, with the same parameters."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, device_of(config)
        denoiser = build_denoiser(config)
        batch = random_batch(denoiser, config.train.global_batch, self.device)
        self.flops = 3 * forward_flops(denoiser)
        self.parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        self.trainer = Trainer(config, denoiser, self.device)
        self.bare = BareLoop(self.trainer, config.train.global_batch)
        self.steps: dict[str, Step] = {"ours": lambda: self.trainer.step(batch), "bare": self.bare.step}

    def warm_up(self) -> None:
        """Do a few steps of both; the first compile."""
        for step in self.steps.values():
            for _ in range(WARM_STEPS):
                step()
        synchronize(self.device)

    def measure(self) -> dict[str, Any]:
        """Return the figures of both loops, timed in turns."""
        self.warm_up()
        seconds: dict[str, list[float]] = {name: [] for name in self.steps}
        for _ in range(TURNS):
            for name, step in self.steps.items():
                seconds[name].append(time_step(step, self.device))
        found = {}
        for name, step in self.steps.items():
            step_s = statistics.median(seconds[name])
            rows = self.config.train.global_batch
            found[name] = {
                "step_s": step_s,
                "spread": (max(seconds[name]) - min(seconds[name])) / step_s,
                "images_per_s": rows / step_s,
                "flops_per_s": self.flops * rows / step_s,
                "peak_memory_bytes": peak_memory(step, self.device),
                "profiled": profile_step(step, self.device),
            }
        return found


def time_step(step: Step, device: torch.device) -> float:
    """Return the mean seconds of a step over about `TURN_S` seconds."""
    synchronize(device)
    begun = waited = time.perf_counter()
    count = 0
    while time.perf_counter() - begun < TURN_S or count < 2:
        step()
        count += 1
        if time.perf_counter() - waited > AHEAD_S:
            synchronize(device)
            waited = time.perf_counter()
    synchronize(device)
    return (time.perf_counter() - begun) / count


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Return the most memory in use during a step, in bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def profile_step(step: Step, device: torch.device) -> profile:
    """Return a profile of one step, for `kernels`, which takes seconds that need no GPU."""
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as profiler:
        step()
        synchronize(device)
    return profiler


def kernels(profiler: profile, step_s: float, device: torch.device) -> dict[str, Any]:
    """Return how many kernels (on a CPU: operators) a step starts, and those that take longest.

    busy_share: share of the step's time, step_s, in which kernels run.
    """
    on_gpu = device.type == "cuda"
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == wanted]
    if on_gpu:
        events = [event for event in events if is_kernel(event)]
    else:
        events = [event for event in events if event.name.startswith("aten::")]
    totals: dict[str, list[float]] = {}
    for event in events:
        entry = totals.setdefault(event.name[:120], [0, 0.0])
        entry[0] += 1
        entry[1] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
    longest = sorted(totals.items(), key=lambda item: -item[1][1])[:PROFILED]
    return {
        "kernels": len(events),
        "busy_share": sum(us for _, us in totals.values()) / 1e6 / step_s,
        "profile": [{"name": name, "count": count, "us": round(us)} for name, (count, us) in longest],
    }


def is_kernel(event: Any) -> bool:
    """Return whether an event on the GPU is a kernel: no copy, and no name for a stretch of time."""
    apart = (
        "Memcpy",
        "Memset",
        "Optimizer.",
        "ProfilerStep",
        "## Call",
        "Torch-Compiled",
        "CompiledFunction",
    )
    return not getattr(event, "is_user_annotation", False) and not event.name.startswith(apart)


def compiled_mark(folder: Path, name: str, mode: str) -> Path:
    """Return the file that appears once a model has compiled and waits for its turn."""
    return folder / f"speed-{name}-{mode}.compiled"


def measure_model(folder: Path, name: str, mode: str, tiny: bool) -> dict[str, Any]:
    """Return the figures of a model. A batch that does not fit is halved, at most twice."""
    config = read_config(name, tiny)
    if mode == "graphs":
        import torch._inductor.config as inductor

        inductor.triton.cudagraphs = True  # what torch.compile(mode="reduce-overhead") sets
    model, found = None, dict[str, Any]()
    with turn(folder, alone=False):
        begun = time.perf_counter()
        try:
            model = Model(config)
            model.warm_up()
        except torch.OutOfMemoryError:
            model = None  # several models at once; tried again alone
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"[:500]
            found["graphs" if mode == "graphs" else "compiled"] = {"failed": failed}
        compile_s = time.perf_counter() - begun
        release(config)
    compiled_mark(folder, name, mode).touch()
    with turn(folder, alone=True):
        if model is None:
            model, config = largest_that_fits(config)
        modes = (
            {"graphs": model.measure}
            if mode == "graphs"
            else {"compiled": model.measure, "eager": eager(model)}
        )
        for measured, measure in modes.items():
            if measured in found:
                continue
            try:
                found[measured] = measure()
            except torch.OutOfMemoryError:
                found[measured] = {"failed": "out of memory"}
            release(config)
    for loop in (loop for mode in found.values() if "failed" not in mode for loop in mode.values()):
        loop |= kernels(loop.pop("profiled"), loop["step_s"], model.device)
    return {
        "model": name,
        "batch": config.train.global_batch,
        "parameters": model.parameters,
        "flops_per_image": model.flops,
        "first_steps_s": compile_s,
        "graph_breaks": sum(counters["graph_break"].values()),
        "graphs_compiled": counters["stats"]["unique_graphs"],
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        "modes": found,
    }


def eager(model: Model) -> Callable[[], dict[str, Any]]:
    """Return a measurement of a model with compiled code left aside."""

    def measure() -> dict[str, Any]:
        with torch.compiler.set_stance("force_eager"):
            return model.measure()

    return measure


def largest_that_fits(config: Config) -> tuple[Model, Config]:
    """Return a model whose warm-up fits in memory, with the whole, half or a quarter of the batch."""
    for parts in (1, 2, 4):
        train = dataclasses.replace(config.train, global_batch=config.train.global_batch // parts)
        smaller = dataclasses.replace(config, train=train)
        try:
            model = Model(smaller)
            model.warm_up()
            return model, smaller
        except torch.OutOfMemoryError:
            release(config)
    raise torch.OutOfMemoryError(f"{config.name}: a quarter of the batch does not fit either")


def release(config: Config) -> None:
    """Give cached memory back, for the other processes."""
    if device_of(config).type == "cuda":
        torch.cuda.empty_cache()


def ceiling(tiny: bool) -> dict[str, Any]:
    """Return the FLOP/s of a large bfloat16 matrix product and the bytes/s of a copy, on random data."""
    device = device_of(read_config("dit_base", tiny))
    side, bytes_ = (256, 2**22) if device.type == "cpu" else (8192, 2**32)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.randint(0, 256, (bytes_,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s, copy_s = (
        min(time_step(step, device) for _ in range(3))
        for step in (lambda: a @ b, lambda: target.copy_(source))
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "flops_per_s": 2 * side**3 / product_s, "bytes_per_s": 2 * bytes_ / copy_s}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure models in one mode."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("mode", choices=("ceiling", "plain", "graphs"))
    parser.add_argument("models", nargs="*", help=", ".join(SPEED))
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    if given.tiny:
        global TURNS, TURN_S, WARM_STEPS
        TURNS, TURN_S, WARM_STEPS = 1, 0.05, 1
    if given.mode == "ceiling":
        write_json(given.folder / "speed-ceiling.json", ceiling(given.tiny))
    for name in given.models:
        found = measure_model(given.folder, name, given.mode, given.tiny)
        write_json(given.folder / f"speed-{name}-{given.mode}.json", found)


if __name__ == "__main__":
    main()
