"""Generated input for the property-based tests, and what each of them must show.

`make test` runs 500 cases, always the same; `make fuzz` 10,000 new ones (`FUZZ_CASES`).
"""

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.datasets.base import BadRow

QUICK = 500
CASES = int(os.environ.get("FUZZ_CASES", QUICK))
REFUSALS = (ConfigError, RunError, BadRow)

ran: Counter[str] = Counter()
"""Test -> the cases that it ran in this process."""
shares: dict[str, int] = {}
"""Test -> its share of QUICK cases."""


class Refused(str):
    """The message of a refusal."""


def fuzz(share: int, **arguments: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Run a test on generated arguments. share: of QUICK cases; of more cases it gets as large a part."""

    def decorate(test: Callable[..., None]) -> Any:
        shares[test.__name__] = share

        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            ran[test.__name__] += 1
            test(*args, **kwargs)

        return settings(
            max_examples=round(share * CASES / QUICK),
            deadline=None,
            database=None,
            derandomize=CASES == QUICK,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )(given(**arguments)(counted))

    return decorate


def answer(action: Callable[[], Any]) -> Any:
    """Return what an action returns, or its refusal, which must be one printable line."""
    try:
        return action()
    except REFUSALS as error:
        message = str(error)
        assert message.strip() and message.isprintable(), repr(message)
        return Refused(message)


# --- strategies --------------------------------------------------------------------------------------------

WORDS = (
    *(
        "",
        " ",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "C:\\x",
        "~",
        "-",
        "--x",
        "null",
        "nan",
        "inf",
        "1e999",
    ),
    *(
        "0",
        "-1",
        "007",
        "1_000",
        "true",
        "[",
        "{",
        "}",
        "]",
        "a: b",
        "${x}",
        "${oc.env:HOME}",
        "???",
        "=",
        "a=b",
    ),
    *(
        "x\ny",
        "\x1b[31m",
        "\x00",
        "\udcff",
        "\u202e",
        "é",
        "s3://x/y",
        "file://",
        "x" * 300,
        "!!python/name:os",
    ),
    *("pixels", "shape", "generated", "given", "train", "image", "mask", "label", "1/2", "5%"),
)
words = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))
numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e-30, 1e308, 1e20]),
    st.floats(),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, words)
junk = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=4,
)


def _places(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [here, *(place for key, value in inner for place in _places(value, (*here, key)))]


def _with(tree: Any, place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Return a tree with a changed copy of the node that holds a place."""
    if len(place) > 1:
        inner = _with(tree[place[0]], place[1:], change)
        return (
            {**tree, place[0]: inner}
            if isinstance(tree, dict)
            else [*tree[: place[0]], inner, *tree[place[0] + 1 :]]
        )
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    change(copied, place[0])
    return copied


@st.composite
def changed(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = junk, most: int = 3) -> Any:
    """Return a tree of plain values with some of them replaced, removed, or under another key."""
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(_places(tree)))
        kind = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if not place:
            if draw(st.integers(0, 20)) == 0:
                return draw(values)
            continue
        if kind == "replace":
            value = draw(values)
            tree = _with(tree, place, lambda node, key, value=value: node.__setitem__(key, value))
        elif kind == "remove":
            tree = _with(tree, place, lambda node, key: node.__delitem__(key))
        else:
            key, value = draw(words), draw(values)

            def add(node: Any, at: Any, key: Any = key, value: Any = value) -> None:
                if isinstance(node, dict):
                    node[key] = value
                else:
                    node.insert(at, value)

            tree = _with(tree, place, add)
    return tree


@st.composite
def damaged(draw: st.DrawFn, data: bytes, head: int = 0) -> bytes:
    """Return bytes with flipped bits, and sometimes cut short or with others in between.

    head: how many of the first bytes are flipped more often; 0: all are alike.
    """
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        most = min(head, len(changed)) if head and draw(st.booleans()) else len(changed)
        if most:
            changed[draw(st.integers(0, most - 1))] ^= 1 << draw(st.integers(0, 7))
    cut = draw(st.sampled_from(("", "", "", "end", "insert")))
    at = draw(st.integers(0, len(changed)))
    if cut == "end":
        return bytes(changed[:at])
    return bytes(changed[:at] + draw(st.binary(max_size=6)) + changed[at:]) if cut else bytes(changed)
