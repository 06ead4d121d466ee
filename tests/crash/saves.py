"""Saves for the crash tests, in processes forked from one that has everything imported, and what must hold after them.

In: a run folder. Out: processes that save steps in it, as one rank or two; a check of what a later process finds there.
The state is small, its shards are cut into parts of some pages each, so that a save has every kind of call often.
"""

import errno
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ii_dist.checkpoint import (
    CheckpointStore,
    RunFacts,
    Saver,
    SaveResult,
    committed_steps,
    disk,
    find_newest,
    load_step,
    shards,
    take_lease,
    verify_step,
)
from ii_dist.config.errors import UserError
from ii_dist.config.run_folder import RunFolder
from ii_dist.config.schema import CheckpointConfig
from ii_dist.runtime.group import broadcast_text
from tests.crash.shim import Shim

KEEP_LAST = 2
TIME_LIMIT_S = 60
shards.PART_BYTES = 10_000
disk.SLAB_BYTES = disk.PAGE_BYTES


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {f"model.t{i}": torch.arange(1000.0 + 100 * i) + 1000 * step for i in range(6)}


def one_rank(
    run: RunFolder, steps: Iterable[int], told: Callable[[SaveResult], None] = lambda result: None
) -> list[SaveResult]:
    """A job of one rank, from its lease to the end; `told` hears how each save ended."""
    lease = take_lease(run, "job", attempt=time.monotonic_ns())
    store = CheckpointStore(run, RunFacts("ddp", 64), 0, 1, lease.fence, lease)
    store.sweep()
    saver = Saver(store, CheckpointConfig(keep_last=KEEP_LAST))
    results = []
    for step in steps:
        saver.save(step, 0, step, tensors_of(step), {"step": step})
        (result,) = saver.wait()
        results.append(result)
        told(result)
    saver.close()
    lease.release()
    return results


def one_of_two(run: RunFolder, rank: int, meet: Path, step: int, shim: Shim, armed: Callable[[], None]) -> SaveResult:
    """One of two ranks that save a step together; `armed` is called before the save."""
    dist.init_process_group("gloo", store=dist.FileStore(str(meet), 2), rank=rank, world_size=2)
    lease = take_lease(run, "job", attempt=time.monotonic_ns()) if rank == 0 else None
    fence = int(broadcast_text(str(lease.fence if lease else 0)))
    store = CheckpointStore(run, RunFacts("ddp", 64), rank, 2, fence, lease)
    saver = Saver(store, CheckpointConfig(keep_last=KEEP_LAST))
    dist.barrier()
    armed()
    saver.save(step, 0, step, tensors_of(step), {"step": step})
    (result,) = saver.close()
    shim.mark_if(result.ok)
    return result


def whole_step(run: RunFolder, allowed: Sequence[int]) -> int:
    """The step that a later process trusts, its values compared; 0 if there is none. Raises AssertionError."""
    found, left_out = find_newest(run.checkpoints)
    assert not left_out, left_out
    # Nor is half of an older one left at a final name.
    assert not [s for s in committed_steps(run.checkpoints) if verify_step(run.step(s))]
    step = found.step if found else 0
    assert step in allowed, f"found step {step}, not one of {allowed}"
    if found:
        tensors, scalars = load_step(found.path, found.manifest)
        assert scalars == {"step": step}
        assert tensors.keys() == tensors_of(step).keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(step).items())
    return step


def next_job(run: RunFolder) -> None:
    """The job after the crash: it takes over, sweeps, saves on."""
    results = one_rank(run, [1000, 1010])
    assert [(r.ok, r.message) for r in results] == [(True, "")] * 2, results
    whole_step(run, [1010])
    assert committed_steps(run.checkpoints) == [1000, 1010]
    left = [p.name for p in run.checkpoints.iterdir() if p.name.startswith(".")]
    assert not left, left
    left = sorted(p.name for p in run.root.iterdir())
    assert left == [".lease.lock", "checkpoints", "lease.json"], left


def check_failure(results: Sequence[SaveResult], error: int) -> None:
    """What a user is told when one call of a save failed: one line with the path and, of a full disk, the room."""
    for result in results:
        assert "\n" not in result.message
        if not result.ok:
            assert result.message.startswith(f"step {result.step} not saved: ")
        if result.message:
            assert os.strerror(error) in result.message, result.message
            assert "/run" in result.message, result.message
            assert error != errno.ENOSPC or "bytes free" in result.message, result.message


def forked(act: Callable[[], object]) -> int:
    """Run `act` in a forked process that has TIME_LIMIT_S; its pid. Its report is the JSON in <pid>.said."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(TIME_LIMIT_S)
        code = 1
        try:
            Path(f"{os.getpid()}.said").write_text(json.dumps(act()))
            code = 0
        except UserError as error:
            Path(f"{os.getpid()}.said").write_text(json.dumps(str(error)))
            code = 4
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> tuple[int, object]:
    """Exit code (a signal: negative) and report of a forked process."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = Path(f"{pid}.said")
    report = json.loads(said.read_text()) if said.exists() else None
    said.unlink(missing_ok=True)
    return code, report
