"""What the tests of `cluster/` share: its files, read."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
README = (CLUSTER / "README.md").read_text(encoding="utf8")
COMMANDS = [
    line for block in re.findall(r"^```\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()
]
"""Every line of the page's blocks of commands."""


def documents(name: str) -> list[Any]:
    """Return the YAML documents of a file, with a mapping's duplicate keys refused."""
    return list(yaml.load_all((CLUSTER / name).read_text(encoding="utf8"), _Strict))


def locked() -> dict[str, set[str]]:
    """Return the locked versions of each package (several, where they depend on the platform)."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf8").splitlines():
        name, _, version = line.split(";")[0].strip().partition("==")
        found.setdefault(name.lower(), set()).add(version)
    return found


def pairs(value: Any, key: str) -> Iterator[Any]:
    """Yield what stands under a key, at any depth."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name == key:
            yield inner
        yield from pairs(inner, key)
    for inner in value if isinstance(value, list) else ():
        yield from pairs(inner, key)


class _Strict(yaml.SafeLoader):
    """A loader that refuses duplicate keys."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
    assert len(keys) == len(set(keys)), f"a key twice in {keys}, {node.start_mark}"
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
