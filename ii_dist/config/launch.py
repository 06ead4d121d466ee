"""What to ask the machine or the cluster for: the `launch` slice, and the words that may reach a scheduler.

In: plain values. Out: `LaunchConfig`. A newline in one of these values would be a command on a node, so each is a
number or matches an allow-list.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from ii_dist.config.slices import Count, NonNegative, Slice, Word
from ii_dist.config.supervision import SupervisionConfig

Words = Annotated[tuple[Word, ...], Strict(False)]
# A module as `module avail` writes it: cuda/12.4, gcc/13.2.0+nvptx.
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*){0,4}$")]
Modules = Annotated[tuple[ModuleName, ...], Strict(False)]
# Two features joined by & or |, as sbatch takes them.
Features = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}([&|][A-Za-z0-9][A-Za-z0-9._-]{0,63}){0,7}$")]
# A path, or a name in a registry: nvcr.io#nvidia/pytorch:25.01-py3, docker://ubuntu:24.04.
Image = Annotated[str, Field(pattern=r"^([A-Za-z0-9/][A-Za-z0-9._/:@#+-]{0,255})?$")]
Mount = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/+@-]*:/[A-Za-z0-9._/+@-]*(:r[ow])?$")]
Mounts = Annotated[tuple[Mount, ...], Strict(False)]
Program = Annotated[str, Field(pattern=r"^[A-Za-z0-9/][A-Za-z0-9._/+-]{0,255}$")]
Value = Annotated[str, Field(pattern=r"^[A-Za-z0-9._,:;=/@%+ -]{0,512}$")]

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
OWN_VARIABLES = re.compile(
    r"(SLURM|SBATCH|SRUN|SUBMITIT|II_DIST|TORCHELASTIC)_.*|PYTHON(PATH|SAFEPATH|HOME|STARTUP)|LD_PRELOAD|BASH_ENV|ENV|IFS"
    r"|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|LOCAL_WORLD_SIZE|MASTER_(ADDR|PORT)"
)
"""Variables of the scheduler, of the launcher itself, and those that would run code of their own."""


class ContainerConfig(Slice):
    """The image that a job runs in. It holds Python, torch and Submitit; the code comes from the run folder."""

    kind: Literal["none", "apptainer", "pyxis"] = "none"
    """apptainer = `apptainer exec` on each node; pyxis = srun's own --container-image."""
    image: Image = ""
    """File (.sif, .sqsh) or name in a registry."""
    mounts: Mounts = ()
    """FROM:TO or FROM:TO:ro. The run folder and an absolute `data.root` are mounted without asking."""
    python: Program = "python3"
    """Python of the image."""

    @model_validator(mode="after")
    def _image_named(self) -> Self:
        if self.kind != "none" and not self.image:
            raise ValueError(f"image '': needs a file or a name for container.kind {self.kind}")
        return self


class LaunchConfig(SupervisionConfig):
    """What to ask the machine or the cluster for."""

    executor: Literal["local", "slurm"] = "local"
    nodes: Count = 1
    ranks_per_node: Literal["auto"] | Count = "auto"
    """auto = one a GPU; on a machine without a GPU, `cpu_ranks_per_node`."""
    cpu_ranks_per_node: Count = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_rank: Annotated[int, Field(ge=0)] = 0
    """Cores a rank on SLURM; 0 = leave to the cluster."""
    mem_gb: Annotated[int, Field(ge=0)] = 0
    """Memory of a node that the job may use; 0 = leave to the cluster."""
    time_minutes: Count = 1440
    """Time limit of one job; a run may be a chain of several."""
    signal_lead_s: Annotated[int, Field(ge=10)] = 120
    """Seconds before the time limit at which SLURM asks the run to stop."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Features | None = None
    """Feature that the nodes must have, or several joined by & or |."""
    reservation: Word | None = None
    exclude: Words = ()
    """Nodes that the job must not get."""
    exclusive: bool = False
    """Whole nodes, whatever else is asked for."""
    modules: Modules = ()
    """Loaded with `module load` before anything else of a job."""
    environment: dict[str, Value] = Field(default_factory=dict)
    """Variables of every rank, such as NCCL_DEBUG: WARN. Those that the launcher sets itself are refused."""
    container: ContainerConfig = ContainerConfig()
    network_interface: Word | None = None
    """Interface for gloo and NCCL, such as eth0 or ib0."""
    master_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the first rank's rendezvous; 0 = a free one (local), one by job id (SLURM)."""
    expected_images_per_s_per_rank: NonNegative = 0.0
    """Training speed of one rank, for the account of a dry run; 0 = what this run measured before, or unknown."""

    @model_validator(mode="after")
    def _variables_of_its_own(self) -> Self:
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"environment {name!r}: needs a name of letters, digits and _")
            if OWN_VARIABLES.fullmatch(name):
                raise ValueError(f"environment {name}: is set by the launcher or the scheduler; remove it")
        return self
