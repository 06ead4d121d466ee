"""All figures of the project on this machine, as Markdown on the screen and in benchmarks/results/.

python -m benchmarks.run_all [--quick]      (make bench)
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

PARTS = ("loader", "step", "metrics", "ranks", "startup", "models", "checkpoint", "merge", "aggregate")
RESULTS = Path("benchmarks/results")


def device_name() -> str:
    """What the figures were measured on."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def gpu_name(drivers: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """The first NVIDIA GPU as its driver names it, "" without one."""
    for about in sorted(drivers.glob("*/information")):
        for line in about.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return ""


def results_name(gpu: str) -> str:
    """Stem of the results' files: "cpu", or the GPU's name in lower case with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "cpu"


def run_part(name: str, quick: bool) -> tuple[str, object]:
    """One benchmark in a process of its own: its Markdown and its figures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f".{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *(["--quick"] if quick else [])]
    print(f"... {name}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(out.read_text())
    out.unlink()
    return done.stdout.strip(), figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns; figures are not kept")
    args = parser.parse_args()
    found = {name: run_part(name, args.quick) for name in PARTS}
    gpu = gpu_name()
    device = ", ".join(name for name in (gpu, device_name()) if name)
    text = f"# make bench\n\n{device}, {date.today()}\n\n" + "\n\n".join(md for md, _ in found.values()) + "\n"
    print(text)
    if not args.quick:
        (RESULTS / f"{results_name(gpu)}.md").write_text(text)
        (RESULTS / f"{results_name(gpu)}.json").write_text(
            json.dumps({name: f for name, (_, f) in found.items()}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
