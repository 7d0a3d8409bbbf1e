"""Register classes and functions under a name, and look them up with a clear error.

A kind ("modality", "backbone", ...) has a home package whose modules register their own parts when they are
imported; the home is imported at the first look-up, so nothing happens at import and a new file is found by
itself.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Part = TypeVar("Part", bound=Callable[..., Any])

HOMES = {
    "modality": "mmdiff_ray.modalities",
    "backbone": "mmdiff_ray.models",
    "schedule": "mmdiff_ray.diffusion",
    "profile": "mmdiff_ray.diffusion",
    "sampler": "mmdiff_ray.diffusion",
    "evaluator": "mmdiff_ray.evaluation",
    "pipeline": "mmdiff_ray.datasets",
    "embedder": "mmdiff_ray.datasets",
}
SCRIPTS = "pipelines"
"""Data set scripts of a user's own, where such a package can be imported."""
_parts: dict[str, dict[str, Any]] = {kind: {} for kind in HOMES}
_loaded: set[str] = set()


def register(kind: str, name: str) -> Callable[[Part], Part]:
    """Return a decorator that registers a part of a kind under a name.

    It raises ValueError if another part has the name.
    """

    def keep(part: Part) -> Part:
        known = _parts[kind].get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            part.__module__,
            part.__qualname__,
        ):
            raise ValueError(f"{kind} {name!r} is registered twice: {known.__module__} and {part.__module__}")
        _parts[kind][name] = part
        return part

    return keep


def look_up(kind: str, name: str) -> Any:
    """Return the part of a kind registered under a name. Raises KeyError naming what is registered."""
    known = _known(kind)
    if name not in known:
        raise KeyError(
            f"unknown {kind} {name!r}; registered: {', '.join(sorted(known))}{suggestion(name, known)}"
        )
    return known[name]


def suggestion(value: Any, known: Iterable[Any]) -> str:
    """Return the end of an error message that suggests the known name most like a value; empty if none is."""
    near = difflib.get_close_matches(str(value), [str(name) for name in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def names(kind: str) -> list[str]:
    """Return the names registered for a kind, sorted."""
    return sorted(_known(kind))


def _known(kind: str) -> dict[str, Any]:
    home = HOMES[kind]
    if home not in _loaded:
        _import_all(home)
        if home == HOMES["pipeline"] and importlib.util.find_spec(SCRIPTS):
            _import_all(SCRIPTS)
        _loaded.add(home)  # only now: a module that cannot be imported must not look like an unknown name
    return _parts[kind]


def _import_all(home: str) -> None:
    package = importlib.import_module(home)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{home}.{module.name}")
