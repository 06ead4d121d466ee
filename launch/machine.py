"""The cores of this node.

In: a number of ranks. Out: how many cores each may use, and which.
"""

import os
from itertools import pairwise
from pathlib import Path


def cores_of_a_rank(ranks_per_node: int) -> int:
    """Cores that this process may use, shared among the ranks of the node; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_per_node)


def share_cores(ranks_per_node: int, topology: Path = Path("/sys/devices/system/cpu")) -> list[tuple[int, ...]]:
    """Cores of its own for each rank: neighbours of one socket, both threads of a core together.

    Empty lists (no binding) where there are fewer cores than ranks.
    """
    cores = sorted(os.sched_getaffinity(0), key=lambda cpu: (*_socket_and_core(topology, cpu), cpu))
    if len(cores) < ranks_per_node:
        return [()] * ranks_per_node
    edges = [len(cores) * rank // ranks_per_node for rank in range(ranks_per_node + 1)]
    return [tuple(sorted(cores[first:last])) for first, last in pairwise(edges)]


def _socket_and_core(topology: Path, cpu: int) -> tuple[int, int]:
    try:
        place = topology / f"cpu{cpu}" / "topology"
        return int((place / "physical_package_id").read_text()), int((place / "core_id").read_text())
    except (OSError, ValueError):
        return 0, cpu
