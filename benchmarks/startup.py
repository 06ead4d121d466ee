"""What starting costs (C13): commands that need no torch against `import torch`, CPU time of whole processes.

    python -m benchmarks.startup [--quick] [--out FILE]

Every turn runs all commands once, so that a machine whose speed drifts treats them alike; medians of the turns.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = "configs/demo/digits.yaml"
REFERENCE = "import torch"
COMMANDS: dict[str, list[str]] = {
    REFERENCE: ["-c", "import torch"],
    "import torch (twin)": ["-c", "import torch"],
    "ii-dist --help": ["-m", "ii_dist", "--help"],
    "ii-dist show": ["-m", "ii_dist", "show", CONFIG],
    "launch submit --dry-run": ["-m", "launch", "submit", CONFIG, "--dry-run"],
    "launch submit --dry-run, SLURM": [
        *["-m", "launch", "submit", CONFIG, "--dry-run"],
        *["--cluster", "configs/clusters/cpu.yaml"],
    ],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU time of one Python process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run_benchmark(quick: bool) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(3 if quick else 9):
        for name, arguments in COMMANDS.items():
            found[name].append(cpu_seconds(arguments))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {name: {"cpu_s": s, "share": s / medians[REFERENCE]} for name, s in medians.items()}


def to_markdown(found: dict[str, Any]) -> str:
    rows = ["| start-up, whole process | CPU s | / import torch | goal |", "| --- | --- | --- | --- |"]
    for name, row in found.items():
        goal = "" if name.startswith("import") else "<= 0.35"
        rows.append(f"| `{name}` | {row['cpu_s']:.2f} | {row['share']:.2f} | {goal} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    found = run_benchmark(args.quick)
    print(to_markdown(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
