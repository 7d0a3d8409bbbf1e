"""The shape of the package: imports go down, outside libraries have one door, no type is a special case."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mmdiff_ray import registry

ROOT = Path(__file__).parents[1] / "mmdiff_ray"
MODULES = sorted(ROOT.rglob("*.py"))
LEAVES = ("config", "registry", "batch", "plotting", "tracking")
LAYERS = [
    ("diffusion", "codecs"),
    ("storage", "modalities", "models", "tasks"),
    ("data",),
    ("training", "sampling", "evaluation"),
    ("runs", "sweeps"),
    ("distributed",),
    ("datasets",),
    ("experiments", "jobs"),
    ("cli",),
]
RANKS = {name: rank for rank, names in enumerate([LEAVES, *LAYERS]) for name in names}
DOORS = {
    "omegaconf": ("config/",),
    "pyarrow": ("data/", "storage/"),
    "mlflow": ("tracking/",),
    "ray": ("distributed/",),
    "optuna": ("distributed/", "sweeps/"),
    "matplotlib": ("plotting.py", "evaluation/tiles.py"),
    "plotly": (),
    "diffusers": ("codecs/", "sampling/diffusers_pipeline.py"),
}
OUTSIDE = ("pipelines", "tests", "benchmarks")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf8"))


def place(file: Path) -> str:
    """Return a module's path inside the package."""
    return file.relative_to(ROOT).as_posix()


def part(file: Path) -> str:
    """Return the package or top module that a file belongs to: `training` of training/step.py."""
    return place(file).removesuffix(".py").split("/")[0]


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything a module imports, at its top or inside functions."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(file)}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


def own_part(name: str) -> str | None:
    """Return which part of the package an import reaches: `training` of mmdiff_ray.training.step."""
    head, *rest = name.split(".")
    return rest[0] if head == "mmdiff_ray" and rest else None


def test_every_module_belongs_to_a_layer():
    assert {part(file) for file in MODULES} - {"__init__", "__main__"} <= set(RANKS)


@pytest.mark.parametrize("file", MODULES, ids=place)
def test_imports_go_down_only(file):
    """Within a layer modules may use each other; leaves use leaves alone."""
    rank = RANKS.get(part(file), max(RANKS.values()))
    upward = [
        f"{place(file)}:{line} imports {name}"
        for line, name in imported(file)
        if (target := own_part(name)) is not None and RANKS.get(target, -1) > rank
    ]
    assert upward == []


def test_no_two_parts_import_each_other():
    arrows = {
        (part(file), target)
        for file in MODULES
        for _, name in imported(file)
        if (target := own_part(name)) in RANKS and target != part(file)
    }
    assert sorted(arrow for arrow in arrows if arrow[::-1] in arrows) == []


@pytest.mark.parametrize("library", DOORS)
def test_library_has_one_door(library):
    others = [
        f"{place(file)}:{line} imports {name}"
        for file in MODULES
        for line, name in imported(file)
        if name.split(".")[0] == library and not place(file).startswith(DOORS[library])
    ]
    assert others == []


@pytest.mark.parametrize("library", ["omegaconf", "pyarrow", "mlflow", "ray"])
def test_door_is_used(library):
    """A door that nothing goes through would make the test above pass for nothing."""
    assert any(name.split(".")[0] == library for file in MODULES for _, name in imported(file))


def test_no_module_imports_scripts():
    found = [
        f"{place(file)}:{line} imports {name}"
        for file in MODULES
        for line, name in imported(file)
        if name.split(".")[0] in OUTSIDE
    ]
    assert found == []


# --- special cases -----------------------------------------------------------------------------------------

TYPES = registry.names("modality")
ABOUT_MODALITIES = re.compile(r"modalit|instance|\btype\b|\.type\b|name|anchor|\[.type.\]")
"""What a comparison must speak of to be one of modality types: a column's `kind` has the same words."""


def constants(node: ast.AST) -> set[str]:
    return {
        inner.value
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    }


def class_name(kind: str) -> str:
    return kind.title().replace("_", "") + "Modality"


def special_cases(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and type name of every choice made by a modality type's name or class."""
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            sides = [node.subject, *(case.pattern for case in node.cases)]  # type: ignore[list-item]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            classes = re.findall(r"\w+", ast.unparse(node.args[1]))
            yield from ((node.lineno, kind) for kind in TYPES if class_name(kind) in classes)
        line = getattr(node, "lineno", 0)
        for side in sides:
            others = " ".join(ast.unparse(other) for other in sides if other is not side)
            if ABOUT_MODALITIES.search(others):
                yield from ((line, kind) for kind in sorted(constants(side) & set(TYPES)))


def test_no_code_treats_a_modality_type_specially_outside_its_own_file():
    found = [
        f"{place(file)}:{line} singles out {kind}"
        for file in MODULES
        for line, kind in special_cases(parsed(file))
        if place(file) != f"modalities/{kind}.py"
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "if modality == 'image': pass",
        "if options.type in ('label', 'mask'): pass",
        "x = 1 if config.modalities[name].type != 'embedding' else 2",
        "if 'mask' == modality.name: pass",
        "if entry['type'] == 'image': pass",
        "if isinstance(modality, MaskedImageModality): pass",
        "match modality.type:\n    case 'image': pass",
    ],
)
def test_special_case_would_be_found(code):
    assert list(special_cases(ast.parse(code)))


def test_kind_of_a_column_is_no_special_case_of_a_modality():
    assert not list(special_cases(ast.parse("if entry['kind'] == 'image': pass")))


# --- the core alone ----------------------------------------------------------------------------------------

TRAIN_TWO_STEPS = """
import sys

for blocked in ("ray", "mlflow", "pyarrow", "omegaconf"):
    sys.modules[blocked] = None  # importing it now raises ImportError

import torch

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import from_plain
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.training.trainer import Trainer

config = from_plain({
    "space": {"height": 8, "width": 8},
    "model": {"preset": "nano"},
    "train": {"global_batch": 8, "samples": 16, "warmup_samples": 1, "device": "cpu"},
    "modalities": {
        "pixels": {"type": "image"},
        "kind": {"type": "label", "classes": 3},
        "shape": {"type": "mask", "classes": 2},
    },
    "tasks": {
        "joint": {"roles": {"pixels": "generated", "kind": "generated", "shape": ["given", "generated"]}},
    },
})
generator = torch.Generator().manual_seed(0)
batch = Batch(
    ids=torch.arange(8),
    visits=torch.zeros(8, dtype=torch.int64),
    real=torch.ones(8, dtype=torch.bool),
    data={
        "pixels": torch.randint(0, 256, (8, 3, 8, 8), generator=generator).to(torch.uint8),
        "kind": torch.randint(0, 3, (8,), generator=generator),
        "shape": torch.randint(0, 2, (8, 8, 8), generator=generator).to(torch.uint8),
    },
    present={name: torch.ones(8, dtype=torch.bool) for name in ("pixels", "kind", "shape")},
)
denoiser = build_denoiser(config)
before = [parameter.detach().clone() for parameter in denoiser.parameters()]
trainer = Trainer(config, denoiser, torch.device("cpu"))
report = trainer.advance(iter([batch, batch]), stop_at=16)
assert trainer.progress.steps == 2
assert 0 < report["loss/total"] < float("inf")
assert any(not torch.equal(a, b) for a, b in zip(before, denoiser.parameters()))
print("trained")
"""


def test_two_steps_train_without_ray_mlflow_pyarrow_and_omegaconf():
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_TWO_STEPS],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("trained")


@pytest.mark.parametrize("module", ["mmdiff_ray.config", "mmdiff_ray.cli", "mmdiff_ray.diffusion.process"])
def test_import_alone_loads_nothing_heavy(module):
    """Ray, MLflow and all that draws or measures is loaded by what uses it: `mmdiff --help` is quick."""
    code = f"import sys, {module}; print([name for name in sys.argv[1:] if name in sys.modules])"
    heavy = ["ray", "mlflow", "lpips", "timm", "matplotlib", "open_clip", "optuna", "scipy"]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, timeout=300, cwd=ROOT.parent
    )
    assert done.stdout.strip() == "[]", done.stderr
