"""Read every byte of a checkpoint and compare its hashes: ``python -m tools.verify_checkpoint PATH``.

In: a step folder, or a run (all its steps). Out: one line a step, what is wrong with it, GB/s; exit code 4 if anything
is wrong. The shards of a step are hashed side by side, one a core.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

from ii_dist.checkpoint import step_folders, verify_step
from ii_dist.config.errors import EXIT_CHECKPOINT, EXIT_DONE
from tools._border import run
from tools._progress import Progress


class _Counter:
    """Bytes read so far, by whichever thread, and how fast."""

    def __init__(self, total: int) -> None:
        self.bytes = 0
        self._total = total
        self._lock = threading.Lock()
        self._started_s = time.monotonic()
        self._progress = Progress("verify", "GB", 1e9)

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count
            self._progress(self.bytes, self._total)

    def rate_gb_per_s(self) -> float:
        return self.bytes / 1e9 / max(1e-9, time.monotonic() - self._started_s)


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    folders = step_folders(args.path)
    counter = _Counter(sum(file.stat().st_size for path in folders for file in path.iterdir() if file.is_file()))
    rows: list[dict[str, Any]] = []
    for path in folders:
        problems = verify_step(path, counter.add)
        rows.append({"path": str(path), "ok": not problems, "problems": problems})
        if not args.json:
            print(f"{path}: {'ok' if not problems else 'DAMAGED'}")
            for problem in problems:
                print(f"  {problem}")
    whole = all(row["ok"] for row in rows)
    if args.json:
        rate = round(counter.rate_gb_per_s(), 3)
        print(json.dumps({"ok": whole, "bytes": counter.bytes, "gb_per_s": rate, "steps": rows}, indent=1))
    else:
        good = sum(row["ok"] for row in rows)
        rate_text = f"{counter.bytes / 1e6:.1f} MB at {counter.rate_gb_per_s():.2f} GB/s"
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
