"""What looking at a run needs a GPU for: kernels in a trace, pictures of half-precision images on the device."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from ii_dist.config import DataConfig, ProfileConfig, RunFolder
from ii_dist.metrics import StepClock
from ii_dist.metrics.phases import make_phase_timer
from ii_dist.train.pictures import pixels
from ii_dist.train.traces import Traces

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_trace_holds_the_kernels_of_its_steps(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    clock, folder = StepClock(phases=make_phase_timer("cuda", 10)), RunFolder(tmp_path)
    traces = Traces(ProfileConfig(steps="3:4"), folder, 0, device, clock)
    traces.plan(0)
    x_NN = torch.rand(512, 512, device=device)
    for step in range(6):
        traces.begin_step(step)
        with clock.data_wait():
            pass
        clock.phases.begin("forward")
        x_NN = (x_NN @ x_NN).softmax(1)
        clock.tick(1)
    with gzip.open(folder.trace(3, 4, 0), "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels = [event["name"] for event in events if event.get("cat") == "kernel"]
    assert len([name for name in kernels if "softmax" in name.lower()]) == 2
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {"step 3", "step 4"} <= set(names)
    assert names.count("forward") == 2


def test_images_on_the_device_are_shown_as_they_were() -> None:
    cfg = DataConfig()
    before = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normal = (before / 255 - torch.tensor(cfg.mean)[:, None, None]) / torch.tensor(cfg.std)[:, None, None]
    on_gpu = normal.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    shown = torch.from_numpy(pixels(on_gpu, cfg)).permute(0, 3, 1, 2)
    assert (shown.int() - before.int()).abs().max() <= 3
