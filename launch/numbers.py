"""What a run has written about itself, read from the ends of its files: step, rate, saves. For people who wait.

In: a run folder. Out: `Numbers`. Reads the last part of one file, however long the run is.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ii_dist.config import RunFolder
from ii_dist.config.run_folder import COMMITTED, parse_step

TAIL_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Numbers:
    """None and 0 where the run has said nothing yet."""

    step: int | None = None
    time_s: float | None = None
    """Unix time of the newest line."""
    images_per_s: float | None = None
    """All ranks."""
    step_s: float | None = None
    loss: float | None = None
    top1: float | None = None
    world_size: int | None = None
    save_s: float | None = None
    """Longest of the last saves, from the copy to the commit."""
    checkpoint_bytes: int | None = None


def read_numbers(folder: RunFolder) -> Numbers:
    """What rank 0 wrote last."""
    found: dict[str, Any] = {}
    for line in reversed(_last_lines(folder.rank_metrics(0))):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError):
            continue
        found.setdefault("step", step)
        found.setdefault("time_s", row.get("time"))
        for field, tag in _TAGS.items():
            value = row.get(tag)
            if isinstance(value, int | float):
                found.setdefault(field, value)
        if isinstance(seconds := row.get("checkpoint/seconds"), int | float):
            found["save_s"] = max(seconds, found.get("save_s", 0.0))
    if "checkpoint_bytes" in found:
        found["checkpoint_bytes"] = int(found["checkpoint_bytes"])
    return Numbers(**found)


_TAGS = {
    "images_per_s": "throughput/images_per_s",
    "step_s": "time/step_s",
    "loss": "train/loss",
    "top1": "eval/top1",
    "world_size": "world_size",
    "checkpoint_bytes": "checkpoint/bytes",
}


def total_steps(folder: RunFolder) -> tuple[int, int] | None:
    """Steps and images a step of the run's plan; None before the first attempt has written it."""
    try:
        plan = json.loads(folder.plan.read_text(encoding="utf-8"))
        return int(plan["total_steps"]), int(plan["global_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_commit(folder: RunFolder) -> int | None:
    """The newest step that has a manifest. Its content is not read."""
    try:
        names = [path.name for path in folder.checkpoints.iterdir()]
    except OSError:
        return None
    steps = sorted((step for name in names if (step := parse_step(name)) is not None), reverse=True)
    return next((step for step in steps if (folder.step(step) / COMMITTED).is_file()), None)


def _last_lines(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().splitlines()
    except OSError:
        return []


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h, 2.1 d."""
    for limit, unit, size in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if size < 3600 else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def per_second(rate: float) -> str:
    """1,234 or 12 or 0.34."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def gigabytes(count: float) -> str:
    """1.2 MB, 3.4 GB: powers of ten, as disks are sold."""
    for limit, unit in ((1e6, "kB"), (1e9, "MB"), (1e12, "GB")):
        if count < limit:
            return f"{count / limit * 1e3:.1f} {unit}"
    return f"{count / 1e12:.1f} TB"
