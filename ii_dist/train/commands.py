"""`ii-dist train` and `ii-dist eval` on one rank, from arguments to an outcome.

In: a config, its plan, this process's world. Out: an exit code and the lines that rank 0 prints last.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ii_dist.config import CheckpointError, ClusterError, Plan, RunConfig, RunFolder
from ii_dist.config.errors import EXIT_DONE, EXIT_STOPPED
from ii_dist.data import make_eval_source
from ii_dist.engine import Engine
from ii_dist.metrics import Summary, format_summary, read_summary, write_summary
from ii_dist.models.table import format_models, model_rows
from ii_dist.runtime import World, set_up_logging
from ii_dist.train.bad_files import count_left_out, refuse_many
from ii_dist.train.evaluate import evaluate
from ii_dist.train.loop import fit
from ii_dist.train.opening import build_engine, join, open_session
from ii_dist.train.preflight import WEIGHTS_SUFFIX
from ii_dist.train.resume import find_start, load_start
from ii_dist.train.session import Session
from ii_dist.train.sharding_check import check_sharding

logger = logging.getLogger(__name__)

LOST_RANK_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Timed out", "remote process exited")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended on this rank; text is empty above rank 0."""

    exit_code: int
    text: str = ""


def train(cfg: RunConfig, plan: Plan, world: World, new_config: Sequence[str] = ()) -> Outcome:
    """Resume or start, train, save, sum up."""
    started_s = time.monotonic()
    set_up_logging(world)
    with _naming_lost_ranks(world), open_session(cfg, plan, world, new_config) as run:
        finished = fit(run)
        run.finish()
        text = _sum_up(run, time.monotonic() - started_s) if world.rank == 0 else ""
    return Outcome(EXIT_DONE if finished else EXIT_STOPPED, text)


def evaluate_checkpoint(cfg: RunConfig, plan: Plan, world: World, path: Path, score: bool = False) -> Outcome:
    """Exact accuracy of a run's newest step, of the step folder `path`, or of a safetensors file of weights.

    score: the text's last line is top-1 alone, for programs.
    """
    set_up_logging(world)
    with contextlib.ExitStack() as stack:
        device = join(cfg, world, stack)
        data, last = cfg.data_on(device.type), cfg.engine.channels_last
        source = make_eval_source(data, plan, world, cfg.seed, str(device), last, cfg.train.eval_batch_per_rank)
        stack.callback(source.close)
        check_sharding(cfg, plan, world, source)
        weights = path if path.suffix == WEIGHTS_SUFFIX else None
        if cfg.train.max_images_per_rank == "auto":  # the engine warms up with a batch that is known to be asked for
            plan = dataclasses.replace(plan, micro_batch=min(plan.micro_batch, cfg.train.eval_batch_per_rank))
        engine = build_engine(cfg, plan, world, device, weights)
        stack.callback(engine.close)
        title = path.name if weights else f"step {_load_newest(path, world, engine)}"
        means = evaluate(engine, source, device, lambda: False)
        assert means is not None
        left_out = count_left_out(source)
        refuse_many(cfg, left_out, plan.eval_images, str(path))
    without = f" ({left_out} bad ones left out)" if left_out else ""
    text = (
        f"{title}: top-1 {means['top1']:.2f} %, top-5 {means['top5']:.2f} %, "
        f"loss {means['loss']:.4f}, {means['images']:.0f} images{without}"
    )
    text += f"\n{means['top1']:.4f}" if score else ""
    return Outcome(EXIT_DONE, text if world.rank == 0 else "")


def _load_newest(path: Path, world: World, engine: Engine) -> int:
    """Fill the engine from a run's newest step or from the step folder `path`; the step."""
    step_folder = path if path.parent.name == "checkpoints" else None
    folder = RunFolder(path.parent.parent if step_folder else path)
    start = find_start(folder, world, step_folder)
    if start is None:
        raise CheckpointError(f"{folder.checkpoints}: no committed step there; train the run first")
    load_start(folder, start, engine)
    return start.step


def list_models() -> Outcome:
    """Every network with every gate: parameters, multiply-adds, published counts."""
    return Outcome(EXIT_DONE, format_models(model_rows()))


@contextlib.contextmanager
def _naming_lost_ranks(world: World) -> Iterator[None]:
    """A collective that fails because another rank has ended is not this rank's bug: say so in one line."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if world.world_size > 1 and any(sign in text for sign in LOST_RANK_SIGNS):
            raise ClusterError(
                f"rank {world.rank} lost another rank ({text.splitlines()[0][:160]}); the log of the rank that ended "
                "first says why"
            ) from None
        raise


def _sum_up(run: Session, seconds: float) -> str:
    """Write summary.json; the lines that say the same."""
    totals = run.clock.totals()
    before = read_summary(run.folder)
    if before is not None and not totals.cold.steps + totals.steady.steps:
        return f"nothing left to do; the run as it ended:\n{format_summary(run.folder, before)}"
    step = run.engine.step
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    summary = Summary(
        steps=step,
        total_steps=run.plan.total_steps,
        epochs=step / run.plan.steps_per_epoch,
        top1=run.results.top1,
        top5=run.results.top5,
        best_top1=run.results.best_top1,
        images_per_s=totals.images_per_s,
        cold_images_per_s=totals.cold.images_per_s * run.world.world_size,
        data_wait_share=totals.data_wait_share,
        seconds=seconds,
        world_size=run.world.world_size,
        device=device,
        newest_checkpoint=run.folder.step(run.saved_step).name if run.saved_step else None,
        phases_s=totals.phases.means_s(),
        mfu_share=run.efficiency.mfu_share if run.efficiency else None,
        roofline_share=run.efficiency.roofline_share if run.efficiency else None,
        bound=run.efficiency.bound if run.efficiency else "",
    )
    write_summary(run.folder, summary)
    return format_summary(run.folder, summary)
