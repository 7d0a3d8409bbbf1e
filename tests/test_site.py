"""The documentation site: it builds, its links lead somewhere, its commands, configs and examples work."""

import ast
import dataclasses
import functools
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from mmdiff_ray import registry
from mmdiff_ray.cli import main, parse
from mmdiff_ray.config import ConfigError, from_plain, schema
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.sweeps.spec import load_sweep
from tests.test_imports import LAYERS, LEAVES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "cluster/README.md", *DOCS.glob("*.md")])
on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def read(page: Path) -> str:
    return page.read_text(encoding="utf8")


# --- the built site ----------------------------------------------------------------------------------------


class Links(HTMLParser):
    """The ids of an HTML page, and what it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(read(page))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.update(value for key in ("id", "name") if (value := found.get(key)))
        self.targets += [value for key in ("href", "src") if (value := found.get(key))]


@pytest.mark.slow
def test_site_builds_without_a_warning_and_every_link_in_it_leads_somewhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    pages = {page: Links(page) for page in tmp_path.rglob("*.html")}
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= {page.name for page in pages}
    lost = []
    for page, links in pages.items():
        for target in links.targets:
            path, _, anchor = unquote(target).partition("#")
            if re.match(r"[a-z]+:|//|/", path) or page.name == "404.html":
                continue
            file = (page.parent / path).resolve() if path else page
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].ids):
                lost.append(f"{page.name}: {target}")
    assert lost == []
    loaded = re.compile(r'(?:src|<link rel="(?:stylesheet|preconnect)" href)="(?:https?:)?//[^"]*')
    assert [hit for page in pages for hit in loaded.findall(read(page))] == [], "the site needs no other host"


# --- commands ----------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Yield the `mmdiff` commands of a page, and whether each stands in running text."""
    text = read(page)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from ((line, False) for line in block.replace("\\\n", " ").splitlines() if "mmdiff " in line)
    inline = re.findall(r"`(mmdiff [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    yield from ((command, True) for command in inline)


def words_of(command: str) -> list[list[str]]:
    """Return the words behind every `mmdiff` of a shell line, those inside quotes too."""
    words = shlex.split(command, comments=True)
    found = [inner for word in words if word.startswith("mmdiff ") for inner in words_of(word)]
    starts = [at for at, word in enumerate(words) if word == "mmdiff" and (at == 0 or words[at - 1] == "--")]
    if words[:2] == ["env", "-u"]:
        starts.append(3)
    return found + [words[at + 1 :] for at in starts]


@on_every_page
def test_every_command_of_a_page_is_one_that_mmdiff_takes(page):
    for command, in_text in commands(page):
        for words in words_of(re.sub(r"\[[^\]]*\.\.\.\]|\[RUNS\]", "", command)):
            if words[:1] in (["COMMAND"], ["--help"]):
                continue
            told = io.StringIO()
            with redirect_stderr(told), redirect_stdout(told):
                try:
                    given = parse(words)
                    if not in_text and "..." not in words:
                        given.check(given)
                except (SystemExit, ConfigError) as end:
                    if in_text and getattr(end, "code", 1) == 2:  # the name of a command, without arguments
                        with pytest.raises(SystemExit, match=r"^0$"):
                            parse([*words, "--help"])
                    else:
                        assert getattr(end, "code", 1) == 0, f"{command}: {end}\n{told.getvalue()}"


# --- configs -----------------------------------------------------------------------------------------------


def yaml_blocks() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", read(page), re.DOTALL):
            yield page.name, block


@pytest.mark.parametrize("page, block", list(yaml_blocks()))
def test_every_config_of_a_page_is_accepted(page, block, tmp_path):
    values = yaml.safe_load(block)
    if "space" in values and "metrics" in values:
        (tmp_path / "sweep.yaml").write_text(block, encoding="utf8")
        assert load_sweep(tmp_path / "sweep.yaml").config({}).tasks
        return
    if set(values) == {"goals"}:  # of an experiment
        return
    if "measures" in values:  # part of an experiment
        least = {
            "name": "part",
            "presets": {"smoke": {"seeds": [0], "overrides": []}},
            "methods": {"ours": {"title": "ours"}},
        }
        (tmp_path / "part.yaml").write_text(yaml.safe_dump({**least, **values}), encoding="utf8")
        assert load_experiment(str(tmp_path / "part.yaml"), "smoke").data_sets()
        return
    if "mine" in values.get("plugins", []):
        values = {key: value for key, value in values.items() if key not in ("plugins", "schedule")}
    least = {
        "modalities": {"pixels": {"type": "image"}},
        "tasks": {"joint": {"roles": {"pixels": "generated"}}},
    }
    values.setdefault("tasks", least["tasks"])
    values["modalities"] = {**least["modalities"], **values.get("modalities", {})}
    assert from_plain(values).tasks


@functools.cache
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "tools/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SECTIONS = {
    field.name: field.default_factory
    for field in dataclasses.fields(schema.Config)
    if dataclasses.is_dataclass(field.default_factory)
}
CLASSES = [
    value
    for value in vars(schema).values()
    if dataclasses.is_dataclass(value) and value.__module__ == schema.__name__
] + [registry.look_up("modality", name).Options for name in registry.names("modality")]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_key_is_documented_in_the_docstring_of_its_class(kind):
    said = hooks().meanings(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    assert [name for name in names if not said.get(name)] == []
    assert not [name for name, text in said.items() if re.search(rf"\. ({'|'.join(names)})(, \w+)*: ", text)]


def test_the_configuration_page_has_a_table_of_every_section_and_the_modalities_page_of_every_type():
    shown = set(re.findall(r"<!-- keys: (\w+)", read(DOCS / "configuration.md")))
    assert {kind.__name__ for kind in SECTIONS.values()} | {"Config", "ModalityConfig", "TaskConfig"} <= shown
    types = {"image", "mask", "label", "embedding", "masked_image"}
    assert types <= set(re.findall(r"<!-- keys: (\w+)", read(DOCS / "modalities.md")))


@on_every_page
def test_every_config_key_that_a_page_names_exists(page):
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.0-9]+)(?:`|: )", read(page))
    for key in named:
        if key.endswith((".py", ".yaml", ".md")):
            continue
        kind, parts = schema.Config, key.split(".")
        while parts and dataclasses.is_dataclass(kind):
            fields = {field.name: field for field in dataclasses.fields(kind)}
            assert parts[0] in fields, f"{key}: no key {parts[0]} in {kind.__name__}"
            kind = fields[parts.pop(0)].default_factory


# --- names -------------------------------------------------------------------------------------------------


@on_every_page
def test_every_file_of_the_repository_that_a_page_names_exists(page):
    folders = "mmdiff_ray|pipelines|tests|cluster|sweeps|benchmarks|docs|results"
    for name in re.findall(rf"`((?:{folders})/\w[\w./-]*)`", read(page)):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_the_architecture_page_has_every_package_in_its_layer():
    table = read(DOCS / "architecture.md").split("## Packages")[1].split("\n\nEach outside library")[0]
    found: dict[str, int] = {}
    layer = -1
    for number, name in re.findall(r"^\| (\d*) ?\| `(\w+)`", table, re.MULTILINE):
        layer = int(number) if number else layer
        found[name] = layer
    layers = [LEAVES, *LAYERS]
    assert found == {name: rank for rank, names in enumerate(layers) for name in names}


@functools.cache
def messages() -> str:
    """Return all texts in the package, with ... where values stand."""
    texts = []
    for file in (ROOT / "mmdiff_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "..." for one in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_every_message_that_the_troubleshooting_page_explains_is_one_of_ours():
    titles = re.findall(r"^### `(.+)`$", read(DOCS / "troubleshooting.md"), re.MULTILINE)
    assert len(titles) > 20
    for title in titles:
        words = r".{0,40}".join(re.escape(part.strip()) for part in title.split("..."))
        assert re.search(words, messages()), title


# --- examples ----------------------------------------------------------------------------------------------

EXAMPLE = """
plugins: [pipelines.mine]
data: {sources: [{uri: data/stripes}], lanes: 4}
modalities:
  pixels: {type: image}
  direction: {type: label, weights: {family: late, shape: 0.5}}
tasks: {joint: {roles: {pixels: generated, direction: generated}}}
schedule: {family: squared}
model: {backbone: plain, options: {width: 8, depth: 2}}
train: {samples: 16, global_batch: 8, warmup_samples: 8, device: cpu}
evaluate: {evaluators: [brightness], rows: 8, steps: 3, sampler: half_noisy}
tracking: {log_model: false, system_metrics: false}
"""


@pytest.mark.slow
def test_the_examples_of_the_page_on_extending_train_a_model_together(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", read(DOCS / "extending.md"), re.DOTALL)
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__init__.py").touch()
    (tmp_path / "pipelines/mine.py").write_text("\n\n".join(blocks), encoding="utf8")
    (tmp_path / "my.yaml").write_text(EXAMPLE, encoding="utf8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    for command in ("data build stripes --out data/stripes --workers 0 count=64", "train my.yaml"):
        done = subprocess.run(
            [sys.executable, "-m", "mmdiff_ray.cli", *command.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
    assert "pixels/brightness_gap" in done.stdout


@pytest.mark.slow
def test_the_python_of_the_quickstart_samples_from_an_exported_run(finished, tmp_path):
    assert main(["export", str(finished.folder), "--out", str(tmp_path / "models")]) == 0
    (block,) = re.findall(r"```python\n(.*?)```", read(DOCS / "quickstart.md"), re.DOTALL)
    for there, here in (
        ("models/demo", str(tmp_path / "models")),
        ("category", "shape"),
        ("Food & Drink", "star"),
    ):
        assert there in block
        block = block.replace(there, here)
    found: dict = {}
    exec(block, found)
    assert found["samples"].data["pixels"].shape == (16, 3, 8, 8)
