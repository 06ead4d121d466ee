"""Reading back the numbers of many ranks (C12), and the report over a long run.

    python -m benchmarks.aggregate [--quick] [--out FILE]

Method: the metrics of 1,000 ranks with 1,000 lines each, as a run writes them (a few dozen different files, linked, so
that both sides read from memory). Each turn runs, in processes of their own and in turn: our reader (`read_run`, with
all ranks combined); a loop that reads the same files with json.loads and keeps nothing; and that loop once more, whose
ratio is the noise. CPU time without imports; medians of each turn's ratios. Memory: the kernel's peak of the process,
for 1,000 and for 4,000 lines a rank. The report: CPU time and size of HTML and Markdown with plots over a run folder of
64 ranks and 90 epochs, imports included.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.made_runs import Made, write_run
from benchmarks.merge import peak_bytes
from ii_dist.config.run_folder import RunFolder

DIFFERENT = 32


def write_many(root: Path, ranks: int, lines: int) -> None:
    """A run of `ranks` ranks with `lines` lines of training each: `DIFFERENT` files under many names."""
    epochs = max(1, lines // 25)
    folder = write_run(root, Made(ranks=DIFFERENT, epochs=epochs, steps_per_epoch=25, log_every_steps=1))
    for rank in range(DIFFERENT, ranks):
        os.link(folder.rank_metrics(rank % DIFFERENT), folder.rank_metrics(rank))


def measure_here(work: str, root: Path) -> dict[str, float]:
    """CPU seconds of one reading in this process, its lines, and the process's peak memory."""
    if work == "ours":
        from ii_dist.metrics import read_run

        before_s = time.process_time()
        run = read_run(RunFolder(root))
        cpu_s = time.process_time() - before_s
        count = len(run.rows) * len(run.ranks)
    else:
        before_s, count = time.process_time(), 0
        for path in sorted(RunFolder(root).metrics.iterdir()):
            with path.open("rb") as file:
                for line in file:
                    json.loads(line)
                    count += 1
        cpu_s = time.process_time() - before_s
    return {"cpu_s": cpu_s, "lines": count, "peak_mb": peak_bytes() / 1e6}


def measure(work: str, root: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.aggregate", "--inside", work, str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(root: Path, turns: int) -> dict[str, Any]:
    """Our reader against the loop."""
    rounds = [{work: measure(work, root) for work in ("loop", "ours", "loop2")} for _ in range(turns)]

    def ratio(a: str, b: str) -> float:
        return statistics.median(each[a]["cpu_s"] / each[b]["cpu_s"] for each in rounds)

    return {
        "lines": rounds[0]["loop"]["lines"],
        "speed_up": ratio("loop", "ours"),
        "noise": ratio("loop2", "loop"),
        "ours_cpu_s": statistics.median(each["ours"]["cpu_s"] for each in rounds),
        "loop_cpu_s": statistics.median(each["loop"]["cpu_s"] for each in rounds),
        "peak_mb": max(each["ours"]["peak_mb"] for each in rounds),
    }


def measure_report(root: Path, turns: int) -> dict[str, float]:
    """CPU seconds of the report tool as a command, and the size of its page."""
    html = root / "report.html"
    command = [sys.executable, "-m", "tools.report_run", str(root), "--html", str(html), "--markdown", f"{root}/r.md"]
    seconds = []
    for _ in range(turns):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"cpu_s": statistics.median(seconds), "html_kb": html.stat().st_size / 1e3}


def to_markdown(found: dict[str, Any]) -> str:
    small, large, report = found["small"], found["large"], found["report"]
    return "\n".join(
        [
            f"| reading metrics back, {found['ranks']:,} ranks | {found['lines'][0]:,} lines "
            f"| {found['lines'][1]:,} lines | goal |",
            "| --- | --- | --- | --- |",
            f"| json.loads loop / ours, CPU time | {small['speed_up']:.2f} | {large['speed_up']:.2f} | >= 3 |",
            f"| loop / loop (noise) | {small['noise']:.2f} | {large['noise']:.2f} | 1 |",
            f"| ours, us a line | {1e6 * small['ours_cpu_s'] / small['lines']:.2f} "
            f"| {1e6 * large['ours_cpu_s'] / large['lines']:.2f} | |",
            f"| peak memory of the process | {small['peak_mb']:.0f} MB | {large['peak_mb']:.0f} MB | <= 200, flat |",
            f"| report of 64 ranks, 90 epochs, CPU time | {report['cpu_s']:.1f} s | | <= 10 s |",
            f"| its HTML page | {report['html_kb']:.0f} kB | | |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the ranks, one turn")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--inside", nargs=2, metavar=("WORK", "RUN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measure_here(args.inside[0], Path(args.inside[1]))))
        return
    ranks, turns, lines = (100, 1, (250, 1000)) if args.quick else (1000, 5, (1000, 4000))
    found: dict[str, Any] = {"ranks": ranks, "lines": lines}
    with tempfile.TemporaryDirectory() as folder:
        for name, count, turns_here in (("small", lines[0], turns), ("large", lines[1], 1)):
            write_many(Path(folder) / name, ranks, count)
            found[name] = compare(Path(folder) / name, turns_here)
        long = Made(ranks=64, epochs=9 if args.quick else 90, slow_rank=37, failures=(0.31, 0.62))
        write_run(Path(folder) / "long", long)
        found["report"] = measure_report(Path(folder) / "long", turns)
    print(to_markdown(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
