"""Read every byte of a checkpoint and compare its hashes: ``python -m tools.verify_checkpoint PATH``.

In: a step folder, or a run (all its steps). Out: one line a step, what is wrong with it, GB/s; exit code 4 if anything
is wrong.
"""

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ii_dist.checkpoint import step_folders, verify_step
from ii_dist.config.errors import EXIT_CHECKPOINT, EXIT_DONE
from tools._border import run


class _Progress:
    """Bytes read so far, told on a terminal's error stream a few times a second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._started_s = time.monotonic()
        self._told_s = 0.0
        self._lock = threading.Lock()
        self._show = sys.stderr.isatty()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count
            if self._show and time.monotonic() - self._told_s > 0.2:
                self._told_s = time.monotonic()
                print(f"\r{self.bytes / 1e9:8.2f} GB  {self.rate_gb_per_s():5.2f} GB/s", end="", file=sys.stderr)

    def rate_gb_per_s(self) -> float:
        return self.bytes / 1e9 / max(1e-9, time.monotonic() - self._started_s)

    def clear(self) -> None:
        if self._show:
            print("\r" + " " * 30 + "\r", end="", file=sys.stderr)


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    progress = _Progress()
    rows: list[dict[str, Any]] = []
    for path in step_folders(args.path):
        problems = verify_step(path, progress.add)
        rows.append({"path": str(path), "ok": not problems, "problems": problems})
        progress.clear()
        if not args.json:
            print(f"{path}: {'ok' if not problems else 'DAMAGED'}")
            for problem in problems:
                print(f"  {problem}")
    whole = all(row["ok"] for row in rows)
    if args.json:
        rate = round(progress.rate_gb_per_s(), 3)
        print(json.dumps({"ok": whole, "bytes": progress.bytes, "gb_per_s": rate, "steps": rows}, indent=1))
    else:
        good = sum(row["ok"] for row in rows)
        rate_text = f"{progress.bytes / 1e6:.1f} MB at {progress.rate_gb_per_s():.2f} GB/s"
        print(f"{good} of {len(rows)} steps are whole; read {rate_text}")
    return EXIT_DONE if whole else EXIT_CHECKPOINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify_checkpoint",
        description="Compare every byte of a checkpoint with its hashes. Exit code 4 if anything is wrong.",
    )
    parser.add_argument("path", type=Path, help="a step folder, or a run folder for all its steps")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    run(main)
