"""The process group, and small things that all ranks say to each other.

In: a `World`. Out: an open group (NCCL + gloo with a GPU a rank, else gloo), and collectives on plain values that need
no pickle and also work, at once, without a group (one rank). Every rank must call a collective in the same order.
"""

import datetime
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ii_dist.config.errors import ClusterError
from ii_dist.runtime.world import World

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


def pick_device(world: World, wanted: str) -> torch.device:
    """The device of this rank: its own GPU where there is one for each rank of the node, else the CPU.

    `wanted` is auto, cpu or cuda. Raises ClusterError when cuda is asked for and this rank has none.
    """
    visible = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    # --gpus-per-task shows each rank one GPU of its own (index 0); --gpus-per-node shows all to all.
    enough = visible >= world.local_world_size or visible == 1 == world.gpus
    if wanted == "cpu" or (wanted == "auto" and not enough):
        return torch.device("cpu")
    if not enough:
        raise ClusterError(
            f"engine.device cuda: this node shows {visible} GPUs for {world.local_world_size} ranks; "
            "use fewer ranks a node (launch.ranks_per_node) or engine.device=cpu"
        )
    device = torch.device("cuda", world.local_rank if visible >= world.local_world_size else 0)
    torch.cuda.set_device(device)
    return device


def open_group(world: World, device: torch.device, timeout_s: float = 600.0) -> None:
    """Join the other ranks; nothing to do for one rank. Raises ClusterError (port in use, missing ranks)."""
    if world.world_size == 1:
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        # The store is made here, not by init_process_group, so that a taken port has an error of its own.
        store: Store = TCPStore(
            *(world.master_addr, world.master_port, world.world_size),
            is_master=world.rank == 0 and not world.agent_store,
            timeout=timeout,
        )
        if world.agent_store:  # it outlives a restart of the ranks: each attempt has keys of its own
            store = PrefixStore(f"ii_dist/attempt_{world.attempt}", store)
        dist.init_process_group(
            backend,
            store=store,
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise ClusterError(_rendezvous_error(world, error, timeout_s)) from None


def _rendezvous_error(world: World, error: Exception, timeout_s: float) -> str:
    where = f"{world.master_addr}:{world.master_port}"
    text = str(error).splitlines()[0]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return f"rendezvous: port {world.master_port} on {socket.gethostname()} is in use; set launch.master_port"
    if "imed out" in str(error):
        return f"rendezvous: not all {world.world_size} ranks reached {where} within {timeout_s:.0f} s; see their logs"
    return f"rendezvous at {where} failed on rank {world.rank}: {text}"


def close_group() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def new_cpu_group(timeout_s: float = 1800.0) -> "ProcessGroup | None":
    """A gloo group of its own, for a thread that must not mix its collectives with those of the main thread.

    Collective. None when there is one rank.
    """
    if not dist.is_initialized():
        return None
    group: ProcessGroup = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return group


def any_rank(flag: bool) -> bool:
    """True on every rank if it is True on one. Collective; waits."""
    if not dist.is_initialized():
        return flag
    vote = torch.tensor([int(flag)])
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def sum_over_ranks(values: Sequence[int]) -> list[int]:
    """Each value's sum over all ranks, on every rank. All rows must have the same length. Collective; waits."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums)
    return [int(value) for value in sums.tolist()]


def add_over_ranks(numbers: torch.Tensor) -> torch.Tensor:
    """`numbers`, overwritten by their sum over all ranks. Collective."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def all_gather_bytes(row: bytes, group: "ProcessGroup | None" = None) -> list[bytes]:
    """Every rank's `row`, in rank order. All rows must have the same length. Collective; waits; gloo on CPU."""
    if not dist.is_initialized():
        return [row]
    mine = torch.frombuffer(bytearray(row), dtype=torch.uint8)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    return [bytes(r.numpy().tobytes()) for r in rows]


def host_names() -> list[str]:
    """The host of every rank, in rank order, cut at 64 bytes. Collective; waits."""
    mine = socket.gethostname().encode()[:64].ljust(64, b"\0")
    return [row.rstrip(b"\0").decode(errors="replace") for row in all_gather_bytes(mine)]


def broadcast_text(text: str, group: "ProcessGroup | None" = None) -> str:
    """Rank 0's text, on every rank. Collective; waits; gloo on CPU."""
    if not dist.is_initialized():
        return text
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    length = torch.tensor([len(text.encode())])
    dist.broadcast(length, src=0, group=group)
    if dist.get_rank() != 0:
        data = torch.empty(max(1, int(length)), dtype=torch.uint8)
    dist.broadcast(data, src=0, group=group)
    return data.numpy().tobytes()[: int(length)].decode()
