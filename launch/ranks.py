"""Starts, watches and ends the ranks of one node.

In: a command, one environment and one log file a rank, stop requests. Out: a `GroupResult`: one exit code for the node,
the rank to blame, and why. No rank outlives the supervisor, whatever happens to it. `rounds` polls what is here.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from ii_dist.config.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED
from launch.output import OutputPump, without_stamps
from launch.verdict import blame

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
POLL_S = 0.1
GRACE_S = 5.0
"""Then ranks that outlived a failed one are killed: they may wait for it in a collective."""
SETTLE_S = 1.0
"""Time for ranks that fail together to be seen together, so that the cause is named and not an echo of it."""
AGAIN_S = 1.0
"""A request repeated sooner is taken for the same one: schedulers send a signal over several ways at once."""
STACKS_SIGNAL = signal.SIGUSR1
"""Ranks write the stacks of their threads (`ii_dist.runtime.heartbeat`); a rank that does not know it dies of it."""
STACKS_S = 3.0
"""They have this long for it."""
STACKS_POLL_S = 0.03
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class RankStart:
    """What one rank needs to start."""

    rank: int
    environ: Mapping[str, str]
    log: Path
    cores: tuple[int, ...] = ()
    """Cores to run on; none = all of the supervisor's."""


@dataclass(frozen=True, slots=True)
class GroupResult:
    """How the ranks of a node ended."""

    exit_code: int
    failed_rank: int | None
    why: str
    echo: bool = False
    """The ranks only ended because those of another node had to."""


class StopSignals:
    """Collects stop requests while open. The handler only notes; whoever polls decides."""

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for signum in STOP_SIGNALS:
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before if callable(before) or isinstance(before, int) else signal.SIG_DFL)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._arrived.append(signum)

    def pending(self) -> bool:
        """Whether there are requests that nobody has taken yet."""
        return bool(self._arrived)

    def take(self) -> list[int]:
        """Requests since the last call, oldest first."""
        taken, self._arrived = self._arrived, []
        return taken


class RankGroup:
    """The live ranks of this node and the codes of those that ended."""

    def __init__(self, grace_s: float, again_kills: bool) -> None:
        self._live: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: dict[int, Path] = {}
        self._grace_s = grace_s
        self._again_kills = again_kills
        self._codes: dict[int, int] = {}
        self._failures: list[tuple[int, int]] = []
        self._ended_by_us: set[int] = set()
        self._failed_at_s: float | None = None
        self._asked_at_s: float | None = None
        self._terminated_at_s: float | None = None
        self._forced_by = 0
        self._ended_for_others = False
        self._pump = OutputPump()

    def start(self, command: Sequence[str], starts: Sequence[RankStart]) -> None:
        """Start every rank, its output appended to its log, in a process group of its own."""
        before_exec = _dies_with_parent()
        for start in starts:
            pipe = self._pump.add(start.rank, start.log)
            try:
                process = subprocess.Popen(
                    list(command),
                    env=dict(start.environ),
                    stdin=subprocess.DEVNULL,
                    stdout=pipe,
                    stderr=subprocess.STDOUT,
                    process_group=0,  # so that a rank's own children can be ended with it
                    preexec_fn=before_exec,
                )
            finally:
                os.close(pipe)
            self._live[start.rank] = process
            self._logs[start.rank] = start.log
            if start.cores:
                with contextlib.suppress(OSError):  # gone already
                    os.sched_setaffinity(process.pid, start.cores)
        self._pump.start()

    @property
    def alive(self) -> bool:
        return bool(self._live)

    @property
    def pids(self) -> dict[int, int]:
        """The live ranks and their processes."""
        return {rank: process.pid for rank, process in self._live.copy().items()}

    @property
    def failing(self) -> bool:
        """Whether a rank of this node failed by itself."""
        return bool(self._failures)

    def ask_to_stop(self, signum: int) -> None:
        """Pass a stop request on to every rank once; a later SIGTERM or SIGINT may mean: now.

        The ranks get SIGUSR2 whatever came: SLURM signals them as well as us, and to a rank a second SIGTERM means now.
        """
        now_s = time.monotonic()
        if self._asked_at_s is None:
            self._asked_at_s = now_s
            self._signal(signal.SIGUSR2)
        if signum == signal.SIGUSR2:
            return
        if self._terminated_at_s is None:
            self._terminated_at_s = now_s
        elif self._again_kills and now_s - self._terminated_at_s > AGAIN_S:
            self._forced_by = signum
            self.kill()

    def reap(self) -> None:
        """Note the ranks that ended; when one failed, the others have `grace_s` left."""
        ended = [(rank, code) for rank, p in self._live.items() if (code := p.poll()) is not None]
        for rank, code in ended:
            _kill_group(self._live.pop(rank).pid)  # what it left behind, such as loader processes
            self._codes[rank] = code
        bad = [pair for pair in ended if pair[1] not in (EXIT_DONE, EXIT_STOPPED) and pair[0] not in self._ended_by_us]
        self._failures += bad
        now_s = time.monotonic()
        if self._failures and self._failed_at_s is None:
            self._failed_at_s = now_s
        failed_since_s = 0.0 if self._failed_at_s is None else now_s - self._failed_at_s
        if failed_since_s >= SETTLE_S and not self._ended_by_us.issuperset(self._live):
            self._ended_by_us.update(self._live)
            self._signal(signal.SIGTERM)
        if failed_since_s >= SETTLE_S + self._grace_s:
            self.kill()

    def end_for_others(self) -> None:
        """Ranks of another node failed: these have `grace_s` left."""
        if self._failed_at_s is None:
            self._ended_for_others = True
            self._failed_at_s = time.monotonic() - SETTLE_S

    def write_stacks(self, note: str) -> None:
        """Have every live rank write the stacks of its threads to its log, under a line of ours."""
        self._ended_by_us.update(self._live)
        logs = {rank: log for rank, log in self._logs.items() if rank in self._live}
        for log in logs.values():
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                file.write(f"== {note}\n")
        empty = {rank: _size(log) for rank, log in logs.items()}
        writes: set[int] = set()
        self._signal(STACKS_SIGNAL)
        self._signal(signal.SIGCONT)  # a stopped process sees no other signal
        until_s = time.monotonic() + STACKS_S
        while (waiting := [rank for rank in empty if rank in self._live]) and time.monotonic() < until_s:
            time.sleep(STACKS_POLL_S)
            self.reap()
            for rank in waiting:
                if rank in writes and rank in self._live:  # all is written; it shall not train on until it is killed
                    self._live[rank].send_signal(signal.SIGSTOP)
                    del empty[rank]
                elif _size(logs[rank]) > empty[rank]:
                    writes.add(rank)

    def kill(self) -> None:
        """End every live rank at once, with all its children."""
        self._ended_by_us.update(self._live)
        for process in self._live.values():
            _kill_group(process.pid)

    def close(self) -> None:
        """Kill what is left, wait for it, carry the last words to the logs."""
        self.kill()
        for rank, process in self._live.items():
            self._codes[rank] = process.wait()
        self._live.clear()
        self._pump.close()

    def result(self) -> GroupResult:
        """Judge the ended group. A rank that died of a stop signal before it could listen has stopped as asked."""
        if self._forced_by:
            name = signal_name(self._forced_by)
            return GroupResult(128 + self._forced_by, None, f"ended at once by a second {name}; nothing was saved")
        asked = self._asked_at_s is not None
        failures = [(r, code) for r, code in self._failures if not (asked and -code in STOP_SIGNALS)]
        if not failures and self._ended_for_others:
            return GroupResult(EXIT_ENVIRONMENT, None, "ended because ranks of another node had", echo=True)
        if failures:
            rank, code = min(failures, key=lambda pair: blame(*pair))
            if code < 0:
                return GroupResult(128 - code, rank, f"rank {rank} was killed by {signal_name(-code)}")
            return GroupResult(code, rank, f"rank {rank} ended with exit code {code}")
        if self._failures or EXIT_STOPPED in self._codes.values():
            return GroupResult(EXIT_STOPPED, None, "stopped as asked")
        return GroupResult(EXIT_DONE, None, "done")

    def _signal(self, signum: int) -> None:
        for process in self._live.values():
            process.send_signal(signum)


def last_lines(path: Path, lines: int, limit_bytes: int = 16384) -> list[str]:
    """The end of a log, at most `lines` and `limit_bytes`; nothing where there is no log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit_bytes))
            text = without_stamps(file.read()).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-lines:]


def signal_name(signum: int) -> str:
    names = {int(known): known.name for known in signal.Signals}
    return names.get(signum, f"signal {signum}")  # most real-time signals have no name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _kill_group(process_group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)


def _dies_with_parent() -> Callable[[], None]:
    """For a child between fork and exec: SIGKILL when the supervisor dies, even of SIGKILL (Linux's prctl)."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return before_exec
