"""The part of `launch` that the supervisors of a job go by: hangs, restarts, requeue, the check of the nodes.

In: plain values. Out: the base of `LaunchConfig`.
"""

from typing import Annotated

from pydantic import Field

from ii_dist.config.slices import NonNegative, Positive, Slice


class SupervisionConfig(Slice):
    """What each node's supervisor watches and does."""

    hang_after_s: Positive = 30.0
    """Seconds without a sign of life of a rank, after its first steps, that count as a hang; or `hang_steps` steps,
    where these take longer. Saving, and the first steps of each kind, have `start_timeout_s`."""
    hang_steps: Positive = 5.0
    """Median steps without a sign of life that count as a hang."""
    start_timeout_s: NonNegative = 1800.0
    """The same before the first steps: imports, rendezvous, compilation, the first read; 0 = no limit."""
    max_restarts: Annotated[int, Field(ge=0, le=100)] = 3
    """Restarts in a row that bring no new checkpoint, after which the run ends; 0 = no restarts at all."""
    requeue: bool = True
    """On SLURM: go on by itself after a time limit, a preemption or the loss of a node."""
    bind_cores: bool = True
    """On SLURM: give each rank of a node cores of its own."""
    preflight: bool = False
    """Measure every node before training (less than a minute): rates, clocks, disks, versions; name what stands out,
    and avoid it in the next attempt."""
