"""The configuration: frozen dataclasses, read from YAML and `key=value` overrides.

The only module that knows omegaconf. Every error names the key, what it got and what it wants.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mmdiff_ray import registry


class ConfigError(ValueError):
    """A mistake in a configuration, in words for the person who wrote it."""


class RunError(RuntimeError):
    """A run that failed once it had started, in words for the person who runs it."""


@dataclass(frozen=True)
class WeightsConfig:
    """The weight profile of one modality.

    family, scale, shape, knots, w, grid: the profile b(t) of the modality when it is generated
    (`mmdiff_ray.diffusion.weights` explains them). kappa: its constant weight when it is given.
    """

    family: str = "clock"
    scale: float = 1.0
    shape: float = 1.0
    knots: list[list[float]] | None = None
    w: Any = None
    grid: int = 1000
    kappa: float = 1.0


@dataclass(frozen=True)
class ModalityConfig:
    """What every modality instance has. Types add their own keys in their own file.

    type: the registered modality type. channels: "own", or the name of an instance whose channels it
    overlaps. weights: its profile and kappa.
    """

    type: str = "???"
    channels: str = "own"
    weights: WeightsConfig = field(default_factory=WeightsConfig)


@dataclass(frozen=True)
class SpaceConfig:
    """The diffusion space. height, width: in cells; anchor: the instance whose code is z_0, an image."""

    height: int = 16
    width: int = 16
    anchor: str = "pixels"


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule: family, and the grid of `steps` that training draws its times from.

    start, end, power: the family's parameters, where they shall differ from its own (`diffusion.schedule`).
    paper_fraction: divide alpha_t by the number of modalities on that grid, as the paper's formula reads
    literally. prior_limit: largest L0 of a generated modality, in nats per dimension, before it is refused.
    """

    family: str = "cosine"
    steps: int = 1000
    start: float | None = None
    end: float | None = None
    power: float | None = None
    paper_fraction: bool = False
    prior_limit: float = 0.05


@dataclass(frozen=True)
class GivenConfig:
    """How a given code reaches the network.

    input: u_plus_code: it is taken out of z_t and stands in channels beside it; z_plus_code: it stays in z_t
    as well; z_only: it is heard through z_t alone, as loud as its kappa, as in the paper.
    """

    input: str = "u_plus_code"


@dataclass(frozen=True)
class TaskConfig:
    """A row of roles and how often it is drawn.

    frequency: relative to the other tasks'; 0 keeps a task from being drawn. roles: instance -> generated,
    given or absent, or a list of 1, 2, 3 or 6 of those to draw from evenly. Unlisted: absent. drop:
    probability that a given instance is made absent, for each independently (what guidance needs).
    """

    frequency: float = 1.0
    roles: dict[str, Any] = field(default_factory=dict)
    drop: float = 0.1


@dataclass(frozen=True)
class CoefficientsConfig:
    """The coefficients of the four sub-losses l0, l1, l2 and l3 (`diffusion.objective`)."""

    l0: float = 0.0
    l1: float = 1.0
    l2: float = 1.0
    l3: float = 1.0


@dataclass(frozen=True)
class LossConfig:
    """The objective.

    prediction: what the anchor's head predicts: v, eps or x0. weighting of L1 over t: the simplified v, eps,
    x0 and min_snr (with its gamma), or elbo, the exact weight. modalities: each instance's coefficient in
    L2, 1 where it is not listed (the anchor has none, L3 decodes it). channels: the same for the L1 of the
    channels that an instance has of its own. coefficients: of the four sub-losses.
    """

    coefficients: CoefficientsConfig = field(default_factory=CoefficientsConfig)
    modalities: dict[str, float] = field(default_factory=dict)
    channels: dict[str, float] = field(default_factory=dict)
    prediction: str = "v"
    weighting: str = "v"
    gamma: float = 5.0


@dataclass(frozen=True)
class ModelConfig:
    """The backbone: its registered name, a size preset, and options: single sizes in the preset's place."""

    backbone: str = "unet"
    preset: str = "tiny"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceConfig:
    """One data set. uri: its folder, any URI of pyarrow's file systems; weight: its share of the mix."""

    uri: str = "???"
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What is read and how.

    sources: the data sets. lanes: independent streams that the rows are dealt to; a multiple of every number
    of workers ever used. window: row groups shuffled together. backgrounds: what transparent images are drawn
    over (random, white). flip: mirror rows at random. bad_row_limit: unreadable rows tolerated before the run
    stops.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    lanes: int = 8
    window: int = 4
    backgrounds: str = "random"
    flip: bool = True
    bad_row_limit: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """The training loop; all lengths are in samples, the master clock.

    samples: where training ends. max_minutes: where set, `samples` shrinks to what fits. global_batch: rows
    of a step, over all workers. micro_batch: rows per forward pass and worker (null: all of its rows).
    learning_rate, weight_decay, betas: of AdamW. warmup_samples: in which the learning rate rises from 0.
    decay: constant, linear or cosine, to `final_lr_ratio` of it. clip_norm: largest norm of the gradient.
    ema_samples: half-life of the moving average. precision: float32, or bfloat16 (autocast). compile: by
    torch.compile. channels_last: the memory layout. device: auto (a GPU if there is one), cpu or cuda.
    log_every_samples: how often losses are reported.
    """

    samples: int = 100_000
    max_minutes: float | None = None
    global_batch: int = 64
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    warmup_samples: int = 3_000
    decay: str = "cosine"
    final_lr_ratio: float = 0.02
    clip_norm: float = 1.0
    ema_samples: int = 10_000
    precision: str = "float32"
    compile: bool = False
    channels_last: bool = True
    device: str = "auto"
    log_every_samples: int = 1_000


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is written. keep_last: how many of the last ones stay; the best stays besides.

    every_samples: how often.
    """

    every_samples: int = 20_000
    keep_last: int = 2


@dataclass(frozen=True)
class WorkersConfig:
    """The workers. count: their number, 0 = in this process.

    cpus, gpus: what each asks the cluster for. data_workers: processes that read rows for each of them (in
    this process: threads). threads: torch's in each (null: one per cpu where there are several workers).
    max_failures: restarts from the last checkpoint before the run gives up.
    """

    count: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    data_workers: int = 1
    threads: int | None = None
    max_failures: int = 3


@dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated.

    evaluators: registered names. split, rows: of which split, and how many at most. every_samples: how often
    (0 = only at the end). sampler, steps, guidance: how samples are drawn. grid_rows: rows in a picture.
    """

    evaluators: list[str] = field(default_factory=list)
    split: str = "val"
    rows: int = 128
    every_samples: int = 0
    sampler: str = "dpm2"
    steps: int = 25
    guidance: float = 1.0
    grid_rows: int = 8


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run is recorded. uri: MLflow's; else MLFLOW_TRACKING_URI; else SQLite beside the runs.

    experiment: MLflow's. log_model, system_metrics: whether the model, and the machines' load, are logged.
    """

    uri: str | None = None
    experiment: str = "mmdiff"
    log_model: bool = True
    system_metrics: bool = True


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run.

    name: the run's; a number is added where it is taken. seed: of everything random. runs: the folder that
    runs are kept in. plugins: modules that register parts of your own, imported first. modalities: instance
    -> what it is, by its type's own keys (`ModalityConfig`). tasks: name -> a row of roles. All else:
    sections.
    """

    name: str = "run"
    seed: int = 0
    runs: str = "runs"
    plugins: list[str] = field(default_factory=list)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    modalities: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    given: GivenConfig = field(default_factory=GivenConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def load(
    files: Sequence[str | Path] = (), overrides: Sequence[str] = (), base: Mapping | None = None
) -> Config:
    """Return the configuration of YAML files, later ones first in rank, with `key=value` overrides on top.

    base: plain values below everything (a saved configuration). A modality set to null is removed, and with
    it its roles, its coefficient, and tasks that would generate nothing else. Raises ConfigError for an
    unreadable file, an unknown key, a wrong type or a bad value.
    """
    tree: Any = OmegaConf.create(dict(base or {}))
    for file in files:
        with _as_config_errors(str(file)):
            tree = OmegaConf.merge(tree, _read(Path(file)))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {override!r} must read key=value")
        with _as_config_errors(f"override {override!r}"):
            tree.merge_with_dotlist([override])
    with _as_config_errors("configuration"):
        plain = OmegaConf.to_container(tree, resolve=True)
    return from_plain(cast(dict[str, Any], plain))


def from_plain(plain: Mapping[str, Any]) -> Config:
    """Return the checked configuration of plain values (what `to_plain` returns)."""
    values = dict(plain)
    _import_plugins(values.get("plugins") or [])
    modalities = _section(values.pop("modalities", None), "modalities")
    removed = {name for name, value in modalities.items() if value is None}
    config = _merge(Config, _without(values, removed), prefix="")
    typed = {name: _modality(name, value) for name, value in modalities.items() if value is not None}
    config = dataclasses.replace(config, modalities=typed)
    check(config)
    return config


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, lists and numbers."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML text that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def flatten(config: Any) -> dict[str, Any]:
    """Return a configuration as dotted keys, one level."""

    def walk(prefix: str, value: Any):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            yield prefix, value

    return dict(walk("", to_plain(config)))


def options(schema: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Return a dataclass filled from open values, with errors under the prefix."""
    return _merge(schema, values, prefix)


def check(config: Config) -> None:
    """Raise ConfigError for values that contradict each other and need no data set to be seen."""
    _check_names(config)
    _check_numbers(config)
    _one_of("train.precision", config.train.precision, ("float32", "bfloat16"))
    _one_of("train.decay", config.train.decay, ("constant", "linear", "cosine"))
    _one_of("given.input", config.given.input, ("u_plus_code", "z_plus_code", "z_only"))
    _one_of("loss.prediction", config.loss.prediction, ("v", "eps", "x0"))
    _one_of("loss.weighting", config.loss.weighting, ("v", "eps", "x0", "min_snr", "elbo"))
    _one_of("data.backgrounds", config.data.backgrounds, ("random", "white"))
    _one_of("schedule.family", config.schedule.family, registry.names("schedule"))
    _one_of("model.backbone", config.model.backbone, registry.names("backbone"))
    _one_of("evaluate.sampler", config.evaluate.sampler, registry.names("sampler"))
    _one_of("evaluate.split", config.evaluate.split, ("train", "val"))
    check_batch(config)


def check_batch(config: Config) -> None:
    """Raise ConfigError where the global batch cannot be dealt to lanes, workers and micro-batches."""
    workers, batch, lanes = max(1, config.workers.count), config.train.global_batch, config.data.lanes
    if lanes % workers:
        raise ConfigError(
            f"data.lanes ({lanes}) must be a multiple of workers.count ({workers}); "
            f"try {_near(lanes, workers)}"
        )
    if batch % lanes:
        raise ConfigError(
            f"train.global_batch ({batch}) must be a multiple of data.lanes ({lanes}); "
            f"try {_near(batch, lanes)}"
        )
    micro = config.train.micro_batch
    if micro is not None and batch % (micro * workers):
        raise ConfigError(
            f"train.global_batch ({batch}) must be a multiple of micro_batch x workers "
            f"({micro} x {workers} = {micro * workers}); try {_near(batch, micro * workers)}"
        )


def _near(value: int, divisor: int) -> str:
    low = value // divisor * divisor
    return f"{low} or {low + divisor}" if low else f"{divisor}"


def _check_numbers(config: Config) -> None:
    train, workers, evaluate = config.train, config.workers, config.evaluate
    for key, value, least in (
        ("seed", config.seed, 0),
        ("space.height", config.space.height, 1),
        ("space.width", config.space.width, 1),
        ("schedule.steps", config.schedule.steps, 1),
        ("data.lanes", config.data.lanes, 1),
        ("data.window", config.data.window, 1),
        ("data.bad_row_limit", config.data.bad_row_limit, 0),
        ("train.samples", train.samples, 1),
        ("train.global_batch", train.global_batch, 1),
        ("train.micro_batch", 1 if train.micro_batch is None else train.micro_batch, 1),
        ("train.warmup_samples", train.warmup_samples, 0),
        ("train.ema_samples", train.ema_samples, 1),
        ("train.log_every_samples", train.log_every_samples, 1),
        ("checkpoint.every_samples", config.checkpoint.every_samples, 1),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("workers.count", workers.count, 0),
        ("evaluate.rows", evaluate.rows, 1),
        ("evaluate.steps", evaluate.steps, 1),
        ("evaluate.every_samples", evaluate.every_samples, 0),
    ):
        if value < least:
            raise ConfigError(f"{key} ({value}) must be at least {least}")
    for key, rate in (
        ("train.learning_rate", train.learning_rate),
        ("train.clip_norm", train.clip_norm),
        ("train.max_minutes", 1.0 if train.max_minutes is None else train.max_minutes),
    ):
        if not rate > 0:
            raise ConfigError(f"{key} ({rate}) must be above 0")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise ConfigError(f"train.betas ({train.betas}) must be two numbers in [0, 1)")


def _check_names(config: Config) -> None:
    if not config.modalities:
        raise ConfigError("modalities is empty; name at least one, for example pixels: {type: image}")
    for name in config.modalities:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"modalities: {name!r} is no name; use letters, digits and _, a letter first")
    if config.space.anchor not in config.modalities:
        raise ConfigError(_unknown("space.anchor", config.space.anchor, config.modalities))
    for name, modality in config.modalities.items():
        if modality.channels != "own" and modality.channels not in config.modalities:
            raise ConfigError(
                _unknown(f"modalities.{name}.channels", modality.channels, ["own", *config.modalities])
            )
    for key in ("modalities", "channels"):
        for name in getattr(config.loss, key):
            if name not in config.modalities:
                raise ConfigError(_unknown(f"loss.{key}", name, config.modalities))
    if not config.tasks:
        raise ConfigError("tasks is empty; for example joint: {roles: {pixels: generated}}")
    for task, row in config.tasks.items():
        _check_task(task, row, config.modalities)


def _check_task(task: str, row: TaskConfig, modalities: Mapping[str, Any]) -> None:
    for instance, roles in row.roles.items():
        if instance not in modalities:
            raise ConfigError(_unknown(f"tasks.{task}.roles", instance, modalities))
        for role in (roles or [None]) if isinstance(roles, list) else [roles]:
            _one_of(f"tasks.{task}.roles.{instance}", role, ("generated", "given", "absent"))
    if not row.frequency >= 0 or not 0 <= row.drop < 1:
        raise ConfigError(
            f"tasks.{task}: frequency ({row.frequency}) must be >= 0 and drop ({row.drop}) in [0, 1)"
        )
    if not _generates(row.roles):
        raise ConfigError(f"tasks.{task} generates nothing; give at least one instance the role generated")


def _generates(roles: Mapping[str, Any]) -> bool:
    return any("generated" in (role if isinstance(role, list) else [role]) for role in roles.values())


def _one_of(key: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(_unknown(key, value, known))


def _unknown(key: str, value: Any, known: Any, what: str = "") -> str:
    near = difflib.get_close_matches(str(value), [str(name) for name in known], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    got = f"{what} {value!r}" if what else repr(value)
    return f"{key}: unknown {got}; known: {', '.join(map(str, known))}{hint}"


def _read(file: Path) -> Any:
    try:
        tree = OmegaConf.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no config file {file}") from None
    except Exception as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"{file} must hold keys and values, got a list")
    return tree


@contextmanager
def _as_config_errors(where: str) -> Iterator[None]:
    """Turn what omegaconf and its YAML parser raise into ConfigError, with where it happened."""
    try:
        yield
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{_first_line(error)}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from None
    except Exception as error:  # the YAML parser's own, whose package is omegaconf's business
        raise ConfigError(f"{where}: not valid YAML: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _import_plugins(plugins: Any) -> None:
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        raise ConfigError(f"plugins: got {plugins!r}, want a list of modules, for example [my_modality]")
    for plugin in plugins:
        try:
            importlib.import_module(plugin)
        except ImportError as error:
            raise ConfigError(f"plugins: cannot import {plugin!r}: {error}") from None


def _section(value: Any, key: str) -> Mapping[str, Any]:
    """Return a section of keys, empty for null. Raises ConfigError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: got {value!r}, want a section of names and values")
    return value


def _without(values: Mapping[str, Any], removed: set[str]) -> dict[str, Any]:
    """Return the values without what speaks of removed modalities, and without tasks set to null.

    A task that generated only what is removed goes as well.
    """
    tasks = {}
    for name, row in _section(values.get("tasks"), "tasks").items():
        roles = row.get("roles") if isinstance(row, Mapping) else None
        if not isinstance(roles, Mapping):
            kept = row
        else:
            left = {instance: role for instance, role in roles.items() if instance not in removed}
            kept = {**row, "roles": left} if _generates(left) or not _generates(roles) else None
        if kept is not None:
            tasks[name] = kept
    result = {**values, "tasks": tasks}
    loss = values.get("loss")
    if isinstance(loss, Mapping):
        for key in ("modalities", "channels"):
            if isinstance(loss.get(key), Mapping):
                left = {name: value for name, value in loss[key].items() if name not in removed}
                loss = {**loss, key: left}
        result["loss"] = loss
    return result


def _modality(name: str, values: Any) -> Any:
    prefix = f"modalities.{name}"
    known = registry.names("modality")
    if not isinstance(values, Mapping) or not isinstance(values.get("type"), str):
        raise ConfigError(f"{prefix} needs a type; registered: {', '.join(known)}")
    _one_of(f"{prefix}.type", values["type"], known)
    return _merge(registry.look_up("modality", values["type"]).Options, values, prefix)


def _merge(schema: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Return a dataclass filled from plain values; every error names the whole key."""
    _check_sections(schema, values, prefix)
    try:
        return OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(values)))
        )
    except ConfigKeyError as error:
        *parents, last = (getattr(error, "full_key", None) or "").split(".")
        known = [f.name for f in dataclasses.fields(_schema_at(schema, parents))]
        raise ConfigError(_unknown(_dotted(prefix, *parents, last), last, known, "key")) from None
    except OmegaConfBaseException as error:
        key = _dotted(prefix, getattr(error, "full_key", None) or "")
        raise ConfigError(f"{key}: {_first_line(error)}") from None
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{prefix}: {error}" if prefix else str(error)) from None


def _check_sections(schema: type, values: Mapping[str, Any], prefix: str) -> None:
    """Raise ConfigError for a value in the place of a section or list, and for bad entries of a list of
    sections.

    omegaconf finds these as well, but its errors lack the key.
    """
    for name, wanted in get_type_hints(schema).items():
        key, value = _dotted(prefix, name), values.get(name)
        if name not in values:
            continue
        if dataclasses.is_dataclass(wanted):
            known = ", ".join(f.name for f in dataclasses.fields(wanted))
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}: got {value!r}, want a section with some of the keys {known}")
            _check_sections(wanted, value, key)  # type: ignore[arg-type]
        elif get_origin(wanted) is list:
            if not isinstance(value, list):
                raise ConfigError(f"{key}: got {value!r}, want a list")
            for index, entry in enumerate(value):
                if dataclasses.is_dataclass(get_args(wanted)[0]) and isinstance(entry, Mapping):
                    _merge(get_args(wanted)[0], entry, f"{key}[{index}]")  # type: ignore[arg-type]


def _schema_at(schema: Any, parents: Sequence[str]) -> Any:
    """Return the dataclass that holds the keys below a path of keys in a dataclass."""
    for parent in parents:
        if dataclasses.is_dataclass(schema):
            schema = get_type_hints(schema)[parent]
        else:
            schema = get_args(schema)[-1]
    return schema


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)
