"""Runs a TrainJob given as JSON: `call` as Submitit's task does, `submit` as the command line does on this machine."""

import json
import sys
from pathlib import Path

from ii_dist.config import RunFolder, UserError
from launch.fields import Watch
from launch.folder import private_folder
from launch.job import TrainJob
from launch.submit import submit_local

if __name__ == "__main__":
    how, text = sys.argv[1:]
    fields = json.loads(text)
    job = TrainJob(**{**fields, "command": tuple(fields["command"]), "watch": Watch(**fields["watch"])})
    if how == "call":
        sys.exit(job())
    folder = RunFolder(Path(job.run_folder))
    try:
        sys.exit(submit_local(job, folder, private_folder(folder.jobs / "submitit"), follows=how == "submit"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
