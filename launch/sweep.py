"""Several runs from one config: every combination of the values of some keys, each in a run folder of its own.

In: `optim.lr=0.5,1,2 model.gate=se,fold3x3`. Out: the combinations as overrides, the name of each run, and a table of
the runs, printed and kept in `<name>.sweep/runs.json` beside their folders.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ii_dist.config import ConfigError, RunConfig

Point = tuple[str, ...]
"""One combination: key=value for each key of the sweep."""
MAX_RUNS = 256
SWEEP_SUFFIX, SWEEP_TABLE = ".sweep", "runs.json"
"""What the runs of a sweep share lies in `<name>.sweep`; `launch.job_array` says what."""
_NAME_LENGTH = 64


def read_sweep(texts: Sequence[str]) -> list[Point]:
    """All combinations, the last key changing fastest; one empty one without a sweep. Raises ConfigError."""
    axes: list[list[str]] = []
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key or any(axis[0].startswith(f"{key}=") for axis in axes):
            raise ConfigError(
                f"--sweep {text!r}: needs key=value,value,... with each key once, such as optim.lr=0.1,0.2"
            )
        if key.startswith(("launch.", "name", "runs_folder")):
            raise ConfigError(f"--sweep {key}: is not part of a recipe; sweep over keys of training")
        parts = split_values(values)
        if not all(parts) or len(set(parts)) != len(parts):
            raise ConfigError(f"--sweep {text!r}: has an empty value or one that stands twice")
        axes.append([f"{key}={value}" for value in parts])
    points = list(itertools.product(*axes))
    if len(points) > MAX_RUNS:
        raise ConfigError(f"--sweep: comes to {len(points)} runs; at most {MAX_RUNS} at once")
    return points


def part_sweep(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words behind --sweep: those with one value, which are overrides like any other, and those with several."""
    several = [text for text in texts if len(split_values(text.partition("=")[2])) > 1]
    return [text for text in texts if text not in several], several


def split_values(text: str) -> list[str]:
    """Parts between commas; commas inside [] and {} belong to a value."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def with_name_of_point(cfg: RunConfig, point: Point, number: int) -> RunConfig:
    """The run's config under a name that says its values; where that is too long, its number in the sweep."""
    if not point:
        return cfg
    words = [re.sub(r"[^A-Za-z0-9.-]+", "_", _leaf(choice)).strip("_.") for choice in point]
    name = "-".join([cfg.name, *words])
    if len(name) > _NAME_LENGTH:
        name = f"{cfg.name[: _NAME_LENGTH - 4]}-{number:03d}"
    return cfg.model_copy(update={"name": name})


def _leaf(choice: str) -> str:
    """optim.lr=0.5 -> lr=0.5"""
    key, _, value = choice.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def require_names_of_their_own(names: Sequence[str]) -> None:
    """Raise ConfigError where two runs of a sweep would share a folder."""
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--sweep: several runs would be called {min(twice)}; give a shorter name=...")


def sweep_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows with the same keys as aligned columns, the keys above them."""
    head = [str(key) for key in rows[0]] if rows else []
    cells = [head, *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def runs_of_sweep(folder: Path) -> list[Path] | None:
    """Run folders of the sweep whose folder this is; None where it is none."""
    try:
        rows = json.loads((folder / SWEEP_TABLE).read_text(encoding="utf-8"))
        return [folder.absolute().parent / str(row["run"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_sweep(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace the table of a sweep as a whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
