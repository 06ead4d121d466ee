"""The checkpoints of a run: ``python -m tools.list_checkpoints runs/NAME``.

In: a run folder. Out: one line a step (position, engine, ranks, size, time). Hashes are not checked: see
`tools.verify_checkpoint`.
"""

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from ii_dist.checkpoint import read_manifest, step_folders
from ii_dist.config.errors import EXIT_DONE, CheckpointError
from ii_dist.config.run_folder import COMMITTED, parse_step
from tools._border import run

_COLUMNS = ("step", "epoch", "offset", "engine", "ranks", "size", "written")


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    rows = [_row(path) for path in step_folders(args.run)]
    if args.json:
        print(json.dumps({"run": str(args.run), "steps": rows}, indent=1))
        return EXIT_DONE
    table = [list(_COLUMNS)] + [_cells(row) for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
    for line, row in zip(table, [None, *rows], strict=True):
        problem = f"  {row['problem']}" if row and row.get("problem") else ""
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + problem)
    print(f"check the hashes: python -m tools.verify_checkpoint {args.run}")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.list_checkpoints", description="List a run's checkpoints.")
    parser.add_argument("run", type=Path, help="run folder, such as runs/digits")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _row(path: Path) -> dict[str, Any]:
    """Facts of one step, or its problem."""
    row: dict[str, Any] = {"step": parse_step(path.name), "path": str(path)}
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return row | {"problem": str(error)}
    return row | {
        "epoch": manifest.position.epoch,
        "offset": manifest.position.offset,
        "engine": manifest.engine,
        "ranks": manifest.world_size,
        "global_batch": manifest.global_batch,
        "bytes": manifest.total_bytes,
        "tensors": len(manifest.tensors),
        "versions": manifest.versions,
        "written": datetime.fromtimestamp((path / COMMITTED).stat().st_mtime)
        .astimezone()
        .isoformat(timespec="seconds"),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    if "problem" in row:
        return [str(row["step"]), "-", "-", "-", "-", "-", "-"]
    size = f"{row['bytes'] / 1e6:.1f} MB"
    written = str(row["written"])[:19].replace("T", " ")
    return [*(str(row[name]) for name in ("step", "epoch", "offset", "engine", "ranks")), size, written]


if __name__ == "__main__":
    run(main)
