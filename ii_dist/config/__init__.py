"""WHAT to run: a frozen, strict config tree and the numbers that follow from it. No torch.

In: YAML files (`load_config`), the sizes of a data set (`data_facts`). Out: `RunConfig`, `Plan`, the names in a run
folder (`RunFolder`), and the errors, with their exit codes, that every other room raises.
"""

from ii_dist.config.augment import AugmentConfig
from ii_dist.config.compare import NEW_CONFIG_HELP, key_list, recipe_differences, recipe_sha256, refuse_unnamed_changes
from ii_dist.config.engine import EngineConfig, RuntimeConfig
from ii_dist.config.errors import CheckpointError, ClusterError, ConfigError, DataError, UserError
from ii_dist.config.facts import data_facts
from ii_dist.config.index_change import describe_change, index_facts
from ii_dist.config.index_header import IndexHeader, read_index_header
from ii_dist.config.launch import ContainerConfig, LaunchConfig
from ii_dist.config.load import dump_config, load_config
from ii_dist.config.machine import gpu_count, ranks_on_a_node
from ii_dist.config.plan import DataFacts, Plan, make_plan
from ii_dist.config.profile import ProfileConfig
from ii_dist.config.run_folder import RunFolder
from ii_dist.config.schema import (
    CheckpointConfig,
    DataConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "NEW_CONFIG_HELP",
    "AugmentConfig",
    "CheckpointConfig",
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "ContainerConfig",
    "DataConfig",
    "DataError",
    "DataFacts",
    "EngineConfig",
    "IndexHeader",
    "LaunchConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "Plan",
    "ProfileConfig",
    "RunConfig",
    "RunFolder",
    "RuntimeConfig",
    "TrainConfig",
    "UserError",
    "data_facts",
    "describe_change",
    "dump_config",
    "gpu_count",
    "index_facts",
    "key_list",
    "load_config",
    "make_plan",
    "ranks_on_a_node",
    "read_index_header",
    "recipe_differences",
    "recipe_sha256",
    "refuse_unnamed_changes",
]
