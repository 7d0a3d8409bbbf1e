"""The configuration: frozen dataclasses, read from YAML and `key=value` overrides.

Every error names the key, what it got and what it wants.
"""

from mmdiff_ray.config.changes import check_changes, in_force, is_live, next_change
from mmdiff_ray.config.checks import check, check_batch
from mmdiff_ray.config.errors import ConfigError, RunError, UnreachableError
from mmdiff_ray.config.loading import (
    flatten,
    from_plain,
    load,
    options,
    override,
    parse_value,
    read_yaml,
    to_plain,
    to_yaml,
)
from mmdiff_ray.config.schema import (
    ChangeConfig,
    CheckpointConfig,
    CoefficientsConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    GivenConfig,
    LossConfig,
    ModalityConfig,
    ModelConfig,
    ScheduleConfig,
    SourceConfig,
    SpaceConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
    WeightsConfig,
    WorkersConfig,
)

__all__ = [
    "ChangeConfig",
    "CheckpointConfig",
    "CoefficientsConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "GivenConfig",
    "LossConfig",
    "ModalityConfig",
    "ModelConfig",
    "RunError",
    "ScheduleConfig",
    "SourceConfig",
    "SpaceConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "UnreachableError",
    "WeightsConfig",
    "WorkersConfig",
    "check",
    "check_batch",
    "check_changes",
    "flatten",
    "from_plain",
    "in_force",
    "is_live",
    "load",
    "next_change",
    "options",
    "override",
    "parse_value",
    "read_yaml",
    "to_plain",
    "to_yaml",
]
