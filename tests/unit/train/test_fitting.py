"""The micro-batch that fits: counted, least of all ranks, remembered for the same settings, the global batch kept."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ii_dist.config import ConfigError, DataFacts, Plan, RunConfig, RunFolder, UserError, make_plan
from ii_dist.engine.peak import PeakBytes
from ii_dist.runtime import World
from ii_dist.train import fitting
from ii_dist.train.fitting import candidates, fitting_plan, step_bytes, two_steps
from ii_dist.train.opening import open_session

FACTS = DataFacts(96, 8, 4)
CPU = torch.device("cpu")


def config(memory_gb: float = 8.0, batch: int = 48, **more: dict[str, Any]) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "data": {"source": "synthetic", "image_size": 16, "eval_image_size": 16, "eval_resize": 16},
        "model": {"network": "ini_resnet20"},
        "engine": {"device": "cpu", "memory_gb": memory_gb},
        "optim": {"warmup_epochs": 0},
        "train": {"global_batch": batch, "max_images_per_rank": "auto", "epochs": 1.0},
        "metrics": {"boards": ["jsonl"]},
    }
    for group, changes in more.items():
        tree[group] = tree.get(group, {}) | changes
    tree["data"] |= {"synthetic_images": FACTS.train_images, "synthetic_classes": FACTS.num_classes}
    return RunConfig.model_validate({"name": "x", **tree})


def plan_of(cfg: RunConfig, ranks: int = 1) -> Plan:
    return make_plan(cfg, ranks, FACTS)


def fit(cfg: RunConfig, folder: Path) -> Plan:
    return fitting_plan(cfg, plan_of(cfg), World(), CPU, RunFolder(folder))


def room_for(cfg: RunConfig, images: int) -> float:
    """GB in which a micro-batch of so many images just fits."""
    two, four = (step_bytes(cfg, plan_of(cfg), n) for n in (2, 4))
    tensors = fitting._CPU_MARGIN[False] * (two + (images - 2) * (four - two) / 2)
    return (tensors + fitting._resident_bytes() + fitting._CPU_LIBRARIES + 1e6) / 1e9


def test_candidates_are_the_cuts_of_a_share() -> None:
    assert candidates(config(), plan_of(config(), 2)) == [24, 12, 8, 6, 4, 3, 2, 1]
    mixed = config(data={"augment": {"mixup_alpha": 0.2}})
    assert candidates(mixed, plan_of(mixed, 2)) == [24, 12, 8, 6, 4, 2]


def test_less_memory_gives_smaller_micro_batches_of_the_same_global_batch(tmp_path: Path) -> None:
    large = {"data": {"image_size": 64}}
    found = []
    for images in (48, 13, 2):
        cfg = config(room_for(config(**large), images), **large)
        plan = fit(cfg, tmp_path)
        found.append((plan.max_images_per_rank, plan.micro_batch, plan.accumulate_steps))
        assert plan.micro_batch * plan.accumulate_steps == plan.global_batch == 48
        recipe = dataclasses.replace(plan, micro_batch=48, accumulate_steps=1, max_images_per_rank=0, fits="")
        assert recipe == plan_of(cfg)
    assert found == [(48, 48, 1), (12, 12, 4), (2, 2, 24)]


def test_what_was_found_is_remembered_for_the_same_settings(tmp_path: Path) -> None:
    folder, cfg = RunFolder(tmp_path), config()
    plan = fit(cfg, tmp_path)
    assert (plan.max_images_per_rank, plan.micro_batch) == (48, 48)
    folder.plan.write_text(json.dumps(dataclasses.asdict(plan) | {"max_images_per_rank": 6}))
    assert fit(cfg, tmp_path).micro_batch == 6
    for other in (config(9.0), config(model={"gate": "se"}), config(engine={"precision": "bf16"})):
        assert fit(other, tmp_path).micro_batch == 48
    for torn in ("", "{", "[]", "{}"):
        folder.plan.write_text(torn)
        assert fit(cfg, tmp_path).micro_batch == 48


def test_no_room_and_no_limit_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auto: not even the smallest micro-batch fits; use more ranks"):
        fit(config(0.001), tmp_path)
    with pytest.raises(UserError, match=r"auto: on a CPU needs engine\.memory_gb"):
        fit(config(0.0), tmp_path)


def test_a_run_writes_its_plan_and_goes_on_with_it(tmp_path: Path) -> None:
    cfg = config(checkpoint={"every_epochs": 0.0}).model_copy(update={"runs_folder": str(tmp_path)})
    path = RunFolder(tmp_path / "x").plan
    with open_session(cfg, plan_of(cfg), World()) as run:
        assert (run.plan.max_images_per_rank, run.plan.accumulate_steps) == (48, 1)
    told = json.loads(path.read_text())
    assert told["max_images_per_rank"] == 48
    path.write_text(json.dumps(told | {"max_images_per_rank": 12}))
    with open_session(cfg, plan_of(cfg), World()) as run:
        assert (run.plan.micro_batch, run.plan.accumulate_steps, run.train_source.outlook().request.schedule.batch) == (
            *(12, 4),
            12,
        )
    assert json.loads(path.read_text())["accumulate_steps"] == 4


def test_the_trial_makes_whole_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is asked: the largest that does not run out of memory, and nothing stays behind."""
    two_steps(config(), plan_of(config()), CPU, 3)
    tried = []

    def out_of_memory_above_10(_cfg: RunConfig, _plan: Plan, _device: torch.device, images: int) -> None:
        tried.append(images)
        if images > 10:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(fitting, "two_steps", out_of_memory_above_10)
    cfg, plan = config(), plan_of(config())
    found = next(n for n in candidates(cfg, plan) if fitting._fits(cfg, plan, CPU, n))
    assert (found, tried) == (8, [48, 24, 16, 12, 8])


def test_peak_bytes_of_a_chain() -> None:
    """Two layers of 100 x 100."""
    layers = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)).to("meta")
    x_NC = torch.zeros(100, 100, device="meta")
    with PeakBytes([*layers.parameters(), x_NC]) as counted, torch.no_grad():
        y_NC = layers(x_NC)
    assert (counted.peak, counted.now) == (2 * 40_000, 40_000)
    del y_NC
    assert counted.now == 0
    with PeakBytes([*layers.parameters(), x_NC]) as counted:
        layers(x_NC).sum().backward()
    assert 3 * 40_000 <= counted.peak < 3 * 40_000 + 100  # first output, gradients of it and of the second weights


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_count_is_near_what_a_process_needs(checkpointed: bool) -> None:
    """By the kernel's own mark, in a process of its own whose heap has no holes: what is let go is gone."""
    program = f"""
import re, torch
from tests.unit.train.test_fitting import *
torch.set_num_threads(1)
cfg = config(model={{"network": "ini_preresnet20"}}, data={{"image_size": 48}},
             engine={{"checkpoint_activations": {checkpointed}}})
told = step_bytes(cfg, plan_of(cfg), 48)
two_steps(cfg, plan_of(cfg), CPU, 2)  # what a first step loads has an allowance of its own
before = fitting._resident_bytes()
two_steps(cfg, plan_of(cfg), CPU, 48)
most = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(told, most - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd(), env=environment)
    assert done.returncode == 0, done.stderr
    told, needed = map(int, done.stdout.split())
    assert 0.7 * needed <= told <= 1.3 * needed
