"""The former name of `mmdiff_ray.datasets.base` and `build`, for scripts written for version 0.1."""

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    from mmdiff_ray.datasets import base, build

    if name.startswith("__"):
        raise AttributeError(name)
    module = base if hasattr(base, name) else build
    warnings.warn(f"pipelines.base is now {module.__name__} for {name}", FutureWarning, stacklevel=2)
    return getattr(module, name)
