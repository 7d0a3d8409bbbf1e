"""What a manifest may say of a column: the facts and statistics that `Column.summary` writes."""

import math
from collections.abc import Callable
from typing import Any


def check_entry(name: str, entry: Any) -> None:
    """Raise ValueError for a manifest's entry of a column whose facts are missing, or of other types than
    `Column.summary` writes. Facts and kinds that only a writer knows may be anything."""
    if not isinstance(kind := entry["kind"], str):
        raise ValueError(f"column {name!r} has kind {kind!r}")
    for fact in ("present", *_NEEDED.get(kind, ())):
        if fact not in entry:
            raise ValueError(f"column {name!r} ({kind}) lacks {fact}")
    for fact, is_fit in _FACTS.items():
        if fact in entry and not is_fit(entry[fact]):
            raise ValueError(f"column {name!r} has {fact} {entry[fact]!r}")
    if kind in ("embedding", "vector") and entry["present"] and not entry.get("dim"):
        raise ValueError(f"column {name!r} has vectors of dim {entry.get('dim')!r}")
    if kind == "latent" and entry["present"]:
        numbers = (len(entry["mean"]), len(entry["deviation"]), entry.get("channels"))
        if len(set(numbers)) > 1 or not numbers[0] or len(entry.get("size", ())) != 2:
            raise ValueError(
                f"column {name!r} has latents without a size, or a mean and deviation per channel"
            )
    classes = len(entry["names"]) if kind in ("label", "labels") else entry.get("classes")
    per_class = ("names", "counts", "train_counts", "pixel_share", "colors")
    if (kind == "mask" and not 2 <= classes <= 256) or (kind in ("label", "labels") and not classes):
        raise ValueError(f"column {name!r} ({kind}) has {classes} classes")
    for fact in per_class:
        if kind in ("mask", "label", "labels") and fact in entry and len(entry[fact]) != classes:
            raise ValueError(f"column {name!r} has {len(entry[fact])} {fact} for {classes} classes")


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number of 0 to 2^63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_colour(value: Any) -> bool:
    channels = value if isinstance(value, list) else ()
    return value is None or (len(channels) == 3 and all(is_count(one) and one < 256 for one in channels))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and _is_amount(abs(value))


def _is_range(value: Any) -> bool:
    return _all(_is_number)(value) and len(value) == 2 and value[0] < value[1]


def _all(is_fit: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_fit, value))


_FACTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("present", "classes", "dim", "channels", "void", "texts"), is_count),
    **dict.fromkeys(("size", "counts", "train_counts"), _all(is_count)),
    "pixel_share": _all(_is_amount),
    **dict.fromkeys(("mean_norm", "known_share"), _is_amount),
    "range": _is_range,
    "mean": _all(_is_number),
    "deviation": _all(_is_amount),
    "names": _all(_is_text),
    **dict.fromkeys(("codec", "codec_folder", "codec_digest"), _is_text),
    "colors": _all(_is_colour),
}
_NEEDED = {
    "mask": ("classes", "pixel_share"),
    **dict.fromkeys(("label", "labels"), ("names", "counts")),
    "map": ("range",),
    "latent": ("mean", "deviation", "codec_folder", "codec_digest"),
}
