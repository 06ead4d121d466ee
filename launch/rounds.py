"""One start of the ranks of this node, from the first process to the last, watched.

In: a `Start` that all nodes agreed on. Out: an `Ending`. Stop requests, failures here and on other nodes, silence of a
rank and the end of the job's time are all looked at in one loop that never waits for longer than `POLL_S`.
"""

import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ii_dist.config import RunFolder
from ii_dist.config.errors import EXIT_DONE, EXIT_ENVIRONMENT
from launch.beats import Limits, NodeLife, first_silent
from launch.bus import Bus
from launch.fields import JobFields
from launch.machine import cores_of_a_rank, share_cores
from launch.ranks import POLL_S, GroupResult, RankGroup, RankStart, StopSignals, last_lines, signal_name
from launch.records import Facts, beats_path, now_text, write_json
from launch.rendezvous import Place, launch_number
from launch.requeue import JobClock
from launch.verdict import Ending, classify, last_words, memory_kills

BEATS_EVERY_S = 5.0
SHOWN_LINES = 20


@dataclass(frozen=True, slots=True)
class Start:
    """What all nodes agreed on for one start of the ranks."""

    restart: int
    master_addr: str
    master_port: int
    command: tuple[str, ...]


def rank_environ(
    job: JobFields, place: Place, start: Start, local_rank: int, environ: Mapping[str, str]
) -> dict[str, str]:
    """The environment of one rank: the supervisor's own, and who this rank is."""
    rank = place.node_rank * job.ranks_per_node + local_rank
    env = dict(environ)
    env.update(
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(job.nodes * job.ranks_per_node),
        LOCAL_WORLD_SIZE=str(job.ranks_per_node),
        GROUP_RANK=str(place.node_rank),
        MASTER_ADDR=start.master_addr,
        MASTER_PORT=str(start.master_port),
        II_DIST_JOB=place.job,
        II_DIST_ATTEMPT=str(launch_number(place.attempt, start.restart)),
        PYTHONUNBUFFERED="1",
    )
    env.setdefault("OMP_NUM_THREADS", str(job.cpus_per_rank or cores_of_a_rank(job.ranks_per_node)))
    if job.network_interface:
        env.update(GLOO_SOCKET_IFNAME=job.network_interface, NCCL_SOCKET_IFNAME=job.network_interface)
    elif job.executor == "local" and any(name == "lo" for _, name in socket.if_nameindex()):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no name to resolve, no port open to others
    if job.executor == "local":
        env.pop("CUDA_VISIBLE_DEVICES", None)
        if job.cuda_visible_devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = job.cuda_visible_devices
    return env


class Round:
    """The ranks of this node from one start to their end."""

    def __init__(self, job: JobFields, place: Place, start: Start, environ: Mapping[str, str]) -> None:
        self._job, self._place, self._start, self._environ = job, place, start, environ
        self._folder = RunFolder(Path(job.run_folder))
        first = place.node_rank * job.ranks_per_node
        limits = Limits(job.watch.hang_after_s, job.watch.hang_steps, job.watch.start_timeout_s)
        self._life = NodeLife(range(first, first + job.ranks_per_node), limits)
        self._group = RankGroup(job.grace_s, again_kills=job.executor == "local")
        self._hang: dict[str, Facts] = {}
        self._told = False

    @property
    def lead_s(self) -> float:
        """Seconds that a stop would need now."""
        return self._life.lead_s

    def run(self, stop: StopSignals, bus: Bus, clock: JobClock | None, on_asked: Callable[[str], None]) -> Ending:
        """Start the ranks and watch them to their end.

        on_asked: told of each request to stop, once, by name. clock: of the job's time limit, on the node that decides.
        """
        killed_before, group = memory_kills(), self._group
        with self._life, _Publisher(self._facts, beats_path(self._folder, self._place.job, self._place.node_rank)):
            try:
                group.start(self._start.command, self._starts())
                while group.alive:
                    self._pass_on(stop, on_asked)
                    group.reap()
                    self._look_for_silence(bus)
                    self._listen(bus)
                    if clock is not None and clock.due(self._life.lead_s):
                        clock = None
                        on_asked("time")
                        group.ask_to_stop(signal.SIGUSR2)
                    time.sleep(POLL_S)
            finally:
                group.close()
            self._pass_on(stop, on_asked)  # arrived while the last rank ended: it explains a rank that died of it
            return self._ending(group.result(), memory_kills() > killed_before)

    def _starts(self) -> list[RankStart]:
        self._folder.logs.mkdir(parents=True, exist_ok=True)
        ranks = self._job.ranks_per_node
        bind = self._job.executor == "slurm" and self._job.watch.bind_cores
        shares, starts = share_cores(ranks) if bind else [()] * ranks, []
        place = self._place
        for local_rank, cores in enumerate(shares):
            env = rank_environ(self._job, place, self._start, local_rank, self._environ)
            rank = int(env["RANK"])
            env["II_DIST_BEATS"] = str(self._life.path(rank))
            log = self._folder.rank_log(place.job, rank)
            with log.open("a", encoding="utf-8") as file:
                again = f" restart {self._start.restart}" if self._start.restart else ""
                bound = f", cores {','.join(map(str, cores))}" if cores else ""
                file.write(f"== job {place.job} attempt {place.attempt}{again} rank {rank} of {env['WORLD_SIZE']}")
                file.write(f" on {place.hosts[place.node_rank]}, {now_text()}{bound}\n")
            starts.append(RankStart(rank, env, log, cores))
        return starts

    def _pass_on(self, stop: StopSignals, on_asked: Callable[[str], None]) -> None:
        for signum in stop.take():
            self._group.ask_to_stop(signum)
            on_asked(signal_name(signum))

    def _look_for_silence(self, bus: Bus) -> None:
        self._life.look()
        live = [] if self._group.failing or self._hang else list(self._group.pids)
        if self._life.silent(live):
            self._end_hung()
        if not self._told and (self._hang or self._group.failing):
            self._told = True
            bus.send("failing", restart=self._start.restart, hang=bool(self._hang))

    def _listen(self, bus: Bus) -> None:
        """Ranks of another node failed, or the node is gone: end these too. Node 0 passes it on."""
        failing, hang = bool(bus.lost), False
        for _, message in bus.poll("failing"):
            if message.get("restart") == self._start.restart:
                failing, hang = True, hang or message.get("hang") is True
        if failing and not self._told:
            self._told = True
            bus.send("failing", restart=self._start.restart, hang=hang)
        if hang and not self._hang:
            self._end_hung()
        elif failing:
            self._group.end_for_others()

    def _end_hung(self) -> None:
        """Say who is silent, have all ranks write their stacks, end them."""
        self._hang = self._facts_of_ranks()
        rank = first_silent(self._hang)
        facts = self._hang[str(rank)]
        note = f"hang: on this node rank {rank} fell silent first, in {facts['phase']} of step {facts['step']};"
        print(f"{note} see the stacks in the logs of the ranks", flush=True)
        self._group.write_stacks(f"{note} the stacks of all threads follow, {now_text()}")
        self._group.kill()

    def _ending(self, result: GroupResult, killed_for_memory: bool) -> Ending:
        host, stepped = self._place.hosts[self._place.node_rank], self._life.stepped
        if self._hang:
            why = f"rank(s) on {host} gave no sign of life"
            return Ending(EXIT_ENVIRONMENT, why, "hang", None, host, stepped=stepped, hang=self._hang)
        if result.echo:
            return Ending(result.exit_code, result.why, stepped=stepped)
        if result.failed_rank is None:
            return Ending(result.exit_code, result.why, "finished" if result.exit_code == EXIT_DONE else "stopped")
        lines = last_lines(self._folder.rank_log(self._place.job, result.failed_rank), SHOWN_LINES)
        lines = lines[max((i + 1 for i, line in enumerate(lines) if line.startswith("== ")), default=0) :]
        ended_as = classify(result.exit_code, lines, killed_for_memory and result.exit_code == 128 + 9)
        words, named = last_words(lines), any(line.startswith("error: ") for line in lines)
        why = f"rank {result.failed_rank}: {words}" if named else result.why
        if ended_as == "out_of_memory" and result.exit_code > 128:
            why = f"{result.why}: the node was out of memory"
        return Ending(result.exit_code, why, ended_as, result.failed_rank, host, words, stepped=stepped)

    def _facts_of_ranks(self) -> dict[str, Facts]:
        return self._life.facts(self._group.pids)

    def _facts(self) -> Facts:
        place = self._place
        return {
            "job": place.job,
            "attempt": place.attempt,
            "restart": self._start.restart,
            "node_rank": place.node_rank,
            "host": place.hosts[place.node_rank],
            "time": now_text(),
            "ranks": self._facts_of_ranks(),
        }


class _Publisher:
    """Writes the ranks' lives to the run folder from a thread: a file server that hangs holds nothing else up."""

    def __init__(self, facts: Callable[[], Facts], path: Path) -> None:
        self._facts, self._path = facts, path
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(BEATS_EVERY_S)

    def _run(self) -> None:
        while not self._end.wait(BEATS_EVERY_S):
            try:
                write_json(self._path, self._facts(), durable=False)
            except OSError as error:
                print(f"{self._path}: not written ({error.strerror})", flush=True)
