"""A training job: all inputs of a worker, checked and prepared on the driver."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError, check_changes, in_force, named, without_passwords
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.data.manifest import Manifest
from mmdiff_ray.data.parquet import Tables
from mmdiff_ray.data.plan import Plan
from mmdiff_ray.data.reader import RowReader
from mmdiff_ray.data.weights import Frequencies, row_frequencies
from mmdiff_ray.models.denoiser import Denoiser, build_denoiser, build_modalities, build_process, is_generated
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs.find import find_model
from mmdiff_ray.sampling.export import PRETRAINED, WEIGHTS, need_export, shapes_in, tensors_in
from mmdiff_ray.storage.filesystem import is_uri, join
from mmdiff_ray.storage.mirror import Mirror, cached, mirror
from mmdiff_ray.tracking.store import tracking_uri, with_credentials
from mmdiff_ray.training.checkpoint import write_json
from mmdiff_ray.training.fit import calibrate
from mmdiff_ray.training.init import Match, load_matching, match
from mmdiff_ray.training.parallel import bfloat16_is_fast, check_strategy, choose_device

CALIBRATION_ROWS = 512
INCOMPLETE = {"tracking", "config.yaml", "run.json.partial"}
"""Files in a run's folder before its run.json is written."""
MAY_CHANGE = (
    "train.samples",
    "train.max_minutes",
    "train.micro_batch",
    "train.learning_rate",
    "train.weight_decay",
    "train.warmup_samples",
    "train.decay",
    "train.final_lr_ratio",
    "train.clip_norm",
    "train.ema_samples",
    "train.precision",
    "train.compile",
    "train.channels_last",
    "train.device",
    "train.log_every_samples",
    "train.changes",
    "loss.",
    "checkpoint.",
    "workers.",
    "evaluate.",
    "data.bad_row_limit",
    "data.cache_mb",
    "tracking.required",
    "tracking.log_model",
    "tracking.system_metrics",
)
"""Keys that may change when a run resumes: they affect neither the model nor the order of rows."""


@dataclass(frozen=True)
class Job:
    """One training run.

    folder: the run's folder on this machine. uri: set for a run in object storage.
    calibration: fixed scales of the modalities.
    pause_at: save a checkpoint and stop at the first report after so many samples; None: train to the end.
    tables: shared reader of row groups; None: each reader reads from storage itself.
    lineage: id that checkpoints and model must carry, for a run that may have copied another's checkpoint;
    "": the run's own id.
    stored_only: for a run in storage, resume only from checkpoints there, since other machines resume it too.
    frequencies: of the rows of each data set, if rows are weighted.
    """

    config: Config
    manifests: list[Manifest]
    folder: Path
    calibration: dict[str, Tensor]
    tracking_uri: str = field(default="", repr=False)  # Ray Train shows a job's text on its dashboard
    run_id: str = ""
    pause_at: int | None = None
    tables: Tables | None = None
    uri: str = ""
    lineage: str = ""
    stored_only: bool = False
    frequencies: list[Frequencies | None] | None = None

    @property
    def mirror(self) -> Mirror | None:
        """The mirror that uploads the folder, for a run in object storage."""
        return mirror(self.uri, self.folder) if self.uri else None

    def here(self) -> "Job":
        """Return the job with its folder on this machine."""
        return dataclasses.replace(self, folder=runs.make_cache(self.uri)) if self.uri else self

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def spool(self) -> Path:
        return self.folder / "tracking"

    @property
    def bad_rows(self) -> dict[str, str]:
        """The unreadable rows so far, place -> reason."""
        file = self.folder / runs.BAD_ROWS
        return json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}

    def add_bad_rows(self, rows: Mapping[str, str]) -> dict[str, str]:
        """Add unreadable rows to those in the run's folder and return all of them."""
        known = self.bad_rows
        if not rows.keys() <= known.keys():
            known |= {place: reason for place, reason in rows.items() if place not in known}
            write_json(self.folder / runs.BAD_ROWS, known)
            if self.mirror is not None:
                self.mirror.send(runs.BAD_ROWS)
        return known

    def denoiser(self) -> Denoiser:
        """Return the untrained model with calibrated scales."""
        denoiser = build_denoiser(self.config)
        denoiser.modalities.load_state_dict(self.calibration, strict=False)
        return denoiser

    def initialize(self, denoiser: Denoiser) -> None:
        """Load the weights of `train.init`, if it is set."""
        if self.config.train.init:
            load_matching(denoiser, tensors_in(self.config.train.init))

    def reader(self, denoiser: Denoiser) -> RowReader:
        return make_reader(self.config, denoiser, self.tables)

    def plan(self) -> Plan:
        sources = [
            (manifest.splits["train"], source.weight)
            for manifest, source in zip(self.manifests, self.config.data.sources, strict=True)
        ]
        data, train = self.config.data, self.config.train
        sizes = data.lanes, data.window, train.global_batch
        return Plan(sources, *sizes, self.config.seed, self.frequencies)

    @property
    def columns(self) -> Mapping[str, Mapping[str, Any]]:
        """The columns in the first data set's manifest."""
        return self.manifests[0].columns


def make_reader(config: Config, denoiser: Denoiser, tables: Tables | None = None) -> RowReader:
    """Create the reader of a configuration's data sets."""
    uris = [source.uri for source in config.data.sources]
    return RowReader(dict(denoiser.modalities.items()), uris, config.data, config.seed, tables)


def prepare(config: Config, folder: Path, tables: Tables | None = None, resumed: bool = False) -> Job:
    """Check a configuration against its data and return the job; start and write nothing.

    resumed: the run exists, so `train.init` is ignored. Raises ConfigError.
    """
    if config.evaluate.evaluators != [] or config.evaluate.periodic:
        from mmdiff_ray.evaluation.run import check_evaluators  # slow import: metrics and plots

        check_evaluators(config)
    if config.workers.count == 0:
        choose_device(config.train)
    check_changes(config)
    manifests = read_sources(config)
    config, denoiser = fit(with_precision(config), manifests)
    if config.train.init and not resumed:
        config = _with_init(config, denoiser)
    frequencies = row_frequencies(config.data, manifests)
    reader = make_reader(config, denoiser, tables)
    splits = [manifest.splits["train"] for manifest in manifests]
    calibrate(denoiser.modalities, split_batches(reader, splits, CALIBRATION_ROWS, 64))
    scales = _fixed_scales(denoiser)
    return Job(config, manifests, folder, scales, tables=tables, frequencies=frequencies)


def _with_init(config: Config, denoiser: Denoiser) -> Config:
    """Resolve `train.init` to a full address. Raises ConfigError if no tensor fits."""
    init = str(config.train.init)
    with named("train.init"):
        if init.startswith(PRETRAINED):
            need_export(init)
        elif not init.endswith(".safetensors"):
            model = find_model(init, config.runs).where
            init = join(model, WEIGHTS) if is_uri(model) else str(need_export(model)[1])
        elif not is_uri(init):
            init = str(Path(init).absolute())
        if not match(denoiser, shapes_in(init)).same:
            raise ConfigError(f"no tensor in {init} matches this model by name and shape")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, init=init))


def init_tags(job: Job) -> dict[str, str]:
    """Return the tags for `train.init`: its address and, if known, the id of that run."""
    init = job.config.train.init
    if not init:
        return {}
    file = Path(init).parent.parent / "run.json"
    run_id = read_run(file.parent)["run_id"] if not is_uri(init) and file.is_file() else ""
    return {"mmdiff.init": init} | ({"mmdiff.init_run_id": run_id} if run_id else {})


def init_match(job: Job) -> Match:
    """Return which of the model's parameters `train.init` sets."""
    return match(job.denoiser(), shapes_in(str(job.config.train.init)))


def with_precision(config: Config) -> Config:
    """Resolve `train.precision: auto` for this machine."""
    if config.train.precision != "auto":
        return config
    gpu = config.workers.gpus > 0 if config.workers.count else choose_device(config.train).type == "cuda"
    fast = gpu or bfloat16_is_fast()
    train = dataclasses.replace(config.train, precision="bfloat16" if fast else "float32")
    return dataclasses.replace(config, train=train)


def fit(config: Config, manifests: list[Manifest]) -> tuple[Config, Denoiser]:
    """Resolve a configuration against the manifests of its data and build its model. Reads no rows.

    Raises ConfigError if they do not fit together.
    """
    if config.evaluate.evaluators != [] and not sum(m.splits[config.evaluate.split].rows for m in manifests):
        raise ConfigError(
            f"evaluate.split: the data have no rows in {config.evaluate.split}; rebuild them with a larger "
            f"{'test' if config.evaluate.split == 'test' else 'val'}_share, or set evaluate.evaluators=[]"
        )
    config = resolve_modalities(config, manifests)
    denoiser = build_denoiser(config)
    check_strategy(config, denoiser)
    _check_phases(config)
    cutout = config.train.cutout
    if cutout is not None and denoiser.modalities[cutout].made_from is None:
        raise ConfigError(f"train.cutout ({cutout}) hides nothing; set it to a modality with holes")
    return _with_scales(_with_sizes(config, denoiser), denoiser), denoiser


def _check_phases(config: Config) -> None:
    """Raise ConfigError if the weights after a change of `train.changes` are invalid."""
    for index, change in enumerate(config.train.changes):
        later = in_force(config, change.at)
        try:
            build_process(later, build_modalities(later))
        except ConfigError as error:
            raise ConfigError(f"train.changes[{index}].values: {error}") from None


def _with_sizes(config: Config, denoiser: Denoiser) -> Config:
    """Write out all sizes of the backbone, so that a later change of its preset does not matter."""
    sizes = getattr(denoiser.backbone, "options", None)
    if not dataclasses.is_dataclass(sizes):
        return config
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, options=dataclasses.asdict(sizes)),  # type: ignore[arg-type]
    )


def _with_scales(config: Config, denoiser: Denoiser) -> Config:
    """Write out the scale of every weight profile in use."""
    modalities = {
        name: dataclasses.replace(options, weights=denoiser.modalities[name].weights)
        if is_generated(config, name) and name != denoiser.anchor
        else options
        for name, options in config.modalities.items()
    }
    return dataclasses.replace(config, modalities=modalities)


def _fixed_scales(denoiser: Denoiser) -> dict[str, Tensor]:
    buffers = dict(denoiser.modalities.named_buffers())
    return {name: value.detach().clone() for name, value in buffers.items() if value.dtype == torch.float32}


def new_folder(config: Config) -> Path:
    """Return the folder of a new run: the configured name, or the next free one (`NAME-2`, ...).

    For runs in object storage, raises ConfigError if it is not writable or no MLflow store is set.
    """
    if is_uri(config.runs):
        tracking_uri(config.tracking.uri, config.runs)
        runs.check_runs(config.runs)
    taken = set(runs.names_in(config.runs))
    for number in range(1, 10_000):
        name = config.name if number == 1 else f"{config.name}-{number}"
        if name not in taken:
            return cached(join(config.runs, name))
    raise ConfigError(f"name: {config.runs} has 9,999 runs named {config.name}; choose another name")


def existing_run(config: Config) -> Path | None:
    """Return the folder of the run with the configuration's name; None if there is none.

    Deletes the files of a run that was killed while it started. Raises ConfigError if the folder is not a
    run's.
    """
    if is_uri(config.runs):
        return runs.find_existing(join(config.runs, config.name))
    folder = Path(config.runs).absolute() / config.name
    if (folder / "run.json").is_file():
        return folder
    if folder.exists():
        if not folder.is_dir() or {path.name for path in folder.iterdir()} - INCOMPLETE:
            raise ConfigError(f"name: {folder} exists but is not a run; choose another name")
        shutil.rmtree(folder)
    return None


def write_run(job: Job, **facts: Any) -> None:
    """Write a run's `config.yaml` and `run.json`. facts: more entries of the latter."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "config.yaml").write_text(configuration.to_yaml(job.config), encoding="utf8")
    known = {
        "name": job.folder.name,
        "tracking_uri": without_passwords(job.tracking_uri),
        "run_id": job.run_id,
        "datasets": [manifest.digest for manifest in job.manifests],
    } | ({"lineage": job.lineage} if job.lineage else {})
    write_json(job.folder / "run.json", {**known, **facts})
    if job.mirror is not None:
        job.mirror.send("config.yaml", "run.json")


def read_run(folder: Path) -> dict[str, Any]:
    """Read a run's `run.json`."""
    return json.loads((folder / "run.json").read_text(encoding="utf8"))


def load_job(folder: Path, overrides: Sequence[str] = ()) -> Job:
    """Return the job of an existing run, with overrides.

    Raises ConfigError for an override that a resumed run does not allow, or if the data have changed.
    """
    before = configuration.load_saved(folder / "config.yaml")
    if any(override.startswith("train.samples=") for override in overrides):
        # A new length overrides an old time limit.
        overrides = ["train.max_minutes=null", *overrides]
    config = configuration.load_saved(folder / "config.yaml", overrides)
    check_kept(before, config, MAY_CHANGE, "a resumed run")
    facts, job = read_run(folder), prepare(config, folder, resumed=True)
    if facts["datasets"] != [manifest.digest for manifest in job.manifests]:
        raise ConfigError(
            f"data.sources: {folder.name} was trained on other data (the manifests differ); start a new run"
        )
    origin = runs.address(folder)
    uri = origin if is_uri(origin) else ""
    return dataclasses.replace(
        job,
        tracking_uri=with_credentials(facts["tracking_uri"]),
        run_id=facts["run_id"],
        uri=uri,
        lineage=facts.get("lineage", ""),
    )


def check_kept(before: Config, now: Config, allowed: Sequence[str], what: str) -> None:
    """Raise ConfigError if a value differs, unless its key starts with one of `allowed`."""
    old, new = configuration.flatten(before), configuration.flatten(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(tuple(allowed)):
            raise ConfigError(
                f"{key}: {what} keeps {old.get(key)!r}, got {new.get(key)!r}; what may change: "
                f"{', '.join(name + '*' if name.endswith('.') else name for name in allowed)}"
            )
