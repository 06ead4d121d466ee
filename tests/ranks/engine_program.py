"""What every rank of test_engine_matrix runs: FOLDER [train]; what it saw goes to FOLDER/world_<n>.json.

train: every engine trains alike for STEPS steps and saves. Then, in any world, every engine takes over what each engine
saved, hands it out again, and trains on.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ii_dist.checkpoint import CheckpointStore, RunFacts, Saver, load_step, read_manifest
from ii_dist.config import DataFacts, EngineConfig, OptimConfig, RunConfig, RunFolder, TrainConfig, make_plan
from ii_dist.config.schema import CheckpointConfig, ModelConfig
from ii_dist.engine import Engine, EngineParts, EngineState, make_engine
from ii_dist.runtime import World
from ii_dist.runtime.group import any_rank, close_group, open_group
from ii_dist.runtime.scattered import Scattered
from ii_dist.runtime.seeds import seed_init

MAIN: dict[str, dict[str, object]] = {
    "ddp": {"kind": "ddp"},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
OFFLOADED: dict[str, dict[str, object]] = {
    f"zero{s}-offload": {"kind": "deepspeed", "zero_stage": s, "offload_optimizer": True} for s in (1, 2, 3)
}
STEPS, BATCH, CLASSES = 20, 24, 7


@dataclass(frozen=True)
class Images:
    images_NCHW: torch.Tensor
    labels_N: torch.Tensor
    weight_N: torch.Tensor
    partner_labels_N: torch.Tensor | None = None
    label_share_N: torch.Tensor | None = None


class Scale(nn.Module):
    """One number: fewer elements than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return x_NCHW * self.scale


def network(seed: int) -> nn.Module:
    """Sizes that no number of ranks divides."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), Scale(), nn.Flatten(), nn.Linear(180, CLASSES)
    )


def my_images(step: int, world: World, accumulate: int) -> list[Images]:
    g = torch.Generator().manual_seed(step)
    whole = (torch.randn(BATCH, 3, 8, 8, generator=g), torch.randint(CLASSES, (BATCH,), generator=g), torch.ones(BATCH))
    mine = (t.chunk(world.world_size)[world.rank].chunk(accumulate) for t in whole)
    return [Images(*parts) for parts in zip(*mine, strict=True)]


def build(row: dict[str, object], world: World, seed: int = 0, **optim: object) -> Engine:
    return make_engine(network(seed), parts_of(row, world, **optim))


def parts_of(row: dict[str, object], world: World, **optim: object) -> EngineParts:
    cfg = RunConfig(
        name="x",
        engine=EngineConfig.model_validate({"device": "cpu", "ema_half_life_epochs": 0.5, **row}),
        optim=OptimConfig.model_validate(
            {"lr": 0.1, "lr_reference_batch": 0, "warmup_epochs": 1, "weight_decay": 0.01, **optim}
        ),
        train=TrainConfig(global_batch=BATCH, max_images_per_rank=BATCH // world.world_size // 2, epochs=8),
    )
    plan = make_plan(cfg, world.world_size, DataFacts(4 * BATCH, 8, CLASSES))
    assert plan.accumulate_steps == 2
    return EngineParts(cfg.engine, cfg.optim, plan, torch.device("cpu"), seed=3, rank=world.rank, image_size=8)


def train_one(engine: Engine, batches: list[Images]) -> dict[str, float]:
    """Means over all ranks."""
    sums = engine.train_step(batches)
    loss = sums["loss"].clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
    return {"loss": float(loss) / BATCH, "norm": float(sums["grad_norm"]), "skipped": float(sums["skipped"])}


def evaluate(engine: Engine, world: World) -> float:
    engine.begin_eval()
    loss = torch.stack([engine.eval_step(b)["loss"] for b in my_images(99, world, 2)]).sum()
    if dist.is_initialized():
        dist.all_reduce(loss)
    return float(loss) / BATCH


def train_and_save(row: dict[str, object], world: World, folder: RunFolder) -> dict[str, Any]:
    engine = build(row, world)
    curve, evaluations = [], []
    for step in range(STEPS):
        curve.append(train_one(engine, my_images(step, world, 2)))
        if step % 8 == 7:
            evaluations.append(evaluate(engine, world))
    folder.root.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(folder, RunFacts(str(row["kind"]), BATCH), world.rank, world.world_size, 1)
    saver = Saver(store, CheckpointConfig(), timeout_s=60)
    state = engine.state()
    saver.save(STEPS, 0, 0, state.tensors, state.scalars)
    saved_at = state.whole()
    following = [train_one(engine, my_images(step, world, 2))["loss"] for step in range(STEPS, STEPS + 2)]
    before = engine.state().whole()
    # A number that is none, on the last rank only.
    bad = my_images(STEPS, world, 2)
    if world.rank == world.world_size - 1:
        bad[1].images_NCHW[0, 0, 0, 0] = math.nan
    left_out = train_one(engine, bad)["skipped"]
    after = engine.state().whole()
    (result,) = saver.close()
    assert result.ok, result.message
    tensors, _ = load_step(folder.step(STEPS), read_manifest(folder.step(STEPS)))
    torn = [n for n in saved_at if bits(tensors[n]) != bits(saved_at[n])]
    kept = [n for n in before if not n.startswith("ema.") and "num_batches" not in n]
    changed = [name for name in kept if not torch.equal(before[name], after[name])]
    back = train_one(engine, my_images(STEPS, world, 2))
    engine.close()
    return {
        "curve": curve,
        "evaluations": evaluations,
        "torn": torn,
        "following": following,
        "left_out": left_out,
        "changed": changed,
        "back": back,
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def move(name: str, row: dict[str, object], world: World, folder: Path) -> dict[str, Any]:
    """Into one engine: what each of the others saved. {source: tensors that are not equal bit for bit, next losses}"""
    engine = build(row, world, seed=99)
    seen: dict[str, Any] = {}
    for source in MAIN:
        path = RunFolder(folder / source).step(STEPS)
        tensors, scalars = load_step(path, read_manifest(path))
        engine.load_state(EngineState(tensors, scalars))
        state = engine.state()
        mine = state.whole()
        wrong = [n for n in tensors if n not in mine or bits(mine[n]) != bits(tensors[n])]
        wrong += [n for n in mine if n not in tensors]
        steps = 2 if source in ("ddp", name) else 1
        losses = [train_one(engine, my_images(step, world, 2))["loss"] for step in range(STEPS, STEPS + steps)]
        seen[source] = {"wrong": wrong, "scalars": state.scalars == scalars, "losses": losses}
    engine.close()
    return seen


def compare_optimizers(world: World) -> dict[str, Any]:
    """With each of the others: losses of every engine, and what of DDP's state it does not take over bit for bit."""
    from ii_dist.models.compat import ensure_torchvision

    ensure_torchvision()  # timm's optimizers cannot be imported without
    seen: dict[str, Any] = {}
    for name in ("adamw", "lars", "lamb"):
        optim: dict[str, object] = {"optimizer": name, "lr": 0.01, "trust_coefficient": 1.0, "clip_norm": 1.0}
        curves: dict[str, list[float]] = {}
        for row_name, row in MAIN.items():
            engine = build(row, world, **optim)
            curves[row_name] = [train_one(engine, my_images(step, world, 2))["loss"] for step in range(8)]
            if row_name == "ddp":
                of_ddp = EngineState(engine.state().whole(), engine.state().scalars)
            engine.load_state(of_ddp)
            mine = engine.state().whole()
            wrong = [n for n, tensor in of_ddp.tensors.items() if bits(mine[n]) != bits(tensor)]
            curves[row_name].append(train_one(engine, my_images(8, world, 2))["loss"])
            engine.close()
            seen[f"{name} {row_name}"] = {
                "losses": curves[row_name],
                "wrong": wrong,
                "same": mine.keys() == of_ddp.tensors.keys(),
            }
    return seen


def train_inner_imaging(world: World) -> dict[str, list[float]]:
    """Losses of a network whose lenses read weights of other modules than the one at work, as ZeRO 3 must notice."""
    from ii_dist.models import create_model  # here, for it takes as long to import as all the rest

    found = {}
    for name in ("ddp", "zero3"):
        seed_init(0)
        model = create_model(ModelConfig(network="ini_resnet20", gate="fold3x3", zero_init_last=False), CLASSES)
        engine = make_engine(model, parts_of(MAIN[name], world))
        found[name] = [train_one(engine, my_images(step, world, 2))["loss"] for step in range(2)]
        found[name].append(evaluate(engine, world))
        engine.close()
    return found


def collects(world: World) -> bool:
    """Whether numbers that sums would change (-0.0, NaNs with a message) come through, also from empty stretches."""
    odd = torch.tensor([[-(2**31), 0x7FC00001], [1, -1], [2**31 - 1, 0], [-0x800000, -(2**31)]], dtype=torch.int32)
    right = True
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64):
        flat = odd.view(dtype).reshape(-1)
        size = -(-flat.numel() // 3)  # of four ranks the last has none, of two the last has more
        first = min(flat.numel(), size * world.rank)
        last = flat.numel() if world.rank == world.world_size - 1 else min(flat.numel(), first + size)
        scattered = Scattered(odd.view(dtype).shape, flat[first:last], first)
        everywhere, there = scattered.collect(), scattered.collect(world.world_size - 1)
        assert everywhere is not None
        right &= torch.equal(everywhere.view(torch.uint8), odd.view(torch.uint8))
        right &= (there is not None) == (world.rank == world.world_size - 1)
        right &= there is None or torch.equal(there.view(torch.uint8), odd.view(torch.uint8))
    return not any_rank(not right)


def main() -> None:
    folder, world = Path(sys.argv[1]), World.from_environ(os.environ)
    open_group(world, torch.device("cpu"), timeout_s=120)
    seen: dict[str, Any] = {"collects": collects(world)}
    if sys.argv[2:] == ["train"]:
        seen["trained"] = {
            n: train_and_save(row, world, RunFolder(folder / n)) for n, row in (MAIN | OFFLOADED).items()
        }
        seen["inner_imaging"] = train_inner_imaging(world)
        seen["optimizers"] = compare_optimizers(world)
    targets = MAIN | OFFLOADED if world.world_size == 2 else MAIN
    seen["moved"] = {name: move(name, row, world, folder) for name, row in targets.items()}
    close_group()
    if world.rank == 0:
        (folder / f"world_{world.world_size}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
