"""WHAT STAYS: sharded checkpoints that are committed or not there, and the lease on a run folder.

In: named tensors and JSON scalars of a step, from every rank. Out: step folders on disk, the newest that verifies,
its tensors again. `lease`: who owns the folder. `saver` (background) > `staging` (copies in memory), `store` (write
order, commit, delete) > `shards` (bytes of one file), `manifest` (what they must be), `retention` (which steps go).
`finder` (what to trust) > `loader` (read it); `weights`: for programs that only want the network. `disk`: flushed
calls. For tools: `streams` (tensor files in pieces), `casting` (fp16, bf16), `averaging`; `deepspeed_folder` and
`dcp_folder` read what other programs saved, through `foreign`, the one file that opens pickles. Torch is imported only
by `saver`, `staging`, `loader` and what reads foreign folders, when first asked for.
"""

from typing import TYPE_CHECKING

from ii_dist.checkpoint.finder import FoundStep, LeftOut, committed_steps, find_newest, step_folders, verify_step
from ii_dist.checkpoint.lease import Lease, take_lease
from ii_dist.checkpoint.manifest import Manifest, read_manifest
from ii_dist.checkpoint.retention import steps_to_delete
from ii_dist.checkpoint.shards import assign_shards
from ii_dist.checkpoint.store import CheckpointStore, RunFacts

if TYPE_CHECKING:
    from ii_dist.checkpoint.loader import load_step
    from ii_dist.checkpoint.saver import Saver, SaveResult

__all__ = [
    "CheckpointStore",
    "FoundStep",
    "Lease",
    "LeftOut",
    "Manifest",
    "RunFacts",
    "SaveResult",
    "Saver",
    "assign_shards",
    "committed_steps",
    "find_newest",
    "load_step",
    "read_manifest",
    "step_folders",
    "steps_to_delete",
    "take_lease",
    "verify_step",
]


def __getattr__(name: str) -> object:
    if name == "load_step":
        from ii_dist.checkpoint.loader import load_step

        return load_step
    if name in ("SaveResult", "Saver"):
        from ii_dist.checkpoint import saver

        return getattr(saver, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
