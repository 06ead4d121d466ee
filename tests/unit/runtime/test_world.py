"""Who this process is, from the environment that launchers and torchrun set."""

import pytest

from ii_dist.config import ClusterError
from ii_dist.runtime import World

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29501",
}


def test_without_a_launcher_there_is_one_rank() -> None:
    assert World.from_environ({}) == World()
    assert World.from_environ({}).world_size == 1


def test_torchrun_variables() -> None:
    world = World.from_environ(TORCHRUN | {"OMP_NUM_THREADS": "3"}, gpus=4)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (5, 8, 1, 4)
    assert (world.node_rank, world.num_nodes) == (1, 2)
    assert (world.master_addr, world.master_port, world.gpus, world.threads) == ("node1", 29501, 4, 3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"RANK": "8"}, "do not fit together"),
        ({"LOCAL_RANK": "4"}, "do not fit together"),
        ({"RANK": "-1"}, "do not fit together"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not a whole number"),
        ({"MASTER_PORT": ""}, "MASTER_PORT='' is not a whole number"),
    ],
)
def test_nonsense_is_one_line(change: dict[str, str], part: str) -> None:
    with pytest.raises(ClusterError, match=part) as caught:
        World.from_environ(TORCHRUN | change)
    assert "\n" not in str(caught.value)


def test_a_rank_without_a_world_is_refused() -> None:
    with pytest.raises(ClusterError, match="WORLD_SIZE=None"):
        World.from_environ({"RANK": "0"})
