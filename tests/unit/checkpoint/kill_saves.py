"""Forked processes that save a step and are killed: ``python kill_saves.py MODE FOLDER``, run by test_checkpoint_kill.

Modes: ``lease`` dies before the k-th change of the disk while taking a lease, for every k; ``random`` is killed from
outside at random moments of larger saves (every point of a small one: tests/crash). After each death the next process
must find a whole step, sweep, and save on. Prints one JSON object.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ii_dist.checkpoint import CheckpointStore, RunFacts, Saver, committed_steps, find_newest, load_step, take_lease
from ii_dist.config.run_folder import RunFolder
from ii_dist.config.schema import CheckpointConfig

FACTS = RunFacts("ddp", 64)


def tensors_of(step: int, size: int = 1000) -> dict[str, torch.Tensor]:
    return {f"model.t{i}": torch.full((size + i,), float(step)) for i in range(3)}


def save(folder: RunFolder, steps: Sequence[int], size: int = 1000, armed: Callable[[], None] = lambda: None) -> None:
    lease = take_lease(folder, "job", attempt=time.monotonic_ns())
    store = CheckpointStore(folder, FACTS, 0, 1, lease.fence, lease)
    store.sweep()
    saver = Saver(store, CheckpointConfig(keep_last=2))
    armed()
    for step in steps:
        saver.save(step, 0, step, tensors_of(step, size), {"step": step})
        for result in saver.wait():
            assert result.ok, result.message
            assert not result.message, result.message
    saver.close()
    lease.release()


def arm(k: int) -> None:
    """Die by SIGKILL before this process's k-th change of the disk (from now on)."""
    seen: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            if name == "open" and not (isinstance(args[1], int) and args[1] & (os.O_CREAT | os.O_TRUNC)):
                return real(*args, **kwargs)
            seen.append(name)
            if len(seen) == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, call)

    for name in ("open", "writev", "fsync", "rename", "mkdir", "unlink", "rmdir"):
        wrap(name)


def in_child(act: Callable[[], None]) -> tuple[int, int]:
    """Run `act` in a forked process; (pid, wait status)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return pid, os.waitpid(pid, 0)[1]


def check_whole(folder: RunFolder, allowed: Sequence[int], size: int = 1000) -> int:
    found, left_out = find_newest(folder.checkpoints)
    assert found is not None, "no whole step"
    assert not left_out, left_out
    assert found.step in allowed, found.step
    tensors, scalars = load_step(found.path, found.manifest)
    assert scalars == {"step": found.step}
    assert all(torch.equal(tensors[n], t) for n, t in tensors_of(found.step, size).items())
    return found.step


def goes_on(folder: RunFolder, size: int = 1000) -> None:
    """What the next job does after the crash."""
    save(folder, [1000], size)
    check_whole(folder, [1000], size)
    assert len(committed_steps(folder.checkpoints)) == 2
    left = [p.name for p in folder.checkpoints.iterdir() if p.name.startswith(".")]
    assert not left, left


def every_lease_point(work: Path) -> dict[str, object]:
    k = 0
    fences = []
    folder = RunFolder(work / "lease")
    while True:
        k += 1

        def act(k: int = k) -> None:
            arm(k)
            take_lease(folder, "job")

        _, status = in_child(act)
        lease = take_lease(folder, "next")
        fences.append(lease.fence)
        lease.release()
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            assert fences == sorted(set(fences)), fences
            left = sorted(p.name for p in folder.root.iterdir())
            assert left == [".lease.lock", "lease.json"], left
            return {"points": k - 1, "fences": fences}


def at_random(base: RunFolder, work: Path, rounds: int, size: int, within_s: float) -> dict[str, object]:
    draw = random.Random(3)
    newest: list[int] = []
    for number in range(rounds):
        folder = RunFolder(work / f"r{number}")
        shutil.copytree(base.root, folder.root)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                save(folder, range(30, 1000, 10), size, armed=lambda w=writer: (os.write(w, b"x"), None)[1])
            finally:
                os._exit(1)
        os.read(reader, 1)
        time.sleep(draw.uniform(0.0, within_s))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
        newest.append(check_whole(folder, range(20, 1000, 10), size))
        assert in_child(lambda folder=folder: goes_on(folder, size))[1] == 0
        shutil.rmtree(folder.root)
    return {"rounds": rounds, "newest": newest}


def main(mode: str, work: Path) -> dict[str, object]:
    if mode == "lease":
        return every_lease_point(work)
    base, size = RunFolder(work / "base"), 500_000
    start = time.monotonic()
    save(base, [10, 20], size)
    # Some saves long, however fast the machine is just now.
    return at_random(base, work, rounds=12, size=size, within_s=3 * (time.monotonic() - start))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
