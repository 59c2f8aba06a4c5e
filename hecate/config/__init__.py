"""The configuration of a run: typed, checked as a whole before any process starts, and frozen. Importing it needs no torch or numpy."""

from hecate.config.effective import Change, changed_computation, to_yaml
from hecate.config.load import load_config
from hecate.config.paths import find_model
from hecate.config.problems import ConfigError, Problem
from hecate.config.schema import (
    Config,
    DataConfig,
    DataSource,
    EvalConfig,
    FssdpConfig,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    RayConfig,
    RouterConfig,
)

__all__ = [
    "Change",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataSource",
    "EvalConfig",
    "FssdpConfig",
    "LoraConfig",
    "ModelConfig",
    "MoeConfig",
    "Problem",
    "RayConfig",
    "RouterConfig",
    "changed_computation",
    "find_model",
    "load_config",
    "to_yaml",
]
