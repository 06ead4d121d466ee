"""The cores of this node.

In: a number of ranks. Out: cores for each.
"""

import os


def cores_of_a_rank(ranks_per_node: int) -> int:
    """Cores that this process may use, shared among the ranks of the node; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_per_node)
