"""Log lines that say which rank speaks.

In: a `World`. Out: the root logger writes ``12:00:01 rank 3 WARNING text`` to stderr; ranks above 0 only warnings.
"""

import logging
import sys

from ii_dist.runtime.world import World


def set_up_logging(world: World, verbose: bool = False) -> None:
    """Replace the root logger's handlers by one that names the rank."""
    handler = logging.StreamHandler(sys.stderr)
    who = f"rank {world.rank} " if world.world_size > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO if world.rank == 0 else logging.WARNING)
