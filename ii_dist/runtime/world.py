"""Which rank this process is. The only place in `ii_dist` that knows the environment; imports no torch.

In: the variables that torchrun, `launch` or a user set. Out: a frozen `World`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ii_dist.config.errors import ClusterError
from ii_dist.config.machine import gpu_count


@dataclass(frozen=True, slots=True)
class World:
    """This process among all processes of the run.

    job and attempt name one attempt of a chain of jobs; master_port 0 means: no rendezvous (one rank).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    job: str = "local"
    attempt: int = 0
    gpus: int = 0
    """GPUs that this process may use."""
    agent_store: bool = False
    """torchrun's agent already serves the rendezvous store at master_port; otherwise rank 0 serves it."""
    threads: int = 0
    """OMP_NUM_THREADS, which a launcher or a user may have set; 0 = not set."""
    beat_file: str = ""
    """Where the supervisor of this node looks for signs of life; "" = nobody does."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], gpus: int = 0) -> "World":
        """Read RANK, WORLD_SIZE, ... (torchrun's names). Without RANK: one rank. Raises ClusterError on nonsense."""
        threads = _number(environ, "OMP_NUM_THREADS", 0)
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            return cls(job=environ.get("II_DIST_JOB", "local"), gpus=gpus, threads=threads)
        world_size = _number(environ, "WORLD_SIZE", None)
        local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size)
        world = cls(
            rank=_number(environ, "RANK", None),
            world_size=world_size,
            local_rank=_number(environ, "LOCAL_RANK", 0),
            local_world_size=local_world_size,
            node_rank=_number(environ, "GROUP_RANK", 0),
            num_nodes=max(1, world_size // max(1, local_world_size)),
            master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_number(environ, "MASTER_PORT", 29500),
            job=environ.get("II_DIST_JOB") or environ.get("TORCHELASTIC_RUN_ID", "local"),
            attempt=_number(environ, "II_DIST_ATTEMPT", _number(environ, "TORCHELASTIC_RESTART_COUNT", 0)),
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            gpus=gpus,
            threads=threads,
            beat_file=environ.get("II_DIST_BEATS", ""),
        )
        if not 0 <= world.rank < world.world_size or not 0 <= world.local_rank < world.local_world_size:
            raise ClusterError(
                f"environment: RANK={world.rank} WORLD_SIZE={world.world_size} LOCAL_RANK={world.local_rank} "
                f"LOCAL_WORLD_SIZE={world.local_world_size} do not fit together; start ranks with launch or torchrun"
            )
        return world


def _number(environ: Mapping[str, str], name: str, default: int | None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ClusterError(
            f"environment: {name}={text!r} is not a whole number; start ranks with launch or torchrun"
        ) from None


def this_process() -> World:
    """The world as this process's own environment and device files tell it."""
    return World.from_environ(os.environ, gpus=gpu_count(os.environ))


def tell_libraries(**variables: str) -> None:
    """Set variables that a library reads from the environment and nowhere else."""
    os.environ.update(variables)
