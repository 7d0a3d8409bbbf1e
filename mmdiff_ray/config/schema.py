"""The sections of a configuration: frozen dataclasses, their keys and defaults."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WeightsConfig:
    """The weight profile of one modality.

    family, scale, shape, knots, w, grid: the profile b(t) of the modality when it is generated
    (`mmdiff_ray.diffusion.weights` explains them). scale: how loud its code is in the noise; None: as the
    modality's type has it (`Modality.usual_scale`), or 1 with knots or w. kappa: its constant weight when it
    is given.
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

    input: in_place: it stands, free of noise, in its own channels of the network's input; u_plus_code: it is
    taken out of z_t and stands in channels beside it; z_plus_code: it stays in z_t as well; z_only: it is
    heard through z_t alone, as loud as its kappa, as in the paper. exact: under in_place, visible pixels of a
    masked image stand in the anchor's channels, are never predicted and count in no loss. zero_unused: under
    z_plus_code and u_plus_code, channels that carry nothing generated are 0 in place of noise (as in_place
    has it always).
    """

    input: str = field(default="in_place", metadata={"reference": "u_plus_code"})
    exact: bool = True
    zero_unused: bool = False


@dataclass(frozen=True)
class TaskConfig:
    """A row of roles and how often it is drawn.

    frequency: relative to the other tasks'; 0 keeps a task from being drawn. roles: instance -> generated,
    given or absent, or a list of 1, 2, 3 or 6 of those to draw from evenly. Unlisted: absent. drop:
    probability that a given instance is made absent, for each independently (what guidance needs). readout:
    how the task is answered where nobody asks otherwise: sample, or likely (`mmdiff sample --likely`).
    """

    frequency: float = 1.0
    roles: dict[str, Any] = field(default_factory=dict)
    drop: float = 0.1
    readout: str = "sample"

    def alternatives(self, instance: str) -> list[str]:
        """Return the roles that an instance's role is drawn from."""
        return as_list(self.roles.get(instance, "absent"))

    def can_be(self, instance: str, role: str) -> bool:
        """Return whether an instance may have a role."""
        return role in self.alternatives(instance)


def as_list(roles: Any) -> list[Any]:
    """Return an entry of `roles`, a single role or a list of them, as a list."""
    return roles if isinstance(roles, list) else [roles]


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
    x0 and min_snr, or elbo, the exact weight. gamma: where min_snr caps it. modalities: each instance's
    coefficient in L2, 1 where it is not listed (the anchor has none, L3 decodes it). channels: the same for
    the L1 of the channels that an instance has of its own. channel_cap: the largest weight of L1 in channels
    without the anchor, under any weighting but elbo; without a cap a loud code outweighs all else near the
    data. coefficients: of the four sub-losses. normalize: what the sum of a term over a batch is divided by:
    expected: the count to expect of rows that have every modality, so that every annotation weighs the same,
    however rare it is; batch: the batch's own count, so that rare annotations weigh more.
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
    """The backbone: its registered name, a size preset, options: single sizes in the preset's place.

    An option that is null is the preset's.
    """

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

    sources: the data sets. lanes: independent streams that the rows are dealt to, for any number of workers;
    where it divides them, no two open the same row group. window: row groups shuffled together. backgrounds:
    what transparent images are drawn over (random, white). flip: mirror rows at random. bad_row_limit:
    unreadable rows that a run tolerates, over all workers, epochs and restarts, before it stops.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    lanes: int = 8
    window: int = 4
    backgrounds: str = "random"
    flip: bool = True
    bad_row_limit: int = 0


@dataclass(frozen=True)
class ChangeConfig:
    """Values that change while a model trains. at: after how many samples; values: dotted key -> value."""

    at: int = 0
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop; all lengths are in samples, the master clock.

    samples: where training ends. max_minutes: where set, `samples` shrinks to what fits. global_batch: rows
    of a step, over all workers. micro_batch: rows per forward pass and worker (null: all of its rows).
    learning_rate, weight_decay, betas: of AdamW. warmup_samples: in which the learning rate rises from 0.
    decay: constant, linear or cosine, to `final_lr_ratio` of it, over the last `decay_samples` (null: all
    along). clip_norm: largest norm of the gradient.
    ema_samples: half-life of the moving average. precision: float32, bfloat16 (autocast), or auto: bfloat16
    on GPUs and on CPUs that multiply matrices in it, decided when a run begins. compile: by torch.compile.
    channels_last: the memory layout, on GPUs alone. device: auto (a GPU if there is one), cpu or cuda.
    log_every_samples: how often losses are reported. times: the part of the schedule, 0 the data and 1
    the noise, that training draws from. time_sampling: uniform, or logit_normal, the sigmoid of a normal
    variable of mean `time_mean` and standard deviation `time_std` (Esser et al., 2024). cutout: a
    masked-image instance whose hole is cut out of z_t in half of the rows, as mere augmentation. changes:
    values that are others from some sample on, in order: of the loss' coefficients, of modalities'
    weights, of the learning rate. init: a run (name, folder or URI) or a `.safetensors` file whose
    weights the model starts from, where names and shapes match.
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
    """When the run's state is written. keep_last: how many of the last ones stay; the best stays besides.

    every_samples: how often.
    """

    every_samples: int = 20_000
    keep_last: int = 2


@dataclass(frozen=True)
class WorkersConfig:
    """The workers. count: their number, 0 = in this process. least: where set, a run starts with fewer, down
    to this, if the cluster holds no more, goes on with fewer where a node is lost and with more where one
    comes; a worker then reads on its own node.

    cpus, gpus, resources: what each asks the cluster for; resources: name -> amount of what the cluster's
    nodes were started with besides. data_workers: processes that read rows for each of them (in this process:
    threads). threads: torch's in each (null: one per cpu where there are several workers). max_failures:
    restarts from the last checkpoint, in a row with no new checkpoint between, before the run gives up.
    labels, data_labels: what the nodes must be labelled with that the workers, and the processes that read
    for them, run on. strategy: how workers share
    the model: ddp, each holds all of it; fsdp, each a part of its parameters, their average and the
    optimizer's state, for models that are too large for one.
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
    def asks(self) -> dict[str, float]:
        """What each worker asks the cluster for: Ray's name of a resource -> amount, above 0."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in asked.items() if amount}


@dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated.

    evaluators: registered names. split, rows: of which split (train, val, test), and how many at most.
    visits: how often every row is evaluated, each time over another background. every_samples: how often
    (0 = only at the end). sampler, steps, guidance: how samples are drawn. likely_steps: noiseless DDIM steps
    to a most likely answer, at most `steps`. draws: of the noise, over which heads' probabilities are
    averaged. inpaint: how holes are filled:
    given, the masked image is given to the model; repaint, the visible pixels of a sample are replaced at
    every step, which is taken `repeats` times (for models that were never given one); both. lpips: backbones
    that it is measured with, alex or vgg. condition: instances that are given, in place of the anchor (or of
    nothing, for fidelity and judge). floors: whether restoration measures the rules that need no model, too.
    judge: the export of a model that tells labels from images. grid_rows:
    rows in a picture.
    """

    evaluators: list[str] | None = None
    split: str = "val"
    rows: int = 128
    visits: int = 1
    every_samples: int = 0
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
    grid_rows: int = 8


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run is recorded. uri: MLflow's, without a password; else MLFLOW_TRACKING_URI; else SQLite
    beside the runs.

    required: whether MLflow must answer when a run begins; if not, what is recorded waits on disk until it
    does. experiment: MLflow's. log_model, system_metrics: whether the model, and the machines' load, are
    logged.
    """

    uri: str | None = None
    required: bool = True
    experiment: str = "mmdiff"
    log_model: bool = True
    system_metrics: bool = True


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run.

    name: the run's; a number is added where it is taken. seed: of everything random. runs: the folder or
    URI (s3://bucket/runs) that runs are kept in. plugins: modules that register parts of your own, imported
    first. modalities: instance -> what it is, by its type's own keys (`ModalityConfig`). tasks: name -> a row
    of roles. All else: sections.
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
