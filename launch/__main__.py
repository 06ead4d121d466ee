"""The command line: `python -m launch submit ...`. Errors are one line on stderr; exit codes as everywhere."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ii_dist.config import NEW_CONFIG_HELP, UserError, key_list
from launch.submit import Submission, submit_run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch", description="Ask for nodes and train on them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    submit = commands.add_parser(
        "submit",
        help="start a run on this machine, or hand it to SLURM",
        description="Start the run of CONFIG: on this machine, or on SLURM with a cluster file. The same command again"
        " goes on from the newest checkpoint.",
    )
    submit.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    submit.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values laid over the file's")
    submit.add_argument(
        "--cluster", type=Path, metavar="FILE", help="settings of a cluster, such as configs/clusters/*.yaml"
    )
    submit.add_argument("--nodes", type=int, metavar="N", help="the same as launch.nodes=N")
    submit.add_argument("--dry-run", action="store_true", help="print what would be submitted and its plan, do nothing")
    submit.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        help="show the first rank's output, end with the run's exit code (default: yes on this machine, no on SLURM)",
    )
    submit.add_argument("--new-config", type=key_list, default=(), metavar="KEYS", help=NEW_CONFIG_HELP)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)  # overrides may stand between and after options
    if unknown := [text for text in rest if text.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}; see python -m launch {args.command} --help")
    asked = Submission(
        config=args.config,
        overrides=(*args.overrides, *rest),
        cluster=args.cluster,
        nodes=args.nodes,
        dry_run=args.dry_run,
        follow=args.follow,
        new_config=args.new_config,
    )
    try:
        return submit_run(asked, os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before there is a job to ask
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
