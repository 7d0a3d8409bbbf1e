"""The former name of `mmdiff_ray.datasets.base`, for scripts written for version 0.1."""

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    from mmdiff_ray.datasets import base

    if name.startswith("__"):
        raise AttributeError(name)
    warnings.warn("pipelines.base is now mmdiff_ray.datasets.base", FutureWarning, stacklevel=2)
    return getattr(base, name)
