"""MkDocs hooks: bring files from outside `docs/` into the site, and build tables from the code.

Pages link to files of the repository by relative paths, which also work where Markdown is read without the
site. `on_files` adds every linked file; `on_page_markdown` rewrites the links. A comment such as
`<!-- keys: TrainConfig -->` becomes a table of a dataclass: key, type, default, meaning.
"""

import dataclasses
import inspect
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from mkdocs.structure.files import File

from mmdiff_ray import registry
from mmdiff_ray.config import schema

ROOT = Path(__file__).parents[2]
PAGES = {"cluster/README.md": "clusters.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Pages that lie outside `docs/`, and their names in the site."""
REFERENCE = "configuration.md"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
MARKER = re.compile(r"^<!-- keys: (\w+) (?:without (\w+) )?-->$", re.MULTILINE)


SECTIONS = {
    hint.__name__: f"{name}."
    for name, hint in get_type_hints(schema.Config).items()
    if dataclasses.is_dataclass(hint) and isinstance(hint, type)
}
"""Class of a section of the configuration -> the beginning of its keys."""
KEY = re.compile(rf"(?<![`\[])`((?:{'|'.join(name[:-1] for name in SECTIONS.values())})\.[\w.]+)`(?!`)")


# --- files from outside docs/ ------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the linked files of the repository to the site."""
    found = {"cluster/README.md", "CHANGELOG.md"}
    unread = [*found, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    while unread:
        new = set(_links(unread.pop())) - found
        found |= new
        unread += [place for place in new if place.endswith(".md") and not place.startswith("docs/")]
    for place in sorted(found):
        if not place.startswith("docs/") and place != "README.md":
            files.append(File.generated(config, in_site(place), abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links to files outside `docs/` and fill in the tables of keys."""
    place = in_repository(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        opening, target, heading, closing = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group()
        here = posixpath.dirname(page.file.src_uri) or "."
        target = posixpath.relpath(in_site(resolved(place, target)), here)
        return f"{opening}{target}{heading or ''}{closing}"

    markdown = LINK.sub(rewritten, markdown)
    if page.file.src_uri != REFERENCE:
        markdown = KEY.sub(linked_key(page.file.src_uri), markdown)
    return MARKER.sub(table_of, markdown)


def linked_key(page: str) -> Callable[[re.Match[str]], str]:
    """Return what turns a config key of a page into a link to its entry in the reference."""
    known = {key for name, prefix in SECTIONS.items() for key, *_ in rows_of(getattr(schema, name), prefix)}
    target = posixpath.relpath(REFERENCE, posixpath.dirname(page) or ".")
    return lambda match: f"[{match[0]}]({target}#{match[1]})" if match[1] in known else match[0]


def _links(place: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to."""
    for match in LINK.finditer((ROOT / place).read_text(encoding="utf8")):
        target = resolved(place, match[2])
        if "://" not in match[2] and (ROOT / target).is_file():
            yield target


def resolved(place: str, target: str) -> str:
    """Return a link of a page as a path in the repository; of a folder of results, their file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
    return f"{path}/results.json" if (ROOT / path / "results.json").is_file() else path


def in_site(place: str) -> str:
    """Return the path in the site of a file of the repository."""
    return PAGES.get(place, place.removeprefix("docs/"))


def in_repository(page: str) -> str:
    """Return the path in the repository of a page of the site."""
    outside = {name: place for place, name in PAGES.items() if place != "README.md"}
    if page in outside:
        return outside[page]
    return page if page.startswith("results/") else f"docs/{page}"


# --- tables of keys ----------------------------------------------------------------------------------------


def table_of(marker: re.Match[str]) -> str:
    """Return the table that a marker asks for.

    `<!-- keys: TrainConfig -->` names a class of the schema, or the type of a modality; `without
    ModalityConfig` leaves out the keys of another class.
    """
    name, without = marker.groups()
    kind = getattr(schema, name, None) or registry.look_up("modality", name).Options
    left_out = {field.name for field in dataclasses.fields(getattr(schema, without))} if without else set()
    rows = [row for row in rows_of(kind, SECTIONS.get(name, "")) if row[0].split(".")[0] not in left_out]
    if kind is schema.Config:
        rows = [row for row in rows if "." not in row[0]]
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, *cells in rows:
        anchor = f"{{#{key}}}" if name in SECTIONS or kind is schema.Config else ""
        lines.append(f"| `{key}`{anchor} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) if rows else "This type has no keys of its own."


def rows_of(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield key, type, default and meaning of every field of a dataclass; sections inside are flattened."""
    hints, said = get_type_hints(kind), meanings(kind)
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        items = next((one for one in get_args(hint) if dataclasses.is_dataclass(one)), None)
        if dataclasses.is_dataclass(hint):
            yield from rows_of(hint, f"{key}.")
        elif items is not None and get_origin(hint) is list:
            yield from rows_of(items, f"{key}[].")
        else:
            yield key, f"`{type_name(hint)}`", f"`{default_of(field)}`", said.get(field.name, "")


def type_name(hint: Any) -> str:
    """Return a type as a person who writes YAML knows it: `float or null`, `list of int`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(type_name(one) for one in inner)
    if origin is list:
        return f"list of {type_name(inner[0])}"
    if origin is dict:
        of = type_name(inner[1])
        return f"mapping to {of}" if of in ("float", "str") else "mapping"
    return {NoneType: "null", Any: "any"}.get(hint, getattr(hint, "__name__", str(hint)))


def default_of(field: dataclasses.Field) -> str:
    """Return a field's default as YAML."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == "???":
        return "required"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def meanings(kind: type) -> dict[str, str]:
    """Return what docstrings say of the fields of a dataclass and its bases, in lines `field: meaning`."""
    found: dict[str, str] = {}
    names = "|".join(field.name for field in dataclasses.fields(kind))
    for cls in reversed(kind.__mro__):
        text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        pieces = re.split(rf"^({names}): ", text, flags=re.MULTILINE)[1:]
        for name, meaning in zip(pieces[::2], pieces[1::2], strict=True):
            found[name] = re.sub(r"\s+", " ", meaning).strip()
    return found
