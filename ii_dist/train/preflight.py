"""Checks that a run must pass before torch is imported.

In: a config, a world. Out: the plan of this attempt, or one line that says what to change.
"""

from pathlib import Path

from ii_dist.config import ConfigError, Plan, RunConfig, RunFolder, data_facts, make_plan
from ii_dist.config.run_folder import parse_step
from ii_dist.runtime import World

WEIGHTS_SUFFIX = ".safetensors"
"""How the name of a file of weights ends: it stands alone, so that its config must be named."""


def preflight(cfg: RunConfig, world: World) -> Plan:
    """The plan for this world. Raises ConfigError, DataError or ClusterError."""
    if not world.gpus:
        _refuse_gpu_settings(cfg)
    return make_plan(cfg, world.world_size, data_facts(cfg.data))


def _refuse_gpu_settings(cfg: RunConfig) -> None:
    if cfg.engine.device == "cuda":
        raise ConfigError("engine.device = 'cuda': this machine has no GPU; use engine.device=auto or cpu")
    if cfg.engine.precision == "fp16":
        raise ConfigError("engine.precision = 'fp16': this machine has no GPU; use engine.precision=fp32 or bf16")
    if cfg.data.source == "dali" and cfg.data.decode == "gpu":
        raise ConfigError("data.decode = 'gpu': this machine has no GPU; use data.decode=auto or cpu")


def config_of(path: Path) -> Path:
    """The config.yaml that belongs to a run folder or to one of its step folders."""
    folder = path.parent.parent if parse_step(path.name) is not None else path
    config = RunFolder(folder).config
    if not config.is_file():
        raise ConfigError(f"{path}: no {config} there; give a run folder or one of its checkpoints/step_... folders")
    return config
