"""Submission on this machine through Submitit's local executor.

In: a `TrainJob`. Out: a handle to the job's controller, the small process that Submitit starts and that passes SIGTERM
on to our supervisor. The job outlives the command that submitted it.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ii_dist.config import ClusterError
from launch.job import TrainJob
from launch.task import task_command

NO_LIMIT_MINUTES = 60 * 24 * 3650
"""Submitit ends a local job after 5 minutes unless told otherwise; time limits are the cluster's."""


class LocalHandle:
    """A job on this machine, as long as the process that submitted it lives."""

    def __init__(self, submitted: Any) -> None:
        self._submitted = submitted
        self.pid = int(submitted.job_id)
        self.log = Path(submitted.paths.stdout)
        """What the supervisor itself prints."""

    def alive(self) -> bool:
        return not self._submitted.done()

    def ask_to_stop(self) -> None:
        """Ask the run to save and leave; asked again, it ends at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


def new_job_name() -> str:
    """A name that no earlier job of this machine has, for records and logs."""
    return f"local-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"


def submit(job: TrainJob, folder: Path) -> LocalHandle:
    """Start `job` in the background, away from this terminal. `folder` is Submitit's, private."""
    try:
        import submitit
    except ImportError:
        raise ClusterError("Submitit is not installed: pip install submitit==1.5.4") from None
    command = task_command([sys.executable], folder)
    checked = {"_submitit_command_str": property(lambda self: command)}
    executor = type("CheckedExecutor", (submitit.LocalExecutor,), checked)(folder)
    executor.update_parameters(timeout_min=NO_LIMIT_MINUTES, tasks_per_node=1, nodes=1, stderr_to_stdout=True)
    with _away_from_terminal(folder / "controller.log"):
        return LocalHandle(executor.submit(job))


@contextlib.contextmanager
def _away_from_terminal(log: Path) -> Iterator[None]:
    """What is started inside is deaf to Ctrl-C and hang-up, keeps no terminal or pipe open, and speaks to `log`.

    Submitit's controller inherits all of this from the submitting process and offers no setting for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGHUP)}
    umask = os.umask(0o077)
    saved = [os.dup(number) for number in range(3)]
    try:
        with Path(os.devnull).open("rb") as nothing, log.open("ab") as words:
            os.dup2(nothing.fileno(), 0)
            os.dup2(words.fileno(), 1)
            os.dup2(words.fileno(), 2)
        yield
    finally:
        for number, copy in enumerate(saved):
            os.dup2(copy, number)
            os.close(copy)
        os.umask(umask)
        for signum, handler in before.items():
            signal.signal(signum, handler)
