"""WHO this process is: its rank, its group, and what the ranks agree on.

In: the environment, signals. Out: `World` (no torch), the process group and its small collectives (`group`), the
agreed stop (`stop`), step-wise seeds (`seeds`), where a step stands (`phases`), the hang watchdog, signs of life, log
lines with the rank.
`World` and `set_up_logging` are here; modules that import torch are imported by their own name.
"""

from ii_dist.runtime.heartbeat import Heartbeat, stacks_on_request
from ii_dist.runtime.logs import set_up_logging
from ii_dist.runtime.watchdog import Watchdog
from ii_dist.runtime.world import World, this_process

__all__ = ["Heartbeat", "Watchdog", "World", "set_up_logging", "stacks_on_request", "this_process"]
