"""What the loop works with: every room's part of a run, and what is due at which step.

In: parts that `opening` made. Out: a `Session`, whose methods are the verbs of the loop.
"""

import dataclasses
import logging
import time

import torch

from ii_dist.checkpoint import Saver, SaveResult
from ii_dist.config import CheckpointError, ConfigError, Plan, RunConfig, RunFolder
from ii_dist.data import Batch, BatchSource
from ii_dist.engine import Engine
from ii_dist.metrics import Board, StepClock
from ii_dist.metrics.machine import MachineWatch
from ii_dist.metrics.means import RunningMeans, eval_tags, train_tags
from ii_dist.metrics.memory import memory_tags
from ii_dist.metrics.ranks import RankTable
from ii_dist.optim import learning_rate
from ii_dist.runtime import Heartbeat, Watchdog, World
from ii_dist.runtime.group import sum_over_ranks
from ii_dist.runtime.heartbeat import Phase
from ii_dist.runtime.stop import StopVote
from ii_dist.train.bad_files import BadFileLedger, count_left_out, refuse_many
from ii_dist.train.efficiency import Efficiency
from ii_dist.train.evaluate import evaluate
from ii_dist.train.pictures import Pictures
from ii_dist.train.traces import Traces

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Results:
    """Evaluation results of the run so far; travels in the checkpoint."""

    evaluated_step: int = 0
    top1: float | None = None
    top5: float | None = None
    best_top1: float | None = None


@dataclasses.dataclass(slots=True)
class Session:
    """Everything that the loop works with on one rank. Every rank calls its methods at the same steps."""

    cfg: RunConfig
    plan: Plan
    world: World
    folder: RunFolder
    device: torch.device
    engine: Engine
    train_source: BatchSource
    eval_source: BatchSource
    means: RunningMeans
    clock: StepClock
    ranks: RankTable
    machine: MachineWatch
    board: Board
    pictures: Pictures
    traces: Traces
    bad_files: BadFileLedger
    saver: Saver
    watchdog: Watchdog
    heart: Heartbeat
    ballot: StopVote
    results: Results
    efficiency: Efficiency | None = None
    """Of rank 0, where the machine's peaks are known."""
    saved_step: int = 0
    stopping: bool = False

    def sign(self, phase: Phase) -> None:
        """Tell the supervisor that this rank lives, and what it is about to do."""
        self.heart.sign(phase, self.engine.step)

    def show(self, batch: Batch) -> None:
        """Pictures of the first batch that this attempt trains on; nothing of the others."""
        if self.pictures.batch_is_due:
            with self.clock.pause():
                self.pictures.batch(batch, self.engine.step)

    def vote(self) -> None:
        """Learn whether any rank was asked to stop."""
        self.stopping = self.ballot.cast() or self.engine.step == self.cfg.train.stop_after_steps

    def log_is_due(self) -> bool:
        step = self.engine.step
        return step % self.plan.log_every_steps == 0 or step == self.plan.total_steps or self.stopping

    def evaluation_is_due(self) -> bool:
        step = self.engine.step
        due = step > 0 and (step % self.plan.eval_every_steps == 0 or step == self.plan.total_steps)
        return due and self.results.evaluated_step != step

    def save_is_due(self) -> bool:
        step = self.engine.step
        regular = any(step % every == 0 for every in self.plan.save_every_steps)
        return step != self.saved_step and (regular or step == self.plan.total_steps)

    def log(self) -> None:
        """Write the numbers since the last line; the one place that waits for the device."""
        step = self.engine.step
        self.traces.look(step)
        means = self.means.read(reduce=True)
        with self.clock.logging():
            tags = train_tags(means) | self._figures(step) | memory_tags(self.device) | self.machine.tags()
            if self.efficiency is not None:
                tags |= self.efficiency.tags(step, tags.get("throughput/images_per_s", 0.0))
            tags["train/epoch"] = step / self.plan.steps_per_epoch
            tags["train/learning_rate"] = learning_rate(step - 1, self.cfg.optim, self.plan)
            self._report_saves(self.saver.poll(), tags)
            self.board.write(step, tags)
        self.bad_files.check()
        limit = self.cfg.train.max_skipped_in_a_row
        if means["skipped_in_row"] >= limit:
            raise ConfigError(
                f"step {step}: {means['skipped_in_row']:.0f} updates in a row were left out for a non-finite loss or "
                f"gradient (train.max_skipped_in_a_row {limit}); lower optim.lr or lengthen optim.warmup_epochs, then "
                "start again from the newest checkpoint"
            )

    def evaluate(self) -> None:
        """Exact accuracy on the evaluation set; given up when the ranks agree to stop in the middle of it."""

        def interrupted() -> bool:
            self.watchdog.beat()
            self.sign("evaluate")
            self.stopping = self.stopping or self.ballot.cast()
            return self.stopping

        self.sign("evaluate")
        started_s = time.monotonic()
        with self.clock.pause():
            batches = self.pictures.watch(self.engine, self.eval_source)
            means = evaluate(self.engine, batches, self.device, interrupted)
        left_out = count_left_out(self.eval_source, self.folder.quarantine)
        if means is None:
            logger.info("evaluation of step %d given up to stop; it is made again on resume", self.engine.step)
            return
        best = max(means["top1"], self.results.best_top1 or 0.0)
        self.results = Results(self.engine.step, means["top1"], means["top5"], best)
        tags = eval_tags(means, time.monotonic() - started_s)
        self.board.write(self.engine.step, tags | {"eval/left_out_images": float(left_out)})
        refuse_many(self.cfg, left_out, self.plan.eval_images, "evaluation", self.folder.quarantine)

    def save(self) -> None:
        """Start saving this step in the background."""
        self.sign("save")
        with self.clock.saving():
            state, position = self.engine.state(), self.train_source.position()
            scalars = {"engine": state.scalars, "results": dataclasses.asdict(self.results)}
            self.saver.save(self.engine.step, position.epoch, position.offset, state.tensors, scalars)
        self.saved_step = self.engine.step
        self.sign("step")

    def finish(self) -> None:
        """Wait for the last save. Raises CheckpointError if it failed: the run's end would be lost."""
        self.sign("finish")
        tags: dict[str, float] = {}
        results = self.saver.wait()
        self._report_saves(results, tags)
        if tags:
            self.board.write(self.engine.step, tags)
        if results and not results[-1].ok:
            raise CheckpointError(results[-1].message)

    def _figures(self, step: int) -> dict[str, float]:
        """Speed, the ranks beside each other, bad files: whole numbers of all ranks in one sum. Collective."""
        reading = self.clock.read()
        bad, phases = self.bad_files.row(step), self.ranks.row(reading.phase_seconds() | {"step": reading.step_s})
        sums = sum_over_ranks([*bad, *phases])
        return reading.tags() | self.bad_files.tags(step, sums[: len(bad)]) | self.ranks.tags(sums[len(bad) :])

    def _report_saves(self, results: list[SaveResult], tags: dict[str, float]) -> None:
        for result in results:
            if result.message:
                logger.log(logging.WARNING if result.ok else logging.ERROR, "%s", result.message)
            if result.late_s > 0.01:
                logger.warning("step %d: waited %.2f s for the save before it", result.step, result.late_s)
            if result.ok:
                self.heart.saved(result.seconds)
                tags |= {"checkpoint/bytes": float(result.bytes), "checkpoint/seconds": result.seconds}
