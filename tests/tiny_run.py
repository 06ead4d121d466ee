"""A run folder made by the real command: a small network trained for a few steps on synthetic images."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIDE, CLASSES, STEPS = 16, 4, 4
CONFIG = """
name: run
data: {source: synthetic, synthetic_images: 24, synthetic_classes: 4, image_size: 16, eval_image_size: 16,
       eval_resize: 16, prefetch_batches: 1, mean: [0.4, 0.5, 0.6], std: [0.2, 0.25, 0.3]}
model: {network: ini_resnet20, gate: fold3x3, zero_init_last: false}
optim: {lr: 0.1, lr_reference_batch: 0, warmup_epochs: 0}
engine: {device: cpu, ema_half_life_epochs: 1}
train: {epochs: 2, global_batch: 12, eval_every_epochs: 2, eval_batch_per_rank: 12}
checkpoint: {every_steps: 2, every_epochs: 0, keep_last: 9}
metrics: {boards: [jsonl]}
"""


def train_tiny_run(folder: Path, *overrides: str) -> Path:
    """`folder`/run with steps 2 and 4."""
    config = folder / "run.yaml"
    config.write_text(CONFIG + f"runs_folder: {folder}\n")
    command = [sys.executable, "-m", "ii_dist", "train", str(config), *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"
