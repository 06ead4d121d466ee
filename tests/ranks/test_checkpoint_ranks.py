"""Two real processes write one checkpoint: together, with one failing disk, with one of them killed."""

import json
import textwrap
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ii_dist.checkpoint import committed_steps, find_newest, load_step
from ii_dist.config.run_folder import RunFolder
from tests.ranks.start import finish, output, start_ranks

pytestmark = pytest.mark.ranks

SCRIPT = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from ii_dist.checkpoint import CheckpointStore, RunFacts, Saver, committed_steps, take_lease, verify_step
from ii_dist.config.run_folder import RunFolder
from ii_dist.config.schema import CheckpointConfig
from ii_dist.runtime.group import broadcast_text, close_group, open_group
from ii_dist.runtime.world import World

def tensors_of(step):
    names = [f"model.layer{i}.weight" for i in range(6)]
    return {name: torch.full((1000 + i,), step + i / 8) for i, name in enumerate(names)}

world = World.from_environ(os.environ)
folder = RunFolder(Path(sys.argv[1]))
open_group(world, torch.device("cpu"), timeout_s=60)
lease = take_lease(folder, "test") if world.rank == 0 else None
fence = int(broadcast_text(str(lease.fence) if lease else ""))
store = CheckpointStore(folder, RunFacts("ddp", 64), world.rank, world.world_size, fence, lease)
saver = Saver(store, CheckpointConfig(keep_last=2), timeout_s=60)
seen = {}

def save(step):
    tensors = tensors_of(step)
    saver.save(step, 0, step, tensors, {"step": step})
    for tensor in tensors.values():
        tensor.fill_(-1.0)

def note(name):
    (result,) = saver.wait()
    left = [p.name for p in folder.checkpoints.iterdir() if p.name.startswith(".")] if world.rank == 0 else []
    seen[name] = {"step": result.step, "ok": result.ok, "message": result.message, "bytes": result.bytes,
                  "steps": committed_steps(folder.checkpoints), "hidden": left}
    dist.barrier()

# The main threads use their own group all the while.
save(10)
for _ in range(50):
    total = torch.ones(1000)
    dist.all_reduce(total)
    assert total.sum() == 2000
note("good")

if world.rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
save(20)
note("disk of rank 1 fails")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
seen["old one"] = verify_step(folder.step(10))

dist.barrier()
save(30)
note("tried again")

real = os.fsync
if world.rank == 1:
    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
save(40)
(result,) = saver.wait()
seen["rank 1 is killed"] = {"ok": result.ok, "message": result.message, "steps": committed_steps(folder.checkpoints),
                            "hidden": [p.name for p in folder.checkpoints.iterdir() if p.name.startswith(".")]}
saver.close()
lease.release()
print(json.dumps(seen), flush=True)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    place = tmp_path_factory.mktemp("ranks")
    (place / "script.py").write_text(textwrap.dedent(SCRIPT))
    folder = RunFolder(place / "run")
    processes = start_ranks([str(place / "script.py"), str(folder.root)], 2, place / "out", PYTHONPATH=".")
    codes = finish(processes)
    assert codes == [0, -9], output(place / "out")
    return folder, json.loads((place / "out" / "rank_0.out").read_text().splitlines()[-1])


def test_together(told: tuple[RunFolder, dict[str, Any]]) -> None:
    _, seen = told
    assert (seen["good"]["ok"], seen["good"]["message"]) == (True, "")
    assert (seen["good"]["steps"], seen["good"]["hidden"]) == ([10], [])
    assert seen["good"]["bytes"] > 6 * 4000


def test_disk_of_one_rank_fails(told: tuple[RunFolder, dict[str, Any]]) -> None:
    _, seen = told
    failed = seen["disk of rank 1 fails"]
    assert (failed["step"], failed["ok"], failed["steps"], failed["hidden"]) == (20, False, [10], [])
    assert failed["message"].startswith("step 20 not saved: rank 1: ")
    assert "File too large" in failed["message"]
    assert seen["old one"] == []
    assert (seen["tried again"]["ok"], seen["tried again"]["steps"]) == (True, [10, 30])


def test_one_rank_is_killed(told: tuple[RunFolder, dict[str, Any]]) -> None:
    _, seen = told
    killed = seen["rank 1 is killed"]
    assert (killed["ok"], killed["steps"], killed["hidden"]) == (False, [10, 30], [])
    assert killed["message"].startswith("step 40 not saved: a rank was lost while saving")
    assert "\n" not in killed["message"]


def test_what_two_ranks_wrote_is_read_by_one(told: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, _ = told
    assert committed_steps(folder.checkpoints) == [10, 30]
    found, left_out = find_newest(folder.checkpoints)
    assert found is not None
    assert left_out == []
    tensors, scalars = load_step(found.path, found.manifest)
    assert scalars == {"step": 30}
    merged = {n: t for shard in found.manifest.shards for n, t in load_file(found.path / shard.file).items()}
    assert {entry.shard for entry in found.manifest.tensors.values()} == {s.file for s in found.manifest.shards}
    assert merged.keys() == tensors.keys()
    for i in range(6):
        expected = torch.full((1000 + i,), 30 + i / 8)
        assert torch.equal(tensors[f"model.layer{i}.weight"], expected)
        assert torch.equal(merged[f"model.layer{i}.weight"], expected)
