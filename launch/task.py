"""The first lines of a job on a node: look at what is about to be unpickled, then hand over to Submitit.

In: Submitit's folder as the only argument. Out: what Submitit's own program does. Submitit reads the job as a pickle,
which is code, perhaps days after it was written and on another machine: so nobody else may have been able to write it.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ii_dist.config import ClusterError, ConfigError, UserError
from launch.folder import check_private


def check_job_files(folder: Path) -> None:
    """Raise ClusterError unless Submitit's folder, what it holds and the folders of the run above it are ours alone."""
    check_private(folder, 0o077)
    for above in (folder.parent, folder.parent.parent):  # jobs/ and the run folder: who may write there may swap it
        check_private(above, 0o022)
    for path in folder.glob("*.pkl"):
        if not path.name.endswith("_result.pkl"):  # nobody reads those
            check_private(path, 0o022)


def task_command(python: Sequence[str], folder: Path) -> str:
    """The shell command of a job's step: our check of Submitit's folder, then Submitit. Every word is quoted."""
    words = [*python, "-u", "-m", "launch.task", str(folder)]
    if bad := [word for word in words if not word.isprintable()]:
        raise ConfigError(f"the job's command has {bad[0]!r} in it, which is no plain word; see runs_folder and launch")
    return shlex.join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    (text,) = sys.argv[1:] if arguments is None else arguments
    try:
        check_job_files(Path(text))
        try:
            from submitit.core.submission import process_job
        except ImportError:
            raise ClusterError("Submitit is not installed where the job runs: pip install submitit==1.5.4") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    process_job(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
