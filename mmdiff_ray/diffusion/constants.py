"""A cache for small tensors and keys that every step needs."""

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Cache a function of hashable arguments. torch.compile treats its results as constants.

    Tensors that are created during sampling (`torch.inference_mode`) can be used in training.
    """
    cached = lru_cache(maxsize=256)(function)

    def call(*arguments: P.args, **named: P.kwargs) -> T:
        with torch.inference_mode(False):
            return cached(*arguments, **named)  # type: ignore[arg-type]

    return torch.compiler.assume_constant_result(call)
