"""The model card of a published model: what was trained on what, how well it does, and how to use it."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mmdiff_ray.config import Config
from mmdiff_ray.evaluation.context import Figure

CARD = """---
license: {license_id}
library_name: {library}
tags: [diffusion, multimodal, mmdiff-ray]
---

# {name}

Joint diffusion of {kinds} at {size}.

## Use

`pip install {package}`, then beside this folder:

```python
{code}
```

The same on the command line: `mmdiff sample {folder} --num 16`.{plugins}

## Tasks

The model samples any row's generated modalities from its given ones.

| task | given | generated |
|---|---|---|
{tasks}

## Training

{backbone} {preset}, {parameters:,} parameters: the averaged weights (EMA) after {samples_seen:,} samples.
Batch {batch}, learning rate {rate:g}, {precision}, seed {seed}. Exported by mmdiff-ray {version}.

## Data

{data}

## Evaluation

{figures}

## Intended use

Research and demonstrations on data like the training data. The model knows that data alone, with its gaps and
biases, and answers unlike inputs without a warning. Decisions about people are out of scope.

## Licence

Weights: {licence}. What the data's authors ask for is listed under Data. The code is under Apache-2.0.
"""
CODE = {
    "safetensors": """from mmdiff_ray import load_pipeline

model = load_pipeline("{folder}")
samples = model.sample({{}}, num=4)  # modality -> one value per sample
""",
    "diffusers": """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("./{folder}", trust_remote_code=True)
samples = pipe(num=4).samples  # modality -> one value per sample
""",
}
TABLE = ("| figure | model | best rule | rule | better | rows |", "|---|---|---|---|---|---|")


def model_card(
    config: Config,
    about: Mapping[str, Any],
    parameters: int,
    figures: Sequence[Figure],
    folder: str,
    form: str,
    licence: str = "",
) -> str:
    """Return a model card as Markdown, with the metadata that model hubs read on top.

    about: the entries of config.json. folder: the name of the published folder; form: `safetensors` or
    `diffusers`.
    """
    used = [(name, task) for name, task in config.tasks.items() if task.frequency > 0]
    shown = [_row(one) for one in sorted(figures, key=lambda one: not one.floors) if not one.bound]
    return CARD.format(
        license_id=licence.lower() or "other",
        library="diffusers" if form == "diffusers" else "mmdiff-ray",
        name=about["name"],
        kinds=", ".join(f"{name} ({one.type})" for name, one in config.modalities.items()),
        size=f"{config.space.height} x {config.space.width}",
        package="mmdiff-ray diffusers" if form == "diffusers" else "mmdiff-ray",
        code=CODE[form].format(folder=folder).strip(),
        folder=shlex.quote(folder),
        plugins=f" It needs the modules {', '.join(config.plugins)}." if config.plugins else "",
        tasks="\n".join(
            f"| {name} | {_with_role(config, task, 'given')} | {_with_role(config, task, 'generated')} |"
            for name, task in used
        ),
        backbone=config.model.backbone,
        preset=config.model.preset,
        parameters=parameters,
        samples_seen=about["samples_seen"],
        batch=config.train.global_batch,
        rate=config.train.learning_rate,
        precision=config.train.precision,
        seed=config.seed,
        version=about["mmdiff_ray"],
        data="\n".join(
            f"- {one['name']}: {one['description']} {one['credit']} (manifest sha256 {one['digest'][:12]})"
            for one in about["data"]
        )
        or "The data set was not at hand when this card was written.",
        figures="\n".join(["Held-out rows, beside the best rule that needs no model.", "", *TABLE, *shown])
        if shown
        else "Not evaluated.",
        licence=licence or "not stated by the publisher",
    )


def _with_role(config: Config, task: Any, role: str) -> str:
    return ", ".join(name for name in config.modalities if task.can_be(name, role)) or "nothing"


def _row(figure: Figure) -> str:
    rule, value = figure.best_rule or ("", None)
    floor = "" if value is None else f"{value:.4g}"
    return f"| {figure.key} | {figure.value:.4g} | {floor} | {rule} | {figure.better} | {figure.rows} |"
