"""The one place that knows all rooms: it opens them in order and closes them in reverse.

In: a config, its plan, this process's world. Out: a `Session` at the step where the run goes on.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ii_dist.checkpoint import CheckpointStore, Lease, RunFacts, Saver, take_lease
from ii_dist.checkpoint.disk import replace_file
from ii_dist.checkpoint.weights import load_network_file
from ii_dist.config import (
    IndexHeader,
    Plan,
    RunConfig,
    RunFolder,
    dump_config,
    load_config,
    read_index_header,
    refuse_unnamed_changes,
)
from ii_dist.data import BatchSource, make_eval_source, make_train_source
from ii_dist.engine import Engine, EngineParts, make_engine
from ii_dist.metrics import Board, StepClock, make_boards
from ii_dist.metrics.hparams import compared_settings
from ii_dist.metrics.machine import MachineWatch, machine_looks
from ii_dist.metrics.means import RunningMeans
from ii_dist.metrics.phases import make_phase_timer
from ii_dist.metrics.ranks import RankTable, own_phases
from ii_dist.models import create_model
from ii_dist.runtime import Heartbeat, Watchdog, World
from ii_dist.runtime.group import close_group, host_names, open_group, pick_device
from ii_dist.runtime.phases import UNTIMED, Phases
from ii_dist.runtime.seeds import seed_init
from ii_dist.runtime.stop import StopRequest, StopVote
from ii_dist.runtime.world import tell_libraries
from ii_dist.train.agree import on_rank0
from ii_dist.train.bad_files import BadFileLedger
from ii_dist.train.efficiency import open_efficiency
from ii_dist.train.fitting import fitting_plan
from ii_dist.train.in_words import run_in_words
from ii_dist.train.pictures import Pictures
from ii_dist.train.resume import StartPoint, check_same_run, find_start, load_start, remember_index, seek_start
from ii_dist.train.session import Results, Session
from ii_dist.train.sharding_check import check_sharding
from ii_dist.train.traces import Traces

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_session(cfg: RunConfig, plan: Plan, world: World, new_config: Sequence[str] = ()) -> Iterator[Session]:
    """Everything that `fit` needs, opened in the order in which it is needed; closed also when something fails.

    new_config: keys that may differ from what the run was started with.
    """
    folder = RunFolder(Path(cfg.runs_folder) / cfg.name)
    with contextlib.ExitStack() as stack:
        stop, heart = _open_signs(world, stack)
        device = join(cfg, world, stack)
        plan = fitting_plan(cfg, plan, world, device, folder)
        lease = _own_folder(cfg, world, folder, new_config, stack)
        train_source, eval_source = _open_sources(cfg, plan, world, device, stack)
        start = find_start(folder, world)
        index = _train_index(cfg)
        results = Results()
        if start is not None:
            check_same_run(folder, start, plan, index)
        remember_index(folder, index, world)
        on_rank0(world, lambda: _write_what_runs(cfg, plan, folder))
        clock = _make_clock(plan, world, device)
        engine = build_engine(cfg, plan, world, device, phases=clock.phases)
        stack.callback(engine.close)
        if start is not None:
            scalars = load_start(folder, start, engine)
            results = Results(**scalars["results"])
            seek_start(train_source, start)
        check_sharding(cfg, plan, world, train_source, eval_source)
        resumed_step = start.step if start is not None else 0
        board = _open_board(cfg, plan, world, folder, resumed_step, stack)
        _tell_start(cfg, plan, device, start, board)
        efficiency = open_efficiency(cfg, plan, world, device)
        ledger = stack.enter_context(BadFileLedger(cfg, plan, folder, resumed_step, train_source))
        saver = _make_saver(cfg, plan, world, folder, lease, index.sha256 if index else "", stack)
        ballot, watchdog = _open_guards(cfg, stop, stack)
        yield Session(
            cfg=cfg,
            plan=plan,
            world=world,
            folder=folder,
            device=device,
            engine=engine,
            train_source=train_source,
            eval_source=eval_source,
            means=RunningMeans(device),
            clock=clock,
            ranks=RankTable(world.rank, host_names(), own_phases(cfg.engine)),
            machine=_watch_machine(world, device, stack),
            board=board,
            pictures=Pictures(cfg, plan, board, world.rank),
            traces=_open_traces(cfg, folder, world, device, clock, resumed_step, stack),
            bad_files=ledger,
            saver=saver,
            watchdog=watchdog,
            heart=heart,
            ballot=ballot,
            results=results,
            efficiency=efficiency,
            saved_step=resumed_step,
        )


def _open_signs(world: World, stack: contextlib.ExitStack) -> tuple[StopRequest, Heartbeat]:
    """From here on this process hears requests to stop and gives signs of life."""
    stop = StopRequest()
    stop.listen()
    stack.callback(stop.close)
    heart = Heartbeat(world.beat_file)
    stack.callback(heart.close)
    heart.sign("start", 0)
    return stop, heart


def _open_guards(cfg: RunConfig, stop: StopRequest, stack: contextlib.ExitStack) -> tuple[StopVote, Watchdog]:
    """From here on the ranks agree on stopping, and a step that never comes is an event."""
    ballot = StopVote(stop)
    stack.callback(ballot.close)
    watchdog = Watchdog(cfg.train.hang_timeout_s, sys.stderr)
    stack.callback(watchdog.close)
    watchdog.beat()
    return ballot, watchdog


def join(cfg: RunConfig, world: World, stack: contextlib.ExitStack) -> torch.device:
    """Threads, device, process group."""
    device = pick_device(world, cfg.engine.device)
    canonical = cfg.runtime.canonical_shards > 0
    if canonical and device.type == "cpu":
        torch.set_num_threads(1)  # a convolution's sums over several threads depend on how many there are
    elif device.type == "cpu" and not world.threads:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_world_size))
    if cfg.engine.deterministic or (canonical and device.type == "cuda"):
        tell_libraries(CUBLAS_WORKSPACE_CONFIG=":4096:8")  # without it a matrix product on a GPU is refused
        torch.use_deterministic_algorithms(True)
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    open_group(world, device)
    stack.callback(close_group)
    return device


def _own_folder(
    cfg: RunConfig, world: World, folder: RunFolder, new_config: Sequence[str], stack: contextlib.ExitStack
) -> Lease | None:
    """Rank 0 takes the lease and compares the config with the run's; all ranks fail with it."""
    taken: list[Lease] = []

    def own() -> str:
        lease = take_lease(folder, world.job, world.attempt)
        stack.callback(lease.release)
        taken.append(lease)
        if folder.config.exists() and any(folder.checkpoints.glob("step_*")):
            refuse_unnamed_changes(folder.config, load_config(folder.config), cfg, new_config)
        return ""

    on_rank0(world, own)
    return taken[0] if taken else None


def _write_what_runs(cfg: RunConfig, plan: Plan, folder: RunFolder) -> str:
    """config.yaml and plan.json, once nothing can refuse them any more."""
    replace_file(folder.config, dump_config(cfg).encode())
    replace_file(folder.plan, (json.dumps(dataclasses.asdict(plan), indent=2) + "\n").encode())
    return ""


def _open_sources(
    cfg: RunConfig, plan: Plan, world: World, device: torch.device, stack: contextlib.ExitStack
) -> tuple[BatchSource, BatchSource]:
    at, last, data = str(device), cfg.engine.channels_last, cfg.data_on(device.type)
    train_source = make_train_source(data, plan, world, cfg.seed, at, last)
    stack.callback(train_source.close)
    eval_source = make_eval_source(data, plan, world, cfg.seed, at, last, cfg.train.eval_batch_per_rank)
    stack.callback(eval_source.close)
    return train_source, eval_source


def _train_index(cfg: RunConfig) -> IndexHeader | None:
    """What the checkpoints say of the data set; None where there are no files."""
    return None if cfg.data.source == "synthetic" else read_index_header(Path(cfg.data.root) / "train.index")


def _make_clock(plan: Plan, world: World, device: torch.device) -> StepClock:
    return StepClock(
        world_size=world.world_size,
        cold_steps=min(plan.steps_per_epoch, plan.total_steps // 4),
        phases=make_phase_timer(device.type, plan.log_every_steps),
    )


def _watch_machine(world: World, device: torch.device, stack: contextlib.ExitStack) -> MachineWatch:
    watch = MachineWatch(machine_looks(world.local_rank, device))
    stack.callback(watch.close)
    return watch


def build_engine(
    cfg: RunConfig,
    plan: Plan,
    world: World,
    device: torch.device,
    weights: Path | None = None,
    phases: Phases = UNTIMED,
) -> Engine:
    """An engine at step 0; weights: a safetensors file that the network (and its average) starts from."""
    seed_init(cfg.seed)
    model = create_model(cfg.model, plan.num_classes)
    if weights is not None:
        load_network_file(model, weights)
    return make_engine(
        model,
        EngineParts(cfg.engine, cfg.optim, plan, device, cfg.seed, world.rank, cfg.data.side_of_epoch(0), phases),
    )


def _open_board(
    cfg: RunConfig, plan: Plan, world: World, folder: RunFolder, resumed_step: int, stack: contextlib.ExitStack
) -> Board:
    board = make_boards(
        cfg.metrics.boards,
        folder,
        rank=world.rank,
        world_size=world.world_size,
        total_steps=plan.total_steps,
        resumed_step=resumed_step,
        console=cfg.metrics.console,
        settings=compared_settings(cfg, plan.world_size),
    )
    stack.callback(board.close)
    return board


def _open_traces(
    cfg: RunConfig,
    folder: RunFolder,
    world: World,
    device: torch.device,
    clock: StepClock,
    resumed_step: int,
    stack: contextlib.ExitStack,
) -> Traces:
    traces = Traces(cfg.profile, folder, world.rank, device, clock)
    traces.plan(resumed_step)
    stack.callback(traces.close)
    return traces


def _make_saver(
    cfg: RunConfig,
    plan: Plan,
    world: World,
    folder: RunFolder,
    lease: Lease | None,
    index_sha256: str,
    stack: contextlib.ExitStack,
) -> Saver:
    fence = int(on_rank0(world, lambda: str(lease.fence if lease is not None else 0)))
    facts = RunFacts(
        engine=cfg.engine.kind,
        global_batch=plan.global_batch,
        config_sha256=hashlib.sha256(dump_config(cfg).encode()).hexdigest(),
        index_sha256=index_sha256,
    )
    store = CheckpointStore(folder, facts, world.rank, world.world_size, fence, lease)
    if world.rank == 0:
        store.sweep()
    saver = Saver(store, cfg.checkpoint)
    stack.callback(saver.close)
    return saver


def _tell_start(cfg: RunConfig, plan: Plan, device: torch.device, start: StartPoint | None, board: Board) -> None:
    for title, markdown in run_in_words(cfg, plan, device, start.step if start is not None else 0).items():
        board.text(title, markdown)
    logger.info(
        "%s with gate %s on %d ranks (%s): %d steps of %d images%s",
        cfg.model.network,
        cfg.model.gate,
        plan.world_size,
        device.type,
        plan.total_steps,
        plan.global_batch,
        f", resuming after step {start.step}" if start else "",
    )
