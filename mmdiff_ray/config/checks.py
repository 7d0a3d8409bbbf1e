"""Checks of a configuration that need no data, and their error messages."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmdiff_ray import registry
from mmdiff_ray.config.addresses import IN_STORAGE, IN_TRACKING, refuse_password
from mmdiff_ray.config.errors import ConfigError, named
from mmdiff_ray.config.schema import Config, TaskConfig, as_list

READOUTS = ("sample", "likely")

NAME = re.compile(r"\w[^/\\\x00-\x1f\x7f\ud800-\udfff]*")
"""A name that is valid for a file or folder on every system, and not hidden."""
NAME_IN_URI = re.compile(r"\w[\w.~=+,@:-]*", re.ASCII)
LONGEST_NAME = 150
"""In bytes. File systems allow 255, and run names get numbers, dates and suffixes."""


def check(config: Config) -> None:
    """Raise ConfigError for invalid or contradictory values, as far as that is known without the data."""
    check_name("name", config.name, in_uri="://" in config.runs)
    _check_names(config)
    _check_numbers(config)
    one_of("train.precision", config.train.precision, ("auto", "float32", "bfloat16"))
    one_of("train.decay", config.train.decay, ("constant", "linear", "cosine"))
    one_of("train.time_sampling", config.train.time_sampling, ("uniform", "logit_normal"))
    if config.train.time_sampling != "uniform" and config.loss.weighting == "elbo":
        raise ConfigError(
            "train.time_sampling: loss.weighting=elbo needs uniform times; use train.time_sampling=uniform "
            "or another weighting"
        )
    one_of("given.input", config.given.input, ("in_place", "u_plus_code", "z_plus_code", "z_only"))
    one_of("loss.prediction", config.loss.prediction, ("v", "eps", "x0"))
    for name, task in config.tasks.items():
        one_of(f"tasks.{name}.readout", task.readout, READOUTS)
    one_of("loss.normalize", config.loss.normalize, ("expected", "batch"))
    one_of("loss.weighting", config.loss.weighting, ("v", "eps", "x0", "min_snr", "elbo"))
    one_of("workers.strategy", config.workers.strategy, ("ddp", "fsdp"))
    one_of("data.backgrounds", config.data.backgrounds, ("random", "white"))
    one_of("schedule.family", config.schedule.family, registry.names("schedule"))
    one_of("model.backbone", config.model.backbone, registry.names("backbone"))
    one_of("evaluate.sampler", config.evaluate.sampler, registry.names("sampler"))
    one_of("evaluate.split", config.evaluate.split, ("train", "val", "test"))
    for name in config.evaluate.condition:
        one_of("evaluate.condition", name, list(config.modalities))
    if config.evaluate.neighbours is not None:
        one_of("evaluate.neighbours", config.evaluate.neighbours, list(config.modalities))
    for backbone in config.evaluate.lpips:
        one_of("evaluate.lpips", backbone, ("alex", "vgg"))
    one_of("evaluate.inpaint", config.evaluate.inpaint, ("given", "repaint", "both"))
    check_batch(config)


def check_batch(config: Config) -> None:
    """Raise ConfigError if the global batch cannot be split into lanes and workers."""
    workers, batch, lanes = config.workers, config.train.global_batch, config.data.lanes
    if (workers.least or 0) > workers.count:
        raise ConfigError(f"workers.least ({workers.least}) must be at most workers.count ({workers.count})")
    if workers.least is not None and workers.data_labels:
        raise ConfigError(
            "workers.data_labels: with workers.least, data workers run on the CPUs of their training worker; "
            "remove one of the two keys"
        )
    if workers.count > batch:
        raise ConfigError(f"train.global_batch ({batch}) must have a row for each of {workers.count} workers")
    if batch % lanes:
        low = batch // lanes * lanes
        near = f"{low} or {low + lanes}" if low else f"{lanes}"
        raise ConfigError(
            f"train.global_batch ({batch}) must be a multiple of data.lanes ({lanes}); try {near}"
        )


def _check_numbers(config: Config) -> None:
    train, workers, evaluate = config.train, config.workers, config.evaluate
    _check_values("", dataclasses.asdict(config))
    if config.seed >= 2**63:
        raise ConfigError(f"seed ({config.seed}) must be below 2**63")
    for key, value, least in (
        ("seed", config.seed, 0),
        ("space.height", config.space.height, 1),
        ("space.width", config.space.width, 1),
        ("schedule.steps", config.schedule.steps, 2),
        ("data.lanes", config.data.lanes, 1),
        ("data.window", config.data.window, 1),
        ("data.bad_row_limit", config.data.bad_row_limit, 0),
        ("data.cache_mb", config.data.cache_mb, 0),
        ("train.samples", train.samples, 1),
        ("train.global_batch", train.global_batch, 1),
        ("train.micro_batch", 1 if train.micro_batch is None else train.micro_batch, 1),
        ("train.weight_decay", train.weight_decay, 0),
        ("train.decay_samples", 1 if train.decay_samples is None else train.decay_samples, 1),
        ("train.warmup_samples", train.warmup_samples, 0),
        ("train.final_lr_ratio", train.final_lr_ratio, 0),
        ("train.ema_samples", train.ema_samples, 1),
        ("train.log_every_samples", train.log_every_samples, 1),
        ("checkpoint.every_samples", config.checkpoint.every_samples, 1),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("workers.count", workers.count, 0),
        ("workers.least", 1 if workers.least is None else workers.least, 1),
        ("workers.data_workers", workers.data_workers, 1 if workers.count else 0),
        ("workers.threads", 1 if workers.threads is None else workers.threads, 1),
        ("workers.max_failures", workers.max_failures, 0),
        ("evaluate.rows", evaluate.rows, 1),
        ("evaluate.visits", evaluate.visits, 1),
        ("evaluate.steps", evaluate.steps, 1),
        ("evaluate.every_samples", evaluate.every_samples, 0),
        ("evaluate.repeats", evaluate.repeats, 1),
        ("evaluate.likely_steps", evaluate.likely_steps, 1),
        ("evaluate.draws", evaluate.draws, 1),
        ("evaluate.guidance", evaluate.guidance, 0),
        ("evaluate.grid_rows", evaluate.grid_rows, 1),
        *((f"train.changes[{index}].at", change.at, 0) for index, change in enumerate(train.changes)),
    ):
        if value < least:
            raise ConfigError(f"{key} ({value}) must be at least {least}")
    for key, rate in (
        ("train.learning_rate", train.learning_rate),
        ("train.clip_norm", train.clip_norm),
        ("train.time_std", train.time_std),
        ("train.max_minutes", 1.0 if train.max_minutes is None else train.max_minutes),
    ):
        if not rate > 0:
            raise ConfigError(f"{key} ({rate}) must be above 0")
    if not workers.cpus > 0:
        raise ConfigError(f"workers.cpus ({workers.cpus:g}) must be above 0")
    if workers.gpus < 0 or (workers.gpus > 1 and workers.gpus % 1):
        raise ConfigError(f"workers.gpus ({workers.gpus:g}) must be 0, a part of 1, or a whole number")
    for name, amount in workers.resources.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory") or not amount > 0:
            raise ConfigError(
                f"workers.resources: {name}={amount} must be above 0 and a custom resource; use workers.cpus "
                "and workers.gpus for CPU and GPU"
            )
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise ConfigError(f"train.betas ({train.betas}) must be two numbers in [0, 1)")
    times = train.times
    if len(times) != 2 or not 0 <= times[0] <= times[1] <= 1:
        raise ConfigError(f"train.times ({times}) must be two numbers in [0, 1], the smaller one first")
    if round(times[1] * config.schedule.steps) < 1:  # else training draws t = 0, where z_t has no noise
        raise ConfigError(
            f"train.times ({times}) must reach the schedule's first step, t = 1/{config.schedule.steps}"
        )


def _check_values(key: str, value: Any) -> None:
    """Raise ConfigError if a tree of values has NaN, invalid Unicode, or a URI with a password or key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_values(key, name)
            _check_values(f"{key}.{name}" if key else str(name), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_values(f"{key}[{index}]", inner)
    elif isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{key} (nan) must be a number")
    elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise ConfigError(f"{key}: {value!r} is not valid Unicode; write it in UTF-8")
    elif isinstance(value, str) and "://" in value:
        with named(key):
            refuse_password(value, IN_TRACKING if key == "tracking.uri" else IN_STORAGE)


def _check_names(config: Config) -> None:
    if not config.modalities:
        raise ConfigError("modalities is empty; name at least one, for example pixels: {type: image}")
    for name in config.modalities:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(
                f"modalities: {name!r} is not a valid name; use letters, digits and _, starting with a letter"
            )
    if config.space.anchor not in config.modalities:
        raise ConfigError(unknown("space.anchor", config.space.anchor, config.modalities))
    for name, modality in config.modalities.items():
        if modality.channels != "own" and modality.channels not in config.modalities:
            raise ConfigError(
                unknown(f"modalities.{name}.channels", modality.channels, ["own", *config.modalities])
            )
    for key in ("modalities", "channels"):
        for name in getattr(config.loss, key):
            if name not in config.modalities:
                raise ConfigError(unknown(f"loss.{key}", name, config.modalities))
    if config.train.cutout is not None and config.train.cutout not in config.modalities:
        raise ConfigError(unknown("train.cutout", config.train.cutout, config.modalities))
    if not config.tasks:
        raise ConfigError("tasks is empty; for example joint: {roles: {pixels: generated}}")
    for task, row in config.tasks.items():
        check_name("tasks", task)
        _check_task(task, row, config.modalities)


def _check_task(task: str, row: TaskConfig, modalities: Mapping[str, Any]) -> None:
    for instance in row.roles:
        if instance not in modalities:
            raise ConfigError(unknown(f"tasks.{task}.roles", instance, modalities))
        alternatives: list[Any] = row.alternatives(instance) or [None]
        for role in alternatives:
            one_of(f"tasks.{task}.roles.{instance}", role, ("generated", "given", "absent"))
    if not 0 <= row.frequency < math.inf or not 0 <= row.drop < 1:
        raise ConfigError(
            f"tasks.{task}: frequency ({row.frequency}) must be finite and >= 0, "
            f"and drop ({row.drop}) in [0, 1)"
        )
    if not 0 <= row.one_pass <= 1:
        raise ConfigError(f"tasks.{task}.one_pass ({row.one_pass}) must be between 0 and 1")
    if not generates(row.roles):
        raise ConfigError(
            f"tasks.{task} generates nothing; set the role of at least one modality to generated"
        )


def generates(roles: Mapping[str, Any]) -> bool:
    """Return whether the roles of a task can generate any instance."""
    return any("generated" in as_list(role) for role in roles.values())


def check_name(key: str, name: Any, in_uri: bool = False) -> None:
    """Raise ConfigError unless a name is valid for a file or folder; with in_uri, also in a URI."""
    if not isinstance(name, str):
        raise ConfigError(f"{key}: got {name!r}, want text; put the name in quotes")
    if not NAME.fullmatch(name) or len(name.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"{key}: {name!r} cannot name a file; use at most {LONGEST_NAME} bytes without / and \\, and "
            "start with a letter, a digit or _"
        )
    if in_uri and not NAME_IN_URI.fullmatch(name):
        raise ConfigError(
            f"{key}: {name!r} cannot stand in a URI, and runs are kept in storage; use letters, digits and "
            "any of . _ ~ = + , @ : -"
        )


def one_of(key: str, value: Any, known: Sequence[str]) -> None:
    """Raise ConfigError unless the value is one of `known`."""
    if value not in known:
        raise ConfigError(unknown(key, value, known))


def unknown(key: str, value: Any, known: Any, what: str = "") -> str:
    """Return the error message for a value that is not in `known`. what: kind of value, such as "key"."""
    got = f"{what} {value!r}" if what else repr(value)
    return f"{key}: unknown {got}; known: {', '.join(map(str, known))}{registry.suggestion(value, known)}"
