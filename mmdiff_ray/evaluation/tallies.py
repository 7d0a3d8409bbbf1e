"""The tallies of figures in a file, from which paired intervals are computed later."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmdiff_ray.evaluation.context import Figure
from mmdiff_ray.evaluation.statistics import Tally


def save_tallies(file: Path, figures: Sequence[Figure]) -> None:
    """Write the tallies of figures for `load_tally`; figures of the same rows share one array of ids."""
    arrays: dict[str, np.ndarray] = {}
    names: dict[bytes, str] = {}
    for figure in figures:
        for rule, tally in figure.tallies.items():
            for part in ("numerator", "denominator"):
                arrays[f"{figure.key}|{rule}|{part}"] = getattr(tally, part).astype(np.float32)
        ids = figure.tallies["model"].ids if figure.tallies else None
        if ids is not None:
            name = names.setdefault(ids.tobytes(), f"ids {len(names)}")
            arrays |= {name: ids, f"{figure.key}|ids": np.array(name)}
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_tally(arrays: Mapping[str, np.ndarray], key: str, rule: str) -> Tally | None:
    """Return a saved tally, None if the figure has none. Cells measured by early releases have no ids."""
    if f"{key}|{rule}|numerator" not in arrays:
        return None
    ids = arrays[str(arrays[f"{key}|ids"])] if f"{key}|ids" in arrays else None
    return Tally(arrays[f"{key}|{rule}|numerator"], arrays[f"{key}|{rule}|denominator"], ids)
