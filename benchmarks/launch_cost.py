"""What a launch costs, from sbatch to the first step: `python -m benchmarks.launch_cost --cluster FILE`.

In: a cluster file, a SLURM that answers. Out: a table of the phases of a few launches of a small network on synthetic
images, from the times that the files of the run folders tell. Every launch has a run folder of its own, removed at the
end.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

from ii_dist.config import ClusterError, RunFolder, UserError
from launch.records import read_record
from launch.scheduler import may_go_on

CONFIG = """
data: {source: synthetic, image_size: 16, eval_resize: 16, eval_image_size: 16, synthetic_images: 256,
       synthetic_classes: 4}
model: {network: ini_resnet20, fold_width: 8}
train: {epochs: 1, global_batch: 64}
optim: {warmup_epochs: 0}
metrics: {boards: [jsonl], log_every_steps: 1}
"""
PHASES = (
    ("submitted", "config, snapshot, sbatch"),
    ("step", "queue, srun, Python, Submitit"),
    ("supervisor", "check of the files, supervisor"),
    ("ranks", "ranks started"),
    ("group", "imports, rendezvous, lease"),
    ("data", "data opened"),
    ("network", "network, engine, boards"),
    ("first_step", "first batch, first step"),
)
LIMIT_S = 300.0


def measure(cluster: Path, runs_folder: Path, number: int) -> dict[str, float]:
    """Seconds of each phase of one launch. Raises ClusterError where it does not come to a first step."""
    config = runs_folder / f"cost-{number}.yaml"
    config.write_text(f"name: cost-{number}\nruns_folder: {runs_folder}\n{CONFIG}", encoding="utf-8")
    begin_s = time.time()
    command = [sys.executable, "-m", "launch", "submit", str(config), "--cluster", str(cluster), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    submitted_s = time.time()
    if done.returncode:
        raise ClusterError(done.stderr.strip().removeprefix("error: "))
    job = json.loads(done.stdout)["runs"][0]["job"]
    folder = RunFolder(runs_folder / f"cost-{number}")
    until_s = time.monotonic() + LIMIT_S
    while may_go_on(job):
        if time.monotonic() > until_s:
            raise ClusterError(
                f"job {job} is not done after {LIMIT_S:.0f} s; look with python -m launch why {folder.root}"
            )
        time.sleep(1.0)
    moments = [begin_s, submitted_s, *_moments(folder, job)]
    return {name: after - before for (name, _), before, after in zip(PHASES, moments, moments[1:], strict=False)}


def _moments(folder: RunFolder, job: str) -> list[float]:
    """Unix times of the end of each phase after the submission, as the files of the run tell them."""
    record = read_record(folder.job(job))
    own_log = (folder.jobs / "submitit" / f"{job}_0_log.out").read_text(encoding="utf-8")
    began = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})\)", own_log)
    if record is None or began is None or record.exit_code:
        raise ClusterError(f"job {job} did not train; look with python -m launch why {folder.root}")
    rows = [json.loads(line) for line in folder.rank_metrics(0).read_text(encoding="utf-8").splitlines()]
    return [
        datetime.fromisoformat(f"{began[1]}.{began[2]}").timestamp(),
        datetime.fromisoformat(record.start).timestamp(),
        _header_time(folder.rank_log(job, 0)),
        (folder.root / ".lease.lock").stat().st_mtime,
        folder.plan.stat().st_mtime,
        next(row["time"] for row in rows if row.get("event") == "start"),
        next(row["time"] for row in rows if row["step"] == 1),
    ]


def _header_time(log: Path) -> float:
    with log.open(encoding="utf-8") as file:
        match = re.search(r", (\d{4}-\d\d-\d\dT[\d:.]+\+00:00)", file.readline())
    if match is None:
        raise ClusterError(f"{log}: does not begin with the line of an attempt")
    return datetime.fromisoformat(match[1]).timestamp()


def table(launches: Sequence[dict[str, float]]) -> str:
    """Markdown: median and range of each phase."""
    lines = ["| phase | median, s | range, s |", "| --- | ---: | ---: |"]
    for name, says in PHASES:
        seconds = [launch[name] for launch in launches]
        lines.append(f"| {says} | {median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")
    totals = [sum(launch.values()) for launch in launches]
    return "\n".join([*lines, f"| all | {median(totals):.2f} | {min(totals):.2f} to {max(totals):.2f} |"])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_cost", description=__doc__)
    parser.add_argument("--cluster", type=Path, required=True, help="such as configs/clusters/slurm_test.yaml")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument(
        "--runs-folder", type=Path, help="on a file system that all nodes see (default: a temporary one)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.runs_folder) as folder:
        launches = [measure(args.cluster, Path(folder), number) for number in range(args.launches)]
    print(json.dumps(launches) if args.json else table(launches))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
