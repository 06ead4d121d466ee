"""A recording of `python -m launch` on a real cluster, as text: `python -m benchmarks.launch_recording --cluster FILE`.

In: a cluster file, a SLURM that answers and has at least two free nodes. Out: commands and what they printed, every
line, with the temporary folder, the Python and the host called /shared/runs, python and login1. Four small runs: one
that is stopped, one whose rate is absurd, one that waits for the first two, and one that is only planned.
"""

import argparse
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ii_dist.config import ClusterError, RunFolder, UserError
from launch.history import read_attempts
from launch.numbers import read_numbers

CONFIG = """
data: {source: synthetic, image_size: 16, eval_resize: 16, eval_image_size: 16, synthetic_images: 64,
       synthetic_classes: 4}
model: {network: ini_resnet20, fold_width: 8}
train: {epochs: 400, global_batch: 16, eval_every_epochs: 400, max_skipped_in_a_row: 3}
optim: {warmup_epochs: 0}
metrics: {boards: [console, jsonl], log_every_steps: 5}
"""
PLAN = (
    "configs/imagenet/ini_resnet50.yaml --cluster configs/clusters/a100.yaml --nodes 2 --dry-run data.source=synthetic"
    " data.synthetic_images=1281167 launch.expected_images_per_s_per_rank=2500 launch.time_minutes=20"
)
LIMIT_S = 120.0


class Recording:
    """Runs commands and prints them with what they say."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._names = {str(runs): "/shared/runs", sys.executable: "python", socket.gethostname(): "login1"}

    def command(self, line: str) -> None:
        words = [sys.executable, "-m", "launch", *shlex.split(line)]
        where = [] if words[3] == "submit" else ["--runs-folder", str(self._runs)]
        done = subprocess.run([*words, *where], capture_output=True, text=True, timeout=LIMIT_S)
        text = f"$ python -m launch {line}\n{done.stdout}{done.stderr}"
        for found, shown in self._names.items():
            text = text.replace(found, shown)
        print(text, flush=True)

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self._runs / name)


def record(recording: Recording, config: Path, cluster: Path, runs: Path) -> None:
    """The story: plan, submit, look, stop, ask why."""
    recording.command(f"submit {PLAN} runs_folder={runs}")
    small = f"{config} --cluster {cluster} runs_folder={runs}"
    recording.command(f"submit {small} launch.nodes=1 name=first")
    recording.command(f"submit {small} launch.nodes=1 name=second optim.lr=1e30")
    recording.command(f"submit {small} launch.nodes=2 name=third launch.exclusive=true")
    recording.command(f"submit {small} launch.nodes=1 name=first")
    first, second = recording.folder("first"), recording.folder("second")
    _wait(lambda: (read_numbers(first).step or 0) >= 10, "run first makes no steps")
    _wait(lambda: any(attempt.end_s is not None for attempt in read_attempts(second)), "run second does not end")
    for line in ("status", "status first", "status third", "why second", "logs first --lines 3", "cancel first --save"):
        recording.command(line)
    _wait(lambda: any(attempt.end_s is not None for attempt in read_attempts(first)), "run first does not stop")
    for line in ("status", "why first", "cancel third"):
        recording.command(line)


def _wait(happened: Callable[[], bool], otherwise: str) -> None:
    until_s = time.monotonic() + LIMIT_S
    while not happened():
        if time.monotonic() > until_s:
            raise ClusterError(f"{otherwise} within {LIMIT_S:.0f} s; look with python -m launch why")
        time.sleep(0.5)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_recording", description=__doc__)
    parser.add_argument("--cluster", type=Path, required=True, help="such as configs/clusters/slurm_test.yaml")
    parser.add_argument(
        "--runs-folder", type=Path, help="on a file system that all nodes see (default: a temporary one)"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.runs_folder) as folder:
        runs = Path(folder)
        (runs / "trial.yaml").write_text(f"name: trial\n{CONFIG}", encoding="utf-8")
        record(Recording(runs), runs / "trial.yaml", args.cluster, runs)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
