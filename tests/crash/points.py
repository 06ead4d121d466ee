"""Every point of a save is struck, and a later process looks: ``python -m tests.crash.points WORK [census]``.

Under the shim; `census`: one undisturbed save only. One process imports torch; each save is a process forked from it,
so that hundreds take seconds. Prints one JSON object: scenario -> {"points": how many, "found": step -> times, "wrong":
what did not hold}. Scenarios: `<base>/<mode>` with

base     first   nothing is there yet: not even the folder of the runs
         third   steps 10 and 20 are there, 10 is deleted after the save
         again   step 30 is there and damaged, and is made anew
         pair_0  like third, by two ranks of which rank 0 is struck; pair_1: rank 1
mode     kill, tear (half a write, then the kill), full (the disk is, for one call)
         power   a power cut after any call: what was not synced is lost, or any part of it
"""

import collections
import errno
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ii_dist.config.run_folder import RunFolder
from tests.crash.disk_model import Disk, Tree, write_tree
from tests.crash.saves import check_failure, ended, forked, next_job, one_of_two, one_rank, whole_step
from tests.crash.shim import FAIL, KILL, TEAR, Shim, read_log

NEW = 30
MODES = {"kill": (KILL, 0), "tear": (TEAR, 0), "full": (FAIL, errno.ENOSPC)}
RANDOM_CUTS = 3


class Outcome:
    """What a scenario's points led to."""

    def __init__(self) -> None:
        self.points = 0
        self.found: collections.Counter[int] = collections.Counter()
        self.wrong: list[str] = []

    def judge(self, where: str, act: Callable[[], int]) -> None:
        """Count the step that `act` finds; write down why it could not."""
        try:
            self.found[act()] += 1
        except AssertionError:
            self.wrong.append(f"{where}: {traceback.format_exc(limit=-2)}")

    def told(self) -> dict[str, object]:
        return {"points": self.points, "found": dict(sorted(self.found.items())), "wrong": self.wrong}


class Points:
    """The scenarios, in a folder of their own."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._shim = Shim()
        self._runs = work / "disk" / "runs"
        self._log = work / "calls"
        self._draw = random.Random(7)

    def _base(self, name: str) -> Path:
        """Make the state before the save, once; a folder that holds the folder `runs`."""
        base = self._work / f"base_{name}"
        if not base.exists():
            (base / "runs").mkdir(parents=True)
            run = RunFolder(base / "runs" / "run")
            steps = {"first": [], "third": [10, 20], "again": [10, 20, 30]}[name]
            if steps:
                assert ended(forked(lambda: len(one_rank(run, steps))))[0] == 0
            else:
                (base / "runs").rmdir()
            if name == "again":
                os.truncate(run.step(30) / "state.json", 3)
        return base

    def _fresh(self, base: Path) -> RunFolder:
        shutil.rmtree(self._work / "disk", ignore_errors=True)
        shutil.copytree(base, self._work / "disk")
        self._log.unlink(missing_ok=True)
        return RunFolder(self._runs / "run")

    def _arm(self, fault_at: int = 0, mode: int = 0, error: int = 0) -> None:
        self._shim.arm(self._work / "disk", self._log, fault_at, mode, error)

    def one(self, base: str, mode: str) -> dict[str, object]:
        """Strike every call of a save of one rank."""
        outcome = Outcome()
        how, error = MODES[mode]
        steps = [NEW, NEW + 10] if how == FAIL else [NEW]
        code = 1
        for n in range(1, 10_000):
            run = self._fresh(self._base(base))

            def job(n: int = n, run: RunFolder = run) -> object:
                self._arm(n, how, error)
                calls: list[int] = []
                results = one_rank(run, steps, lambda result: calls.append(self._shim.calls()))
                if how == FAIL:
                    check_failure(results, error)
                return {"calls": calls[0], "ok": [r.ok for r in results]}

            code, said = ended(forked(job))
            if code == 0 and isinstance(said, dict) and said["calls"] < n:
                outcome.points = n - 1
                return outcome.told()
            outcome.judge(f"{base}/{mode} {n}", lambda: self._after_one(base, how, code, said, run))  # noqa: B023
        raise AssertionError("a save without end")

    def _after_one(self, base: str, how: int, code: int, said: object, run: RunFolder) -> int:
        old = 0 if base == "first" else 20
        if how != FAIL:
            assert code == -signal.SIGKILL, (code, said)
            step = whole_step_or_damaged(run, [old, NEW], base == "again")
        elif isinstance(said, dict):
            # The job went on; a save that failed was made up for by the next one.
            assert code == 0
            assert said["ok"][1] or said["ok"][0], said
            step = whole_step(run, [NEW + 10] if said["ok"][1] else [NEW])
        else:
            # The call was one of the lease's: refused before anything was written, in one line.
            assert code == 4, (code, said)
            assert isinstance(said, str)
            assert "\n" not in said
            step = whole_step_or_damaged(run, [old], base == "again")
        next_job(run)
        return step

    def pair(self, victim: int, mode: str) -> dict[str, object]:
        """Strike every call of one of two ranks: the other one reports an error and leaves."""
        outcome = Outcome()
        for n in range(1, 10_000):
            run = self._fresh(self._base("third"))
            pids, codes, said = self._run_pair(run, victim, n, MODES[mode][0])
            if codes[victim] == 0:
                assert codes == [0, 0], codes
                outcome.points = n - 1
                return outcome.told()
            outcome.judge(f"pair_{victim}/{mode} {n}", lambda: self._after_pair(run, victim, pids, codes, said))  # noqa: B023
        raise AssertionError("a save without end")

    def _run_pair(self, run: RunFolder, victim: int, n: int, how: int) -> tuple[list[int], list[int], list[object]]:
        meet = self._work / "meet"
        meet.unlink(missing_ok=True)

        def rank_job(rank: int) -> object:
            def armed() -> None:
                self._arm(*((n, how) if rank == victim else (0, 0)))

            result = one_of_two(run, rank, meet, NEW, self._shim, armed)
            return {"ok": result.ok, "message": result.message}

        pids = [forked(lambda rank=rank: rank_job(rank)) for rank in range(2)]  # type: ignore[misc]
        codes, said = zip(*(ended(pid) for pid in pids), strict=True)
        return pids, list(codes), list(said)

    def _after_pair(self, run: RunFolder, victim: int, pids: list[int], codes: list[int], said: list[object]) -> int:
        other = said[1 - victim]
        assert codes[victim] == -signal.SIGKILL, codes
        assert codes[1 - victim] == 0, f"the other rank ended with {codes[1 - victim]}: it hung, or did not report"
        assert isinstance(other, dict)
        step = whole_step(run, [20, NEW])
        if other["ok"]:
            assert step == NEW
        else:
            assert other["message"].startswith(f"step {NEW} not saved: a rank was lost while saving"), other
        disk = self._replayed(self._work / "base_third")
        self._look(disk.without(pids[victim]), [step] if victim == 1 else [20, NEW])
        self._look(disk.only_synced(), [NEW] if other["ok"] else [20, NEW])
        next_job(run)
        return step

    def power(self, base: str, save: Callable[[RunFolder], None]) -> dict[str, object]:
        """Cut the power after every call of one save that nothing disturbed."""
        outcome = Outcome()
        start = self._base("third" if base == "pair" else base)
        save(self._fresh(start))
        calls = read_log(self._log)
        shutil.rmtree(self._work / "disk")
        (self._work / "disk").symlink_to(start)  # the model's paths; only read
        disk = Disk(self._work / "disk")
        (self._work / "disk").unlink()
        old, marked = (0 if base == "first" else 20), False
        for n, call in enumerate(calls):
            disk.apply(call)
            marked = marked or call.op == "A"
            allowed = [NEW] if marked else [old, NEW]
            for kind, tree in self._cuts(disk):
                outcome.judge(
                    f"{base}/power {n} ({call.op} {call.path}) {kind}",
                    lambda tree=tree, allowed=allowed: self._look(tree, allowed, base == "again"),  # type: ignore[misc]
                )
        outcome.points = len(calls)
        return outcome.told()

    def _cuts(self, disk: Disk) -> Iterator[tuple[str, Tree]]:
        yield "only what was synced", disk.only_synced()
        yield "names without content", disk.names_without_content()
        yield "zeros for content", disk.zeros_for_content()
        for number in range(RANDOM_CUTS):
            yield f"any of it, {number}", disk.any_of_it(self._draw)

    def _look(self, tree: Tree, allowed: list[int], damaged: bool = False) -> int:
        """What is found on a disk that holds `tree`."""
        disk = self._work / "after"
        shutil.rmtree(disk, ignore_errors=True)
        write_tree(tree, disk)
        return whole_step_or_damaged(RunFolder(disk / "runs" / "run"), allowed, damaged)

    def _replayed(self, start: Path) -> Disk:
        here = self._work / "disk"
        here.rename(self._work / "kept")
        here.symlink_to(start)
        disk = Disk(here)
        here.unlink()
        (self._work / "kept").rename(here)
        for call in read_log(self._log):
            disk.apply(call)
        return disk

    def undisturbed(self, run: RunFolder) -> None:
        def job() -> object:
            self._arm()
            return [r.ok for r in one_rank(run, [NEW], lambda result: self._shim.mark_if(result.ok))]

        assert ended(forked(job)) == (0, [True])

    def undisturbed_pair(self, run: RunFolder) -> None:
        assert self._run_pair(run, 0, 0, 0)[1] == [0, 0]

    def census(self) -> dict[str, dict[str, object]]:
        """One undisturbed save: its calls are in the log."""
        self.undisturbed(self._fresh(self._base("third")))
        return {}


def whole_step_or_damaged(run: RunFolder, allowed: list[int], damaged: bool) -> int:
    """`damaged`: the step to be made anew may still be there as it was, and is then left out."""
    if damaged and (run.step(NEW) / "state.json").is_file() and (run.step(NEW) / "state.json").stat().st_size == 3:
        aside = run.root / "aside"
        run.step(NEW).rename(aside)
        try:
            return whole_step(run, allowed)
        finally:
            aside.rename(run.step(NEW))
    return whole_step(run, allowed)


def main(work: Path, census: bool) -> dict[str, dict[str, object]]:
    work.mkdir()
    os.chdir(work)  # reports of the forked processes
    points = Points(work)
    if census:
        return points.census()
    found = {f"third/{mode}": points.one("third", mode) for mode in MODES}
    for base in ("first", "again"):
        found[f"{base}/kill"] = points.one(base, "kill")
    for victim in (0, 1):
        for mode in ("kill", "tear"):
            found[f"pair_{victim}/{mode}"] = points.pair(victim, mode)
    for base in ("first", "third", "again"):
        found[f"{base}/power"] = points.power(base, points.undisturbed)
    found["pair/power"] = points.power("pair", points.undisturbed_pair)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), census=sys.argv[2:] == ["census"])))
