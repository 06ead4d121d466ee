"""A real SLURM of two nodes, and two spare ones, for the session. Skipped where it cannot run, but not in CI."""

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import scheduler
from tests.unit.launch.cases import wait_until

SCRIPT = Path(__file__).with_name("slurm-cluster.sh")
FOLDER = Path(f"/tmp/ii-dist-slurm-{os.getuid()}")
"""Short, for sockets live in it, and fixed, so that what a killed session left behind is found and ended."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "flock")
SETTINGS = {
    "SLURM_CLUSTER_DIR": str(FOLDER),
    "SLURM_CLUSTER_NODES": "4",
    "SLURM_CLUSTER_GPUS": "0",
    "SLURM_CLUSTER_DB": "auto",  # sacct answers where slurmdbd and MariaDB are installed
}
SPARE = "node[3-4]"
"""Drained but for the tests that want four nodes (`four_nodes`), so that a lost node has no substitute."""


def cluster(*verb: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *verb], env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=120
    )


def start_now(job: str) -> None:
    """Spare a requeued job the seconds that SLURM lets it wait. Call it again until the job has started.

    Not in the seconds of the requeue itself: SLURM's clock has whole seconds, and a job that starts in the one in
    which its old credential was revoked fails.
    """
    asked = subprocess.run(
        ["squeue", "--noheader", "--states=PENDING", f"--jobs={job}", "--format=%V"],
        env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
        capture_output=True,
        text=True,
    )
    since = asked.stdout.strip()
    if since.isdigit() and time.time() - int(since) > 2.5:
        subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], capture_output=True)
    time.sleep(0.2)


def set_spare(*what: str) -> None:
    subprocess.run(["scontrol", "update", f"nodename={SPARE}", *what], check=True)


@pytest.fixture
def four_nodes(slurm: None) -> Iterator[None]:
    """All four nodes take jobs."""
    set_spare("state=resume")
    yield
    set_spare("state=drain", "reason=spare")


@pytest.fixture
def full_cluster(slurm: None) -> Iterator[str]:
    """A job that has both nodes; its id."""
    command = ["sbatch", "--parsable", "--nodes=2", "--exclusive", "--partition=main", "--output=/dev/null"]
    done = subprocess.run([*command, "--wrap=sleep 300"], capture_output=True, text=True, check=True)
    job = done.stdout.strip()
    wait_until(lambda: any(live.job == job and live.state == "RUNNING" for live in scheduler.live_jobs() or ()))
    yield job
    subprocess.run(["scancel", job], check=False)


@pytest.fixture(scope="session")
def accounting(slurm: None) -> None:
    """sacct knows of the jobs."""
    if subprocess.run(["sacct", "--noheader"], capture_output=True).returncode:
        give_up("no accounting database (apt-get install slurmdbd mariadb-server-core)")


def give_up(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must run the SLURM tests: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """SLURM_CONF points at a cluster of node1 and node2; one session at a time has it."""
    if os.getuid() != 0:
        give_up("a SLURM on this machine needs root")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        give_up(f"{', '.join(missing)} not installed (apt-get install slurmctld slurmd slurm-client munge)")
    with FOLDER.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cluster("down")
        shutil.rmtree(FOLDER, ignore_errors=True)
        up = cluster("up")
        if up.returncode:
            cluster("down")
            give_up(f"no SLURM can run here: {(up.stderr or up.stdout).strip()}")
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(FOLDER / "etc" / "slurm.conf")
        try:
            set_spare("state=drain", "reason=spare")
            yield
        finally:
            if before is None:
                del os.environ["SLURM_CONF"]
            else:
                os.environ["SLURM_CONF"] = before
            cluster("down")
            shutil.rmtree(FOLDER, ignore_errors=True)
