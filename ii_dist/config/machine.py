"""What this machine has, read without torch, and the ranks that a node gets.

In: environment, config. Out: counts.
"""

from collections.abc import Mapping
from pathlib import Path

from ii_dist.config.schema import RunConfig


def ranks_on_a_node(cfg: RunConfig, gpus_here: int) -> int:
    """`launch.ranks_per_node`, or with auto one rank a GPU, or `launch.cpu_ranks_per_node` without GPUs.

    On SLURM the GPUs are the ones asked for (`launch.gpus_per_node`): those of the login node say nothing.
    """
    asked = cfg.launch.ranks_per_node
    if asked != "auto":
        return asked
    if cfg.launch.executor == "slurm":
        gpus = cfg.launch.gpus_per_node
    else:
        gpus = 0 if cfg.engine.device == "cpu" else gpus_here
    return gpus or cfg.launch.cpu_ranks_per_node


def gpu_count(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a process started with `environ` may use.

    Counts device files, so that a launcher need not import torch; CUDA_VISIBLE_DEVICES narrows them.
    """
    present = sum(1 for p in devices.glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit())
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [part for part in visible.split(",") if part.strip() not in ("", "-1")]
    return min(present, len(named))
