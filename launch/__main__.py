"""The command line: `python -m launch submit | status | logs | cancel | why`.

Errors are one line on stderr; exit codes as everywhere.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ii_dist.config import NEW_CONFIG_HELP, ConfigError, RunFolder, UserError, key_list
from ii_dist.config.errors import EXIT_DONE
from launch import cancel, logs, status, why
from launch.follow import seldom
from launch.history import read_attempts, standing
from launch.scheduler import live_jobs
from launch.submit import Submission, submit_run
from launch.sweep import part_sweep

Commands = Any
LIVE_ASKED_S = 5.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch", description="Ask for nodes, train on them, look after it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_submit(commands)
    shown = commands.add_parser(
        "status", help="what runs do: step, speed, time left, newest checkpoint, why they stand"
    )
    shown.add_argument("runs", nargs="*", metavar="RUN", help="folders or names of runs or sweeps; all there are")
    _common(shown)
    printed = commands.add_parser("logs", help="what ranks have printed, of one rank or of all in the order of time")
    printed.add_argument("run", metavar="RUN", help="run folder or name")
    printed.add_argument("--follow", "-f", action="store_true", help="go on showing what is printed until the run ends")
    printed.add_argument("--rank", default="0", metavar="R", help="all, or ranks such as 0,3,8-15 (default: 0)")
    printed.add_argument("--job", metavar="ID", help="default: the newest that has logs")
    printed.add_argument(
        "--attempt", type=int, metavar="A", help="start of the job by SLURM, from 0 (default: the last)"
    )
    printed.add_argument("--lines", type=int, default=40, metavar="N", help="the last N (default: 40); 0 = all")
    _common(printed)
    ended = commands.add_parser("cancel", help="end the jobs of a run or a sweep; nothing goes on by itself then")
    ended.add_argument("run", metavar="RUN", help="folder or name of a run, or of a sweep: all of its runs")
    ended.add_argument("--save", action="store_true", help="let it save its step first")
    _common(ended)
    asked = commands.add_parser("why", help="why a run is not training, and what to do")
    asked.add_argument("run", metavar="RUN", help="run folder or name")
    _common(asked)
    return parser


def _add_submit(commands: Commands) -> None:
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
    submit.add_argument(
        "--sweep",
        nargs="+",
        default=(),
        metavar="key=a,b",
        help="a run for every combination of these values, each in a folder of its own; on SLURM one job array",
    )
    submit.add_argument("--parallel", type=int, metavar="N", help="at most N runs of the sweep at once (default: all)")
    submit.add_argument("--dry-run", action="store_true", help="print what would be submitted and its plan, do nothing")
    submit.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        help="show the first rank's output, end with the run's exit code (default: yes on this machine, no on SLURM)",
    )
    submit.add_argument("--new-config", type=key_list, default=(), metavar="KEYS", help=NEW_CONFIG_HELP)
    submit.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="JSON on stdout, for programs")
    command.add_argument(
        "--runs-folder",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where runs are looked for (default: runs)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)  # overrides may stand between and after options
    if unknown := [text for text in rest if text.startswith("-") or args.command != "submit"]:
        parser.error(f"unknown option {unknown[0]}; see python -m launch {args.command} --help")
    try:
        return _run(args, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before there is a job to ask, or out of a view of one
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.command == "submit":
        return submit_run(_submission(args, rest), os.environ)
    if args.command == "status":
        return _status(args)
    if args.command == "cancel":
        return _cancel(args)
    folder = status.find_run(args.run, args.runs_folder)
    if args.command == "logs":
        return _logs(folder, args)
    cause = why.why(folder, live_jobs())
    print(json.dumps(why.as_json(cause)) if args.json else "\n".join(why.cause_lines(cause)))
    return EXIT_DONE


def _submission(args: argparse.Namespace, rest: Sequence[str]) -> Submission:
    fixed, swept = part_sweep(args.sweep)
    return Submission(
        config=args.config,
        overrides=(*args.overrides, *rest, *fixed),
        cluster=args.cluster,
        nodes=args.nodes,
        sweep=tuple(swept),
        parallel=args.parallel,
        dry_run=args.dry_run,
        follow=args.follow,
        new_config=args.new_config,
        as_json=args.json,
    )


def _cancel(args: argparse.Namespace) -> int:
    done, errors = cancel.cancel_all(status.find_runs(args.run, args.runs_folder), live_jobs(), args.save)
    if args.json:
        print(json.dumps({"cancelled": [{"job": each.job, "how": each.how} for each in done]}))
    elif done or not errors:
        print("\n".join(f"job {each.job}: {each.how}" for each in done) or "no job of this run waits or runs")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return errors[-1].exit_code if errors else EXIT_DONE


def _status(args: argparse.Namespace) -> int:
    live = live_jobs()
    rows = [status.status_of(folder, live) for folder in status.run_folders(args.runs, args.runs_folder)]
    if args.json:
        print(json.dumps({"runs": [status.as_json(row) for row in rows]}))
    elif not rows:
        print(f"no runs below {args.runs_folder}")
    elif len(args.runs) == 1 and len(rows) == 1:
        print("\n".join(status.details(rows[0])))
    else:
        print("\n".join(status.table(rows)))
    return EXIT_DONE


def _logs(folder: RunFolder, args: argparse.Namespace) -> int:
    jobs = logs.log_jobs(folder)
    job = args.job or (jobs[-1] if jobs else "")
    if job not in jobs:
        there = ", ".join(jobs) or "none yet"
        raise ConfigError(f"{folder.logs}: no logs of job {job or '(any)'}; there are: {there}")
    ranks = logs.parse_ranks(args.rank, logs.log_ranks(folder, job))
    several = len(ranks) > 1
    lines = logs.read_lines(folder, job, ranks, args.attempt, max(0, args.lines))
    logs.show(lines, args.json, several)
    if args.follow:
        logs.follow(
            folder,
            job,
            ranks,
            lambda new: logs.show(new, args.json, several),
            seldom(lambda: _goes_on(folder), LIVE_ASKED_S),
        )
    return EXIT_DONE


def _goes_on(folder: RunFolder) -> bool:
    return standing(folder, live_jobs(), read_attempts(folder)).is_live


if __name__ == "__main__":
    sys.exit(main())
