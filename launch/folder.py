"""What a submission writes into a run folder, and what it refuses to write over.

In: a resolved config. Out: `config.yaml` (what every later job of the run reads) and a private folder for Submitit.
"""

import os
import stat
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ii_dist.config import (
    CheckpointError,
    ClusterError,
    RunConfig,
    RunFolder,
    dump_config,
    load_config,
    recipe_differences,
    refuse_unnamed_changes,
)


def run_folder(cfg: RunConfig) -> RunFolder:
    return RunFolder((Path(cfg.runs_folder) / cfg.name).absolute())


def prepare_run_folder(folder: RunFolder, cfg: RunConfig, new_config: Sequence[str]) -> str:
    """Write `config.yaml`; return a line on what changed, or "".

    Raises ConfigError where the folder belongs to a run with another recipe (where `new_config` names all keys
    that differ the old file is kept beside the new one), CheckpointError where the folder cannot be written.
    """
    text = dump_config(cfg)
    try:
        own_folder(folder.root)
        before = folder.config.read_text(encoding="utf-8") if folder.config.exists() else None
        if before == text:
            return ""
        said = ""
        if before is not None:
            said = _accept_change(folder, cfg, new_config)
        _replace_text(folder.config, text)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder.root}: cannot be written ({error.strerror}); mend that or set runs_folder"
        ) from None
    return said


def private_folder(path: Path) -> Path:
    """Make `path` a folder of ours that nobody else may enter: what Submitit puts there is code to the next reader."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        _require_ours(path)
        if stat.S_IMODE(path.lstat().st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise ClusterError(f"{path}: cannot be made private ({error.strerror}); set runs_folder elsewhere") from None
    return path


def own_folder(path: Path) -> Path:
    """Make `path` a folder of ours that nobody else may write to. A new one is private; who may read is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        _require_ours(path)
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode & 0o022:
            path.chmod(mode & ~0o022)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be written ({error.strerror}); mend that or set runs_folder"
        ) from None
    return path


def check_private(path: Path, forbidden_bits: int) -> None:
    """Raise ClusterError where `path` is a link, belongs to somebody else, or has one of these permission bits."""
    try:
        status = path.lstat()
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}; submit again") from None
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid():
        raise ClusterError(f"{path}: is a link or belongs to somebody else; nothing of it is run. Submit again")
    if status.st_mode & forbidden_bits:
        raise ClusterError(
            f"{path}: others may change it (mode {stat.S_IMODE(status.st_mode):04o}); nothing of it is run. Look at"
            f" what is in there, then submit again"
        )


def _require_ours(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ClusterError(f"{path}: is a link or belongs to somebody else; remove it or set runs_folder")


def _accept_change(folder: RunFolder, cfg: RunConfig, new_config: Sequence[str]) -> str:
    """Judge a config that differs from the run's; keep the old one where the recipe changes."""
    before = load_config(folder.config)
    refuse_unnamed_changes(folder.config, before, cfg, new_config)
    if recipe_differences(before, cfg):
        kept = folder.root / f"config_before_{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.yaml"
        os.link(folder.config, kept)
        return f"{folder.config}: replaced; the old one is {kept.name}"
    return f"{folder.config}: rewritten; what differs does not change the training"


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
