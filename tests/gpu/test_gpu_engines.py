"""DeepSpeed's stages on a GPU against DDP there. In a process of its own: DeepSpeed chooses its device once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
import torch
from ii_dist.engine import EngineState, make_engine
from ii_dist.models import create_model
from ii_dist.config import ModelConfig
from tests.gpu.test_gpu import CLASSES, batch, parts

torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
precision, *rows = sys.argv[1:]

def network():
    torch.manual_seed(0)
    return create_model(ModelConfig(network="ini_resnet20", zero_init_last=False), CLASSES)

def curve(engine, steps):
    return [engine.train_step([batch(s, "cuda:0")])["loss"].item() / 32 for s in steps]

keys = {"precision": precision, "ema_half_life_epochs": 0.5}
ddp = make_engine(network(), parts("cuda:0", **keys))
expected = curve(ddp, range(4))
state = EngineState(ddp.state().whole(), ddp.state().scalars)
expected += curve(ddp, range(4, 6))
tolerance = 1e-4 if precision == "fp32" else 5e-2
for row in rows:
    stage, offload = int(row[0]), row.endswith("o")
    more = {"kind": "deepspeed", "zero_stage": stage, "offload_optimizer": offload}
    engine = make_engine(network(), parts("cuda:0", **keys, **more))
    found = curve(engine, range(4))
    engine.load_state(state)
    whole = engine.state().whole()
    assert all(torch.equal(whole[n].cpu(), t.cpu()) for n, t in state.tensors.items()), row
    found += curve(engine, range(4, 6))
    assert max(abs(a - b) for a, b in zip(found, expected)) < tolerance, (row, found, expected)
    engine.close()
print("alike")
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_trains_like_ddp(precision: str, tmp_path: Path) -> None:
    rows = ["0", "1", "2", "3", "1o", "2o", "3o"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, precision, *rows], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "alike"
