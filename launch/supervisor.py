"""From the first start of the ranks to the last: restarts inside the job, the end, and how the run goes on.

In: a job's fields and this node's place. Out: the record of the job, the exit code of this node's task. The
supervisors of all nodes go through the same starts: node 0 orders, the others follow, and a restart begins only when
no rank of the start before it is left on any node that answers.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ii_dist.config import ClusterError, RunFolder, UserError
from ii_dist.config.errors import EXIT_ENVIRONMENT, EXIT_STOPPED
from launch import bus as buses
from launch import preflight
from launch.bus import Bus
from launch.fields import JobFields
from launch.ranks import StopSignals, signal_name
from launch.records import (
    EndedAs,
    Facts,
    JobRecord,
    cancel_path,
    newest_step,
    now_text,
    write_record,
)
from launch.rendezvous import Place, bus_ports, free_port, open_port, slurm_port
from launch.requeue import JobClock, job_fields, reason_of_stop, requeue
from launch.rounds import Round, Start
from launch.submitted import note_again
from launch.verdict import Ending, can_restart, ended_well, merge

ANSWER_S = 30.0
"""A supervisor whose ranks have failed says so within this time, or its node counts as lost."""
LEAVE_S = 5.0
PORT_TRIES = 8
_WAIT_S = 0.1


class Supervisor:
    """One node's supervisor through one attempt of a job."""

    def __init__(self, job: JobFields, place: Place, record_path: Path, record: JobRecord, stop: StopSignals) -> None:
        self._job, self._place, self._stop = job, place, stop
        self._folder = RunFolder(Path(job.run_folder))
        self._record_path = record_path
        self._record = replace(record, step_start=newest_step(self._folder))
        self._clock: JobClock | None = None
        self._bus = Bus(place.node_rank, {})
        self._round_step = 0

    @property
    def leads(self) -> bool:
        return self._place.node_rank == 0

    def run(self, environ: Mapping[str, str]) -> tuple[Ending, JobRecord]:
        """Train until there is nothing more to do here; the ending of the job and its record, already written."""
        self._write()
        try:
            ending = self._attempt(environ)
        except UserError as error:
            ended_as: EndedAs = "environment" if isinstance(error, ClusterError) else "launch"
            ending = Ending(error.exit_code, str(error), ended_as, last_line=str(error))
            if self.leads:
                self._order_end(ending)
        ending = self._say_why(ending)
        self._record = replace(
            self._record.ended(ending.exit_code, ending.failed_rank, ending.why),
            ended_as=ending.ended_as,
            last_line=ending.last_line,
            failed_host=ending.failed_host,
            step_end=newest_step(self._folder),
        )
        self._write()
        if self._bus.others and self.leads:
            self._let_others_leave(ending)
        self._bus.close()
        self._go_on(ending)
        return ending, self._record

    def _attempt(self, environ: Mapping[str, str]) -> Ending:
        if self._job.executor == "slurm" and self.leads:
            self._clock = JobClock.of_job(self._place.job, environ)
            self._update(time_limit=self._clock.text())
        self._bus = self._meet()
        start = self._first_start() if self.leads else self._next_start(ANSWER_S + buses.MEET_S)
        if isinstance(start, Start) and self._job.watch.preflight:
            start = self._check_nodes(start, environ)
        while isinstance(start, Start):
            start = self._round(start, environ)
        return start

    def _meet(self) -> Bus:
        if self._job.nodes == 1:
            return Bus(0, {})
        place, asked = self._place, self._stop.pending
        ports, name = bus_ports(place.raw_id, place.attempt), f"{place.job} {place.attempt}"
        if self.leads:
            return buses.lead(ports, self._job.nodes, name, self._job.secret, asked)
        return buses.follow(place.master_addr, ports, place.node_rank, name, self._job.secret, asked)

    def _first_start(self) -> "Start | Ending":
        if len(self._bus.others) < self._job.nodes - 1 or self._stop.pending():
            self._note_asked()
            return self._order_end(Ending(EXIT_STOPPED, "stopped as asked, before the ranks were started", "stopped"))
        return self._order_start(0)

    def _order_start(self, restart: int) -> Start:
        """Choose a port for rank 0 and tell all nodes. Raises ClusterError where none is free."""
        job, place = self._job, self._place
        if job.master_port:
            ports: tuple[int, ...] = (job.master_port,)
        elif job.executor == "slurm":
            ports = tuple(slurm_port(place.raw_id, place.attempt, restart + 7 * i) for i in range(PORT_TRIES))
        else:
            ports = (free_port(),)
        start = Start(restart, place.master_addr, open_port(ports), (*job.command, str(self._folder.config)))
        self._bus.send("start", restart=restart, port=start.master_port)
        return start

    def _order_end(self, ending: Ending) -> Ending:
        self._bus.send("leave", ending=asdict(ending))
        return ending

    def _next_start(self, limit_s: float | None) -> "Start | Ending":
        """What node 0 orders; None = wait for as long as node 0 is there."""
        until_s = None if limit_s is None else time.monotonic() + limit_s
        while self._bus.others and (until_s is None or time.monotonic() < until_s):
            self._note_asked()
            lost = self._bus.lost  # before the last look: node 0 may have spoken and left
            for _, message in self._bus.poll("start", "leave"):
                if message["kind"] == "start":
                    command = (*self._job.command, str(self._folder.config))
                    return Start(int(message["restart"]), self._place.master_addr, int(message["port"]), command)
                return Ending(**message["ending"])
            if lost:
                break
            time.sleep(_WAIT_S)
        if not self._bus.others:
            return Ending(EXIT_STOPPED, "stopped as asked, before the ranks were started", "stopped")
        host = self._place.hosts[0]
        return Ending(EXIT_ENVIRONMENT, f"node 0 ({host}) no longer answers", "node_failure", failed_host=host)

    def _round(self, start: Start, environ: Mapping[str, str]) -> "Start | Ending":
        """One start of the ranks on all nodes, and what follows."""
        began, self._round_step = now_text(), newest_step(self._folder)
        this = Round(self._job, self._place, start, environ)
        clock = None if self._record.asked else self._clock
        own = this.run(self._stop, self._bus, clock, self._asked)
        own = replace(own, asked=self._record.asked)
        if not self.leads:
            self._bus.send("ended", restart=start.restart, ending=asdict(own))
            return self._next_start(None if ended_well(own) else ANSWER_S + self._job.grace_s)
        ending = merge(self._gather(own, start.restart))
        self._note_round(start.restart, began, ending)
        return self._decide(ending, start.restart)

    def _gather(self, own: Ending, restart: int) -> list[Ending]:
        """The endings of all nodes, this one's first. A node that does not answer in time counts as lost."""
        endings = {0: own}
        until_s = time.monotonic() + ANSWER_S + self._job.grace_s
        while missing := self._bus.others - set(endings):
            failed = any(not ended_well(ending) for ending in endings.values()) or self._bus.lost
            if missing <= self._bus.lost or (failed and time.monotonic() > until_s):
                break
            if not failed:
                until_s = time.monotonic() + ANSWER_S + self._job.grace_s
            self._note_asked()
            for node, message in self._bus.poll("ended"):
                if message.get("restart") == restart:
                    endings[node] = Ending(**message["ending"])
            time.sleep(_WAIT_S)
        for node in self._bus.others - set(endings):
            host = self._place.hosts[node]
            words = f"node {node} ({host}) no longer answers"
            endings[node] = Ending(EXIT_ENVIRONMENT, words, "node_failure", failed_host=host)
        return [endings[node] for node in sorted(endings)]

    def _decide(self, ending: Ending, restart: int) -> "Start | Ending":
        """Once more, or the end; told to all nodes."""
        progress = newest_step(self._folder) > self._round_step
        again = restart > 0 or self._record.attempt > 0
        barren = 0 if progress else self._record.barren_restarts + int(again)
        if ended_well(ending) or self._record.asked or ending.asked:
            return self._order_end(ending)
        limit = self._job.watch.max_restarts
        self._update(barren_restarts=barren)
        if not can_restart(ending) or limit == 0:
            return self._order_end(ending)
        if barren >= limit:
            words = f"{ending.why}; {barren} restarts in a row brought no new checkpoint"
            return self._order_end(replace(ending, why=words))
        print(f"restart {restart + 1}: {ending.why}", flush=True)
        self._update(restarts=restart + 1)
        return self._order_start(restart + 1)

    def _check_nodes(self, start: Start, environ: Mapping[str, str]) -> "Start | Ending":
        """Measure the nodes first; what stands out is only noted."""
        check = replace(start, command=preflight.command(self._job, self._folder, self._place.job))
        own = Round(preflight.fields(self._job), self._place, check, environ).run(
            self._stop, self._bus, None, self._asked
        )
        if not self.leads:
            self._bus.send("ended", restart=start.restart, ending=asdict(own))
            return self._next_start(ANSWER_S + self._job.grace_s)
        ending = merge(self._gather(own, start.restart))
        lines, outliers = preflight.judge_file(self._folder, self._place.job, ending)
        print("\n".join(lines), flush=True)
        self._update(excluded=tuple(outliers))
        if self._record.asked:
            return self._order_end(Ending(EXIT_STOPPED, "stopped as asked, before training", "stopped"))
        return self._order_start(0)

    def _say_why(self, ending: Ending) -> Ending:
        """The ending, a stop named by who asked for it."""
        self._note_asked()
        asked = self._record.asked or ending.asked
        if not asked or self._job.executor != "slurm" or ending.ended_as == "finished" or not self.leads:
            return ending
        cancelled = cancel_path(self._folder, self._place.job).exists()
        near = asked == "time" or (self._clock is not None and self._clock.near(self._job.watch.signal_lead_s))
        reason = reason_of_stop(asked, job_fields(self._place.job), cancelled, near)
        words = {"time_limit": "before the time limit", "preempted": "for a preemption"}.get(reason, "as asked")
        if ending.exit_code == EXIT_STOPPED:
            return replace(ending, ended_as=reason, why=f"stopped {words}")
        return replace(ending, ended_as=reason, why=f"{ending.why}, while asked to stop {words}")

    def _go_on(self, ending: Ending) -> None:
        """Have SLURM run the job again where the end was not the run's."""
        job, asked = self._place.job, self._record.asked or ending.asked
        lost = ending.ended_as == "node_failure" and (self.leads or self._place.node_rank == 1)
        wanted = (asked and self.leads and ending.ended_as != "finished") or lost
        if self._job.executor != "slurm" or not self._job.watch.requeue or not wanted:
            return
        state = job_fields(job).get("JobState", "RUNNING")
        if cancel_path(self._folder, job).exists() or state == "CANCELLED":
            return
        if lost and self._record.barren_restarts >= max(1, self._job.watch.max_restarts):
            return
        self._update(requeued="scontrol")  # before: SLURM may end this process as soon as it agrees
        if state != "RUNNING":  # it is being requeued already
            return
        try:
            folder = Path(self._job.submitit_folder or self._folder.jobs / "submitit")
            how = requeue(job, folder, self._record.excluded)
        except ClusterError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            self._update(requeued="", why=f"{self._record.why}; {error}")
            return
        if how != "scontrol":
            self._update(requeued=how)
            note_again(self._folder, job, how.removeprefix("job "))
        print(f"job {job}: goes on ({how})", flush=True)

    def _let_others_leave(self, ending: Ending) -> None:
        """A node that leaves with a code ends the step: node 0 goes last."""
        until_s = time.monotonic() + LEAVE_S
        while self._bus.others - self._bus.lost and time.monotonic() < until_s:
            self._bus.poll()
            time.sleep(_WAIT_S)

    def _asked(self, name: str) -> None:
        if not self._record.asked:
            self._update(asked=name)

    def _note_asked(self) -> None:
        for signum in self._stop.take():
            self._asked(signal_name(signum))

    def _note_round(self, restart: int, began: str, ending: Ending) -> None:
        facts: Facts = asdict(ending)
        for unused in ("hang", "stepped", "asked"):
            del facts[unused]
        steps = {"step_start": self._round_step, "step_end": newest_step(self._folder)}
        self._update(
            rounds=(*self._record.rounds, {"restart": restart, "start": began, "end": now_text(), **facts, **steps})
        )

    def _update(self, **changes: object) -> None:
        self._record = replace(self._record, **changes)  # type: ignore[arg-type]
        self._write()

    def _write(self) -> None:
        write_record(self._record_path, self._record)
