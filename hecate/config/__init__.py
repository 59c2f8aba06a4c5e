"""The configuration of a run: typed, checked as a whole before any process starts, and frozen. Importing it needs no torch or numpy."""

from hecate.config.effective import Change, changed_computation, to_yaml
from hecate.config.expert_keys import LoraConfig, MoeConfig, RouterConfig
from hecate.config.files.hottest import with_experts_of_model
from hecate.config.files.paths import adapter_in, find_model, named_model
from hecate.config.load import load_config, saved_config
from hecate.config.problems import ConfigError, Problem
from hecate.config.schema import (
    Config,
    DataConfig,
    DataSource,
    EvalConfig,
    FssdpConfig,
    ModelConfig,
    RayConfig,
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
    "adapter_in",
    "changed_computation",
    "find_model",
    "load_config",
    "named_model",
    "saved_config",
    "to_yaml",
    "with_experts_of_model",
]
