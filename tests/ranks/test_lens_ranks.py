"""A lens whose norm is a SyncBatchNorm: two real ranks with a share of the batch each, against one with all of it."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ii_dist.models.gates import make_gate
from ii_dist.models.lens import Lens
from tests.ranks.start import run_ranks

pytestmark = pytest.mark.ranks

# The whole batch, cut unevenly: the first rank has `FIRST` of the images.
BATCH, FIRST, WORLD = 6, 2, 2


def build(what: str) -> nn.Module:
    """The same on every rank, in double precision."""
    torch.manual_seed(0)
    module: Any = Lens(5, 3) if what == "lens" else make_gate("fold3x3", 32, 48, reduction=4, fold_width=8)
    lens = module if what == "lens" else module.lens
    with torch.no_grad():
        lens.norm.weight.normal_()
        lens.norm.bias.normal_()
    synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module.double())
    return synced


def inputs(what: str) -> tuple[list[Tensor], Tensor]:
    """Arguments for the whole batch, levels unlike from image to image, and the gradient of the output."""
    torch.manual_seed(1)
    level = torch.arange(1.0, BATCH + 1, dtype=torch.float64)[:, None, None, None]
    if what == "lens":
        image = torch.randn(BATCH, 1, 12, 8, dtype=torch.float64) * level + level
        return [image], torch.randn(BATCH, 10, 6, dtype=torch.float64)
    residual, identity = torch.randn(2, BATCH, 32, 3, 3, dtype=torch.float64).unbind()
    return [residual * level, identity.abs() + level], torch.randn(BATCH, 32, 1, 1, dtype=torch.float64)


def one_step(what: str, share: slice) -> dict[str, Tensor]:
    """Two training steps with these images of the batch; what they gave and left."""
    module = build(what)
    arguments, grad = inputs(what)
    arguments = [x[share].clone().requires_grad_() for x in arguments]
    for _ in range(2):
        out = module(*arguments)
        out.backward(grad[share])
    found = {"out": out.detach()}
    found |= {f"input {i}": x.grad for i, x in enumerate(arguments) if x.grad is not None}
    found |= {f"grad {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: x.contiguous() for name, x in (found | dict(module.named_buffers())).items()}


SCRIPT = """
import os, sys, torch.distributed as dist
from safetensors.torch import save_file
from tests.ranks.test_lens_ranks import FIRST, one_step

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
for what in ("lens", "gate"):
    save_file(one_step(what, slice(FIRST) if rank == 0 else slice(FIRST, None)), f"{sys.argv[1]}/{what}_{rank}")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "lens.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = str(Path(__file__).resolve().parents[2])
    assert run_ranks([str(script), str(folder)], WORLD, folder, PYTHONPATH=root) == [0] * WORLD
    return folder


@pytest.mark.parametrize("what", ["lens", "gate"])
def test_ranks_with_shares_are_one_process_with_the_whole_batch(what: str, folder: Path) -> None:
    ranks = [load_file(folder / f"{what}_{rank}") for rank in range(WORLD)]
    whole = one_step(what, slice(None))
    assert any("running_var" in name for name in whole)
    for name, expected in whole.items():
        parts = [rank[name] for rank in ranks]
        if name == "out" or name.startswith("input"):
            actual = torch.cat(parts)
        elif name.startswith("grad"):
            actual = parts[0] + parts[1]  # of the sum of both ranks' losses
        else:
            assert torch.equal(parts[0], parts[1]), name
            actual = parts[0]
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_shares_alone_would_give_something_else(folder: Path) -> None:
    """The batch is such that a rank's own statistics are not those of all."""
    alone = one_step("lens", slice(FIRST))
    together = load_file(folder / "lens_0")
    for name in ("out", "input 0", "norm.running_mean", "norm.running_var"):
        assert (alone[name] - together[name]).abs().max() > 1e-2, name
