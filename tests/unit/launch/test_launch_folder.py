"""What a submission writes into a run folder, and what it leaves alone."""

import stat
from pathlib import Path

import pytest

from ii_dist.config import CheckpointError, ClusterError, ConfigError, RunConfig, RunFolder, load_config
from launch.folder import prepare_run_folder, private_folder, run_folder


def config(tmp_path: Path, lr: float = 0.1, nodes: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "trial", "runs_folder": str(tmp_path), "optim": {"lr": lr}, "launch": {"nodes": nodes}}
    )


def test_the_resolved_config_is_written_and_reads_back(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    folder = run_folder(cfg)
    assert folder == RunFolder(tmp_path / "trial")
    assert prepare_run_folder(folder, cfg, new_config=()) == ""
    assert load_config(folder.config) == cfg
    written = folder.config.stat().st_mtime_ns
    assert prepare_run_folder(folder, cfg, new_config=()) == ""
    assert folder.config.stat().st_mtime_ns == written


def test_another_recipe_is_refused_and_nothing_is_written_over(tmp_path: Path) -> None:
    folder = run_folder(config(tmp_path))
    prepare_run_folder(folder, config(tmp_path), new_config=())
    before = folder.config.read_bytes()
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.1 -> 0\.2.*another name=.*--new-config optim\.lr$"):
        prepare_run_folder(folder, config(tmp_path, lr=0.2), new_config=())
    with pytest.raises(ConfigError, match=r"\(optim\.lr: 0\.1 -> 0\.2\)"):
        prepare_run_folder(folder, config(tmp_path, lr=0.2), new_config=("optim.momentum",))
    assert folder.config.read_bytes() == before


def test_another_number_of_nodes_is_said_and_taken(tmp_path: Path) -> None:
    folder = run_folder(config(tmp_path))
    prepare_run_folder(folder, config(tmp_path), new_config=())
    assert "rewritten" in prepare_run_folder(folder, config(tmp_path, nodes=2), new_config=())
    assert load_config(folder.config).launch.nodes == 2


def test_new_config_keeps_the_old_one(tmp_path: Path) -> None:
    folder = run_folder(config(tmp_path))
    prepare_run_folder(folder, config(tmp_path), new_config=())
    said = prepare_run_folder(folder, config(tmp_path, lr=0.2), new_config=("optim.lr",))
    (kept,) = folder.root.glob("config_before_*.yaml")
    assert kept.name in said
    assert (load_config(kept).optim.lr, load_config(folder.config).optim.lr) == (0.1, 0.2)


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "trial").write_text("a file")
    with pytest.raises(CheckpointError, match=r"trial: cannot be written \(File exists\)"):
        prepare_run_folder(RunFolder(tmp_path / "trial"), config(tmp_path), new_config=())


def test_submitits_folder_is_made_private(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "jobs" / "submitit")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "submitit").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ClusterError, match="is a link"):
        private_folder(tmp_path / "submitit")
