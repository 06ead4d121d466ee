"""What every rank of test_import_deepspeed runs: FOLDER; DeepSpeed itself saves there, stage by stage.

<stage>/          DeepSpeed's folder          <stage>.safetensors   the float32 weights that it should hold
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ii_dist.engine.deepspeed_engine import import_deepspeed
from ii_dist.runtime import World
from ii_dist.runtime.group import close_group, open_group
from tests.ranks.engine_program import build, my_images, train_one


def our_engines(folder: Path, world: World) -> None:
    """Each stage as `ii-dist train` runs it: float32, two weight-decay groups, sizes that two does not divide."""
    for stage in range(4):
        engine = build({"kind": "deepspeed", "zero_stage": stage, "ema_half_life_epochs": 0}, world)
        for step in range(2):
            train_one(engine, my_images(step, world, 2))
        weights = engine.state().whole()
        engine._run.engine.save_checkpoint(str(folder / f"fp32_{stage}"), tag="step2")  # type: ignore[attr-defined]
        if world.rank == 0:
            model = {n.removeprefix("model."): t.contiguous() for n, t in weights.items() if n.startswith("model.")}
            save_file(model, folder / f"fp32_{stage}.safetensors")
        engine.close()


def bfloat16_engines(folder: Path, world: World) -> None:
    """DeepSpeed's own bf16: the step's weights are rounded, the true ones lie in the partitions. One is frozen."""
    deepspeed = import_deepspeed(torch.device("cpu"))
    from deepspeed.utils import safe_get_full_fp32_param

    for stage in (1, 2, 3):
        torch.manual_seed(stage)
        network = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
        network[0].bias.requires_grad_(False)
        frozen = network[0].bias.detach().clone().bfloat16().float()
        config = {
            "train_batch_size": 4 * world.world_size,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        }
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.01, momentum=0.9)
        args = argparse.Namespace(device_rank=0)
        engine, *_ = deepspeed.initialize(
            args=args, model=network, optimizer=optimizer, config=config, dist_init_required=False
        )
        for _ in range(2):
            engine.backward(engine(torch.randn(4, 7).bfloat16()).float().square().mean())
            engine.step()
        engine.save_checkpoint(str(folder / f"bf16_{stage}"), tag="step2")
        trained = {n: safe_get_full_fp32_param(p) for n, p in network.named_parameters() if p.requires_grad}
        if world.rank == 0:
            rounded = [n for n, t in trained.items() if torch.equal(t, t.bfloat16().float())]
            assert not rounded, "the case shows nothing"
            save_file(
                {n: t.clone() for n, t in trained.items()} | {"0.bias": frozen}, folder / f"bf16_{stage}.safetensors"
            )
        engine.destroy()


def main() -> None:
    folder, world = Path(sys.argv[1]), World.from_environ(os.environ)
    open_group(world, torch.device("cpu"), timeout_s=120)
    our_engines(folder, world)
    bfloat16_engines(folder, world)
    close_group()


if __name__ == "__main__":
    main()
