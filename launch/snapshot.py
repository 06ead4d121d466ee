"""A copy of the code in the run folder: what a queued job runs, whatever happens to the checkout meanwhile.

In: the packages that a job imports, as they are now. Out: `code/<digest>/` below the run folder, made once for each
version of the code, and the variables that make a Python start from it and from nowhere else.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ii_dist.config import ClusterError, RunFolder
from launch.folder import private_folder

PACKAGES = ("ii_dist", "launch")
"""What the supervisor and the ranks import of ours."""
FACTS = "snapshot.json"


def snapshot_folder(folder: RunFolder) -> Path:
    """Where the code as it is now would be, or is. Writes nothing."""
    return folder.code / digest_of(_roots())[:16]


def snapshot(folder: RunFolder) -> Path:
    """The snapshot of the code as it is now. Raises ClusterError where it cannot be written or was changed."""
    roots = _roots()
    digest = digest_of(roots)
    there = folder.code / digest[:16]
    try:
        private_folder(folder.code)
        if not there.exists():
            _copy(roots, there, digest)
        elif digest_of({name: there / name for name in PACKAGES}) != digest:
            raise ClusterError(f"{there}: was changed after it was made; remove it, or submit under another name")
    except OSError as error:
        what = f"{error.filename or there}: the code cannot be copied there ({error.strerror})"
        raise ClusterError(f"{what}; free space or set runs_folder") from None
    return there


def digest_of(roots: dict[str, Path]) -> str:
    """Hex digest of names and contents of the packages' files, the same wherever they lie."""
    total = hashlib.sha256()
    for name, root in sorted(roots.items()):
        for path in _files(root):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{name}/{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def python_variables(code: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables with which `python -m` finds our packages in `code` first, and none in the folder that it starts in.

    environ: the submitter's; what its PYTHONPATH names stays to be found.
    """
    paths = [str(code), *(path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _roots() -> dict[str, Path]:
    return {name: _package_folder(name) for name in PACKAGES}


def _package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None, f"{name} is a package of files"
    return Path(found.origin).parent


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so"))


def _copy(roots: dict[str, Path], there: Path, digest: str) -> None:
    """Make the whole snapshot under a hidden name, then rename it: a job never starts from half of one."""
    partial = there.with_name(f".{there.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    for name, root in roots.items():  # with times and compiled files, so that thousands of ranks need not compile
        shutil.copytree(root, partial / name, ignore=shutil.ignore_patterns("*.so"))
    facts = {"sha256": digest, "revision": revision(roots["launch"])}
    (partial / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    try:
        partial.rename(there)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not there.exists():  # else another submission was quicker
            raise


def revision(folder: Path) -> str:
    """What git calls the code, with -dirty where it was edited; "" without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
