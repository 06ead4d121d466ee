"""Which checkpoint to trust: the newest committed step whose bytes are all as its manifest says.

In: a run folder's `checkpoints`, or one step folder. Out: the step found, and one line for each newer step that was
left out. Reads only; shards are hashed in parallel threads. No torch.
"""

import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ii_dist.checkpoint.disk import hash_file
from ii_dist.checkpoint.manifest import Manifest, read_manifest
from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import COMMITTED, STATE, parse_step, step_name

_MOST_THREADS = 8
OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class FoundStep:
    """A committed step whose hashes were all checked."""

    step: int
    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A committed step that cannot be used, and the one line that says why."""

    step: int
    path: Path
    reason: str


def committed_steps(checkpoints: Path) -> list[int]:
    """Steps with a final name, rising; not verified. Hidden and foreign names are ignored. Empty without a folder."""
    try:
        names = [path.name for path in checkpoints.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{checkpoints}: {error.strerror}") from None
    return sorted(step for name in names if (step := parse_step(name)) is not None)


def step_folders(path: Path) -> list[Path]:
    """Step folders that a user means by `path`, rising: a step folder itself, or all of a run or its `checkpoints`.

    Raises CheckpointError when there are none.
    """
    if parse_step(path.name) is not None or (path / COMMITTED).is_file():
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such step folder")
        return [path]
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    steps = committed_steps(folder)
    if not steps:
        raise CheckpointError(f"{path}: no committed step there; give a run folder or one of its checkpoints/step_...")
    return [folder / step_name(step) for step in steps]


def find_newest(checkpoints: Path, on_bytes: OnBytes | None = None) -> tuple[FoundStep | None, list[LeftOut]]:
    """The newest step that verifies, or None, and the newer ones that do not, newest first."""
    left_out: list[LeftOut] = []
    for step in reversed(committed_steps(checkpoints)):
        path = checkpoints / step_name(step)
        manifest, problems = check_step(path, on_bytes)
        if manifest is not None and not problems:
            return FoundStep(step, path, manifest), left_out
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        left_out.append(LeftOut(step, path, f"{path.name} left out: {problems[0]}{more}"))
    return None, left_out


def verify_step(path: Path, on_bytes: OnBytes | None = None) -> list[str]:
    """What is wrong with one step folder, a line each; empty = every byte is as it was written."""
    return check_step(path, on_bytes)[1]


def check_step(path: Path, on_bytes: OnBytes | None = None) -> tuple[Manifest | None, list[str]]:
    """The manifest, if it can be read, and the problems of the step folder."""
    if path.is_symlink():
        return None, ["is a symbolic link"]
    if not path.is_dir():
        return None, ["not a folder" if path.exists() else "missing"]
    try:
        manifest = read_manifest(path)
        present = {entry.name for entry in path.iterdir()}
    except CheckpointError as error:
        return None, [str(error)]
    except OSError as error:
        return None, [str(error.strerror)]
    expected = expected_files(manifest)
    # Hidden names are the file system's own (.nfs0000...); anything else that the manifest does not list is foreign.
    extra = sorted(n for n in present - set(expected) - {COMMITTED} if not n.startswith("."))
    problems = check_files(path, expected, on_bytes)
    return manifest, problems + [f"{name}: not in the manifest; move it away" for name in extra]


def expected_files(manifest: Manifest) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file of a step but the manifest."""
    files = {shard.file: (shard.bytes, shard.sha256) for shard in manifest.shards}
    files[STATE] = (manifest.state.bytes, manifest.state.sha256)
    return files


def check_files(path: Path, files: Mapping[str, tuple[int, str]], on_bytes: OnBytes | None = None) -> list[str]:
    """The problems of some files of a step folder: missing, of another size, of other content."""
    owners = {sha256: name for name, (_, sha256) in files.items()}

    def check(name: str) -> str | None:
        size, sha256 = files[name]
        try:
            there = (path / name).lstat()
            if stat.S_ISREG(there.st_mode) and there.st_size != size:
                kind = "truncated" if there.st_size < size else "too long"
                return f"{name}: {kind}: {there.st_size} bytes, the manifest says {size}"
            _, found = hash_file(path / name, on_bytes)
        except FileNotFoundError:
            return f"{name}: missing"
        except OSError as error:
            return f"{name}: {error.strerror}"
        except CheckpointError as error:
            return str(error)
        if found == sha256:
            return None
        whose = f"it holds {owners[found]}" if found in owners else f"sha256 {found[:12]}..., not {sha256[:12]}..."
        return f"{name}: content changed: {whose}"

    with ThreadPoolExecutor(min(_MOST_THREADS, len(files), os.cpu_count() or 1), "verify") as pool:
        return [problem for problem in pool.map(check, sorted(files)) if problem]
