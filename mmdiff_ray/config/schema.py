"""The sections of a configuration: frozen dataclasses, their keys and defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class WeightsConfig:
    """The signal weights of one modality, as a profile b(t).

    family: family of the profile: clock, linear, cosine, power, sigmoid, constant, knots or step_weights.
    scale: factor of the profile, which sets the strength of the code relative to the noise. null: the type's
        default, or 1 with knots and step_weights.
    shape: shape of clock, power and sigmoid. With clock, a modality with shape below 1 is
        denoised before the anchor, above 1 after it.
    knots: pairs [t, b] for the family knots, from t = 0 to t = 1.
    w: step weights for the family step_weights: one number, or one per step of `grid`.
    grid: number of steps in the grid of `w`.
    kappa: constant weight when the modality is given. It has no effect under given.input in_place and
        u_plus_code.
    """

    family: str = "clock"
    scale: float | None = None
    shape: float = 1.0
    knots: list[list[float]] | None = None
    w: Any = None
    grid: int = 1000
    kappa: float = 1.0


@dataclass(frozen=True)
class ModalityConfig:
    """The keys of every modality. Types add their own keys in their own file.

    type: registered modality type.
    channels: "own", or the name of a modality whose channels the code overlaps.
    weights: signal weights.
    """

    folders: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Keys that name a folder which a model of this type cannot do without -> the files in it."""

    type: str = "???"
    channels: str = "own"
    weights: WeightsConfig = field(default_factory=WeightsConfig)


@dataclass(frozen=True)
class SpaceConfig:
    """The diffusion space.

    height: number of rows of cells.
    width: number of columns of cells.
    anchor: modality whose code is z_0; an image or latents.
    """

    height: int = 16
    width: int = 16
    anchor: str = "pixels"


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule.

    family: cosine, linear or sigmoid.
    steps: number of grid steps T that training draws times from.
    start: first parameter of the family; null: the family's default.
    end: second parameter of linear and sigmoid; null: the family's default.
    power: temperature of sigmoid; null: the family's default.
    paper_fraction: divide every alpha_t by the number of modalities, as the paper's formula reads
        literally.
    prior_limit: largest L0 of a generated modality, in nats per dimension; a config above it is refused.
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
    """How given codes reach the network.

    input: in_place: a given code replaces its own channels, without noise; u_plus_code: given codes move from
        z_t to extra condition channels; z_plus_code: they stay in z_t and are also in condition channels;
        z_only: the network gets only z_t, as in the paper.
    exact: under in_place, copy visible pixels of a masked image into the anchor's channels and never
        predict them.
    zero_unused: under z_plus_code and u_plus_code, set channels without a generated modality to 0.
        in_place always does this.
    """

    input: str = field(default="in_place", metadata={"reference": "u_plus_code"})
    exact: bool = True
    zero_unused: bool = False


@dataclass(frozen=True)
class TaskConfig:
    """The roles of one task, and how often to draw it.

    frequency: relative to the other tasks; 0: never drawn.
    roles: modality -> generated, given or absent, or a list of 1, 2, 3 or 6 of these to draw from evenly.
        Unlisted modalities are absent.
    drop: probability of making a given modality absent, independently for each. Guidance needs it.
    readout: default output for requests of this task: sample, or likely (the most likely data).
    one_pass: fraction of the task's rows that train at t = 1, so that a single prediction from noise works
        well (`evaluate.likely_steps: 1`); the other rows draw t as usual.
    """

    frequency: float = 1.0
    roles: dict[str, Any] = field(default_factory=dict)
    drop: float = 0.1
    readout: str = "sample"
    one_pass: float = 0.0

    def alternatives(self, instance: str) -> list[str]:
        """Return the possible roles of an instance."""
        return as_list(self.roles.get(instance, "absent"))

    def can_be(self, instance: str, role: str) -> bool:
        """Return whether an instance may have a role."""
        return role in self.alternatives(instance)


def as_list(roles: Any) -> list[Any]:
    """Return an entry of `roles`, a single role or a list of them, as a list."""
    return roles if isinstance(roles, list) else [roles]


@dataclass(frozen=True)
class CoefficientsConfig:
    """The coefficients of the four sub-losses (`diffusion.objective`).

    l0: coefficient of L0, the prior.
    l1: coefficient of L1, the posteriors.
    l2: coefficient of L2, the decoder heads.
    l3: coefficient of L3, the last step.
    """

    l0: float = 0.0
    l1: float = 1.0
    l2: float = 1.0
    l3: float = 1.0


@dataclass(frozen=True)
class LossConfig:
    """The objective.

    coefficients: of the four sub-losses.
    modalities: modality -> coefficient in L2; 1 if not listed. The anchor has none, L3 decodes it.
    channels: modality -> coefficient in L1 of its own channels; 1 if not listed.
    prediction: what the anchor's head predicts: v, eps or x0.
    weighting: weight of L1 over t: v, eps, x0 or min_snr (simplified), or elbo (exact).
    gamma: cap of the signal-to-noise ratio under weighting min_snr.
    channel_cap: largest weight of L1 in channels without the anchor, under any weighting but elbo.
        Without it, a strong code dominates the loss near t = 0.
    normalize: divisor of each loss term: expected: the expected count for rows with every modality, so that
        all annotations have equal weight; batch: the count of the batch, so that rare annotations have more
        weight.
    """

    coefficients: CoefficientsConfig = field(default_factory=CoefficientsConfig)
    modalities: dict[str, float] = field(default_factory=dict)
    channels: dict[str, float] = field(default_factory=dict)
    prediction: str = "v"
    weighting: str = "v"
    gamma: float = 5.0
    channel_cap: float = 5.0
    normalize: str = field(default="expected", metadata={"reference": "batch"})


@dataclass(frozen=True)
class ModelConfig:
    """The backbone.

    backbone: registered name: unet, dit or dit_tokens.
    preset: size: nano, tiny, small, base or large (dit also xlarge).
    options: sizes that override the preset; null keeps the preset's value.
    """

    backbone: str = "unet"
    preset: str = "tiny"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceConfig:
    """One data set.

    uri: folder or URI of the data set, such as s3://bucket/photos.
    weight: share of this data set in the mix.
    """

    uri: str = "???"
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """The data sets and how rows are read.

    sources: data sets to mix.
    lanes: number of independent streams of rows. Workers share no row group if their number divides it.
    window: number of row groups that are shuffled together.
    backgrounds: background of transparent images in training: random or white.
    flip: mirror rows at random.
    balance: label column whose classes are read equally often; null: as often as they occur. Rows
        without a label keep their share.
    weight: column with the relative frequency of each row in an epoch; null: all equal. With balance,
        relative to rows of the same class.
    bad_row_limit: number of unreadable rows that a run tolerates, over all workers, epochs and restarts.
    cache_mb: memory for decoded rows in every data-loading process, in MiB; 0: no cache.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    lanes: int = 8
    window: int = 4
    backgrounds: str = "random"
    flip: bool = True
    balance: str | None = None
    weight: str | None = None
    bad_row_limit: int = 0
    cache_mb: int = 256


@dataclass(frozen=True)
class ChangeConfig:
    """Values that change during training.

    at: number of samples after which the values apply.
    values: dotted key -> value.
    """

    at: int = 0
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. All lengths are in samples.

    samples: number of samples to train on.
    max_minutes: time limit; if set, `samples` is reduced to what fits.
    global_batch: rows per optimizer step, over all workers.
    micro_batch: rows per forward pass and worker; null: all rows of the worker.
    learning_rate: peak learning rate of AdamW.
    weight_decay: weight decay of AdamW.
    betas: betas of AdamW.
    warmup_samples: samples over which the learning rate rises from 0.
    decay: course of the learning rate after the warm-up: constant, linear or cosine.
    decay_samples: samples at the end over which the learning rate decays; null: all of them.
    final_lr_ratio: last learning rate divided by the peak.
    clip_norm: largest gradient norm; larger gradients are scaled down.
    ema_samples: half-life of the averaged model (EMA).
    precision: float32, bfloat16 (autocast), or auto: bfloat16 on GPUs and on CPUs with AVX512_BF16 or
        AMX. A run keeps the choice made at its start.
    compile: compile the model with torch.compile.
    channels_last: use the channels_last memory format, on GPUs only.
    device: cpu, cuda, or auto: a GPU if there is one.
    log_every_samples: interval of loss reports.
    times: range of t that training draws from; 0 is the data, 1 the noise.
    time_sampling: uniform, or logit_normal: the sigmoid of a normal variable (Esser et al., 2024).
    time_mean: mean of that normal variable.
    time_std: standard deviation of that normal variable.
    cutout: masked image whose hole is set to 0 in z_t in half of the rows, as augmentation.
    changes: values that change during training, in order: loss coefficients, modalities' weights, the
        learning rate.
    init: model to initialize parameters from, if names and shapes match: a run (name, folder or
        URI), a folder of `mmdiff export`, a .safetensors file, or pretrained:NAME.
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
    decay_samples: int | None = None
    final_lr_ratio: float = 0.02
    clip_norm: float = 1.0
    ema_samples: int = 10_000
    precision: str = "float32"
    compile: bool = False
    channels_last: bool = True
    device: str = "auto"
    log_every_samples: int = 1_000
    times: list[float] = field(default_factory=lambda: [0.0, 1.0])
    time_sampling: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    cutout: str | None = None
    changes: list[ChangeConfig] = field(default_factory=list)
    init: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved.

    every_samples: interval of checkpoints.
    keep_last: number of recent checkpoints to keep; the best one is kept as well.
    """

    every_samples: int = 20_000
    keep_last: int = 2


@dataclass(frozen=True)
class WorkersConfig:
    """The training workers.

    count: number of workers; 0: train in this process.
    least: smallest number of workers. If set, a run starts with as many as fit, shrinks when a node is lost
        and grows when one is added. Data workers then run on their worker's node.
    strategy: ddp: every worker holds the whole model; fsdp: parameters, EMA and optimizer state are
        sharded (FSDP2).
    cpus: CPUs per worker.
    gpus: GPUs per worker.
    resources: custom Ray resource -> amount per worker.
    data_workers: data-loading workers per training worker (threads if count is 0).
    threads: torch threads per worker; null: one per CPU if there are several workers.
    max_failures: consecutive restarts without a new checkpoint before the run fails.
    labels: labels that the nodes of training workers must have.
    data_labels: labels that the nodes of data-loading workers must have.
    """

    count: int = 0
    least: int | None = None
    strategy: str = "ddp"
    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    data_workers: int = 1
    threads: int | None = None
    max_failures: int = 3
    labels: dict[str, str] = field(default_factory=dict)
    data_labels: dict[str, str] = field(default_factory=dict)

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources of each worker: Ray's name of a resource -> amount above 0."""
        resources = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in resources.items() if amount}


@dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated and how.

    evaluators: registered names; null: all.
    split: train, val or test.
    rows: largest number of rows.
    visits: number of times each row is evaluated, each time with another background.
    every_samples: interval of held-out losses, pictures and figures during training; 0: losses with every
        checkpoint, the rest only at the end.
    periodic: evaluators whose figures are taken at that interval; null: calibration, which is cheap.
    best: curve that chooses the best checkpoint, without its val/: loss/total, task/NAME/total, or a figure
        of `periodic` such as category/head_accuracy; null: loss/total.
    sampler: ancestral, ddim or dpm2.
    steps: number of sampling steps.
    likely_steps: number of noiseless DDIM steps for the most likely output, at most `steps`.
    draws: number of noise draws to average class probabilities over.
    guidance: guidance scale; 1: none.
    inpaint: how holes are filled: given: the model gets the masked image; repaint: visible pixels are
        replaced at every step, for models trained without one; both.
    repeats: number of times that repaint repeats each step.
    lpips: LPIPS backbones: alex, vgg.
    condition: modalities to give instead of the anchor (for fidelity and judge: instead of none).
    floors: in restoration, also measure the baselines without a model.
    judge: export of a model that predicts labels from images.
    neighbours: embedding for the nearest-neighbour baseline of labels, from training rows; null: none.
    grid_rows: rows per picture.
    """

    evaluators: list[str] | None = None
    split: str = "val"
    rows: int = 128
    visits: int = 1
    every_samples: int = 0
    periodic: list[str] | None = None
    best: str | None = None
    sampler: str = "ancestral"
    steps: int = 25
    likely_steps: int = 3
    draws: int = 4
    guidance: float = 1.0
    inpaint: str = "given"
    repeats: int = 4
    lpips: list[str] = field(default_factory=lambda: ["alex"])
    condition: list[str] = field(default_factory=list)
    floors: bool = True
    judge: str | None = None
    neighbours: str | None = None
    grid_rows: int = 8


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run is recorded.

    uri: MLflow tracking URI without a password; null: MLFLOW_TRACKING_URI, else SQLite beside the runs.
    required: whether MLflow must be reachable when a run starts. If false, records wait on disk.
    experiment: MLflow experiment.
    log_model: log the exported model.
    system_metrics: log CPU, GPU and memory use of the machines.
    """

    uri: str | None = None
    required: bool = True
    experiment: str = "mmdiff"
    log_model: bool = True
    system_metrics: bool = True


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run.

    name: name of the run. A number is added if the name is taken.
    seed: seed of all random draws.
    runs: folder or URI (s3://bucket/runs) of all runs.
    plugins: modules to import first, to register your own types, backbones and other parts.
    modalities: name -> modality: its type and the keys of that type.
    tasks: name -> roles and frequency.
    space: diffusion space.
    schedule: noise schedule.
    given: how given codes reach the network.
    loss: objective.
    model: backbone.
    data: data sets.
    train: training loop.
    checkpoint: checkpoints.
    workers: training workers.
    evaluate: evaluation.
    tracking: MLflow.
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
