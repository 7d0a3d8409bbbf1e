"""The figures of the parts, with their targets."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.figures import Figure

STEP_RATIO = 1.05
UTILISATION = 0.5
LARGEST = "dit_xlarge"


def speed_figures(found: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures of the speed part. found: `MODEL-MODE` -> what `speed.py` wrote, and `ceiling`."""
    peak = found.get("ceiling", {}).get("flops_per_s")
    if peak is not None:
        yield Figure("matrix product, bfloat16, TFLOP/s", peak / 1e12)
        yield Figure("copy, TB/s read and written", found["ceiling"]["bytes_per_s"] / 1e12)
    for entry in found.values():
        for mode, measured in entry.get("modes", {}).items():
            name = f"{entry['model']} (batch {entry['batch']}), {mode}"
            if "failed" in measured:
                yield Figure(f"{name}: step, ms", None, note=measured["failed"])
                continue
            yield from _step_figures(name, entry["model"], mode, measured, peak)


def _step_figures(
    name: str, model: str, mode: str, measured: Mapping[str, Any], peak: float | None
) -> Iterator[Figure]:
    ours, bare = measured["ours"], measured["bare"]
    limit = None if mode == "eager" else STEP_RATIO
    note = f"busy {100 * ours['busy_share']:.0f} %, spread {100 * ours['spread']:.0f} %"
    yield Figure(f"{name}: step, ms", 1e3 * ours["step_s"], 1e3 * bare["step_s"], limit, note=note)
    yield Figure(f"{name}: images/s", ours["images_per_s"], bare["images_per_s"], lower=False)
    yield Figure(f"{name}: kernels per step", ours["kernels"], bare["kernels"])
    if ours["peak_memory_bytes"] is not None:
        yield Figure(
            f"{name}: peak memory, GB", ours["peak_memory_bytes"] / 1e9, bare["peak_memory_bytes"] / 1e9
        )
    if peak is not None:
        wanted = UTILISATION if model == LARGEST and mode != "eager" else None
        yield Figure(
            f"{name}: TFLOP/s against the matrix product",
            ours["flops_per_s"] / 1e12,
            peak / 1e12,
            wanted,
            lower=False,
            note=f"bare loop {100 * bare['flops_per_s'] / peak:.0f} %",
        )


def science_figures(found: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield samples, speed and validation loss of every cell. found: what `science.collect` returns."""
    for name, curve in found["curves"].items():
        table, last = name.split("-")[0], curve[-1]
        samples = found["samples"].get(table)
        at = next((row for row in curve if row["samples"] == samples), last)
        loss = at.get("val/loss/total")
        note = f"{last['samples'] / last['seconds']:.0f} samples/s with start, {last['samples']:,} in all"
        yield Figure(f"{name}: validation loss at {at['samples']:,} samples", loss, note=note)
