"""The code that a job runs lies in the run folder, and what Submitit unpickles was written by nobody else."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ii_dist.config import ClusterError, RunFolder
from launch import task
from launch.folder import own_folder, private_folder
from launch.snapshot import PACKAGES, digest_of, python_variables, snapshot, snapshot_folder
from tests.unit.launch.cases import ROOT


def start(code: Path, where: Path, program: str) -> str:
    """What a Python prints that is started as a job's are."""
    environ = {**os.environ, **python_variables(code, {"PYTHONPATH": str(where)})}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=where, env=environ, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() + done.stderr.strip()


def test_a_job_runs_the_snapshot_whatever_happens_to_the_checkout(tmp_path: Path) -> None:
    code = snapshot(RunFolder(tmp_path / "run"))
    edited = tmp_path / "checkout"
    for package in PACKAGES:
        (edited / package).mkdir(parents=True)
        (edited / package / "__init__.py").write_text("raise SystemExit('edited')")
    program = "import ii_dist.config, launch.job; print(ii_dist.config.__file__, launch.job.__file__)"
    found = start(code, edited, program)
    assert found == f"{code}/ii_dist/config/__init__.py {code}/launch/job.py"
    # The control: started as usual, the folder that it is in comes first.
    plain = subprocess.run([sys.executable, "-c", program], cwd=edited, capture_output=True, text=True, timeout=60)
    assert "edited" in plain.stderr


def test_the_same_code_is_copied_once_and_its_name_is_known_beforehand(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    expected = snapshot_folder(folder)
    assert not folder.root.exists()
    first = snapshot(folder)
    assert first == expected
    facts = json.loads((first / "snapshot.json").read_text())
    assert facts["sha256"].startswith(first.name)
    before = first.stat().st_mtime_ns
    assert snapshot(folder) == first
    assert first.stat().st_mtime_ns == before
    assert [path.name for path in folder.code.iterdir()] == [first.name]
    assert stat.S_IMODE(folder.code.stat().st_mode) == 0o700


def test_a_snapshot_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    code = snapshot(folder)
    (code / "launch" / "job.py").write_text("print('other')")
    with pytest.raises(ClusterError, match="was changed after it was made"):
        snapshot(folder)


def test_the_digest_sees_names_contents_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "a", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "__pycache__").mkdir()
    (tmp_path / "b" / "__pycache__" / "job.cpython-311.pyc").write_bytes(b"x")
    same = digest_of({"launch": tmp_path / "a"})
    assert digest_of({"launch": tmp_path / "b"}) == same
    (tmp_path / "b" / "job.py").rename(tmp_path / "b" / "jobs.py")
    assert digest_of({"launch": tmp_path / "b"}) != same


def test_a_snapshot_is_small(tmp_path: Path) -> None:
    code = snapshot(RunFolder(tmp_path / "run"))
    assert sum(path.stat().st_size for path in code.rglob("*.py")) < 2_000_000


@pytest.fixture
def submitit_folder(tmp_path: Path) -> Path:
    own_folder(tmp_path / "run")
    own_folder(tmp_path / "run" / "jobs")
    folder = private_folder(tmp_path / "run" / "jobs" / "submitit")
    (folder / "7_submitted.pkl").write_bytes(b"")
    (folder / "7_submitted.pkl").chmod(0o600)
    task.check_job_files(folder)  # as a submission leaves it
    return folder


@pytest.mark.parametrize(
    ("place", "mode"),
    [
        (".", 0o710),
        (".", 0o702),
        ("..", 0o720),
        ("../..", 0o702),
        ("7_submitted.pkl", 0o620),
        ("7_submitted.pkl", 0o602),
    ],
)
def test_what_others_may_change_is_not_unpickled(submitit_folder: Path, place: str, mode: int) -> None:
    (submitit_folder / place).chmod(mode)
    with pytest.raises(ClusterError, match="others may change it"):
        task.check_job_files(submitit_folder)


def test_a_link_or_a_file_of_somebody_else_is_not_unpickled(submitit_folder: Path) -> None:
    pickled = submitit_folder / "7_submitted.pkl"
    pickled.rename(submitit_folder.parent / "elsewhere")
    pickled.symlink_to(submitit_folder.parent / "elsewhere")
    with pytest.raises(ClusterError, match="is a link"):
        task.check_job_files(submitit_folder)
    if os.getuid() == 0:  # only root can give files away
        pickled.unlink()
        pickled.write_bytes(b"")
        os.chown(pickled, 12345, -1)
        with pytest.raises(ClusterError, match="belongs to somebody else"):
            task.check_job_files(submitit_folder)


def test_a_refused_pickle_does_not_run(submitit_folder: Path, tmp_path: Path) -> None:
    """The payload is real: Submitit's own program runs it, ours does not come to that."""
    from submitit.core import utils

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "canary"),)

    with (submitit_folder / "7_submitted.pkl").open("wb") as file:
        utils.pickle.dump(Payload(), file)
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "7",
        "SUBMITIT_LOCAL_GLOBALID": "0",
    }
    submitit_folder.chmod(0o777)
    command = [sys.executable, "-m", "launch.task", str(submitit_folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert done.stderr.startswith(f"error: {submitit_folder}: others may change it (mode 0777)")
    assert not (tmp_path / "canary").exists()
    submitit_folder.chmod(0o700)
    let_through = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "canary").exists(), let_through.stderr


def test_a_run_folder_that_others_could_write_is_closed_to_them(tmp_path: Path) -> None:
    shared = tmp_path / "run"
    shared.mkdir()
    shared.chmod(0o775)
    own_folder(shared)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755  # who could read may go on reading
    assert stat.S_IMODE(own_folder(tmp_path / "new").stat().st_mode) == 0o700
