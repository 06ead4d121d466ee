"""The estimate: its model against arithmetic by hand, its bounds, its words; and measuring the machine for it."""

import dataclasses
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import ConfigError, DataFacts, RunConfig, make_plan
from ii_dist.config.schema import ModelConfig
from ii_dist.metrics.peaks import DEVICES, Device, MachineFile, write_machine
from ii_dist.models import create_model
from ii_dist.models.work import Rate, TrainingWork, training_work
from tools import _estimate as _estimating
from tools import measure_machine
from tools._estimate import HOST_S, Cluster, Estimate, estimate, ring_s
from tools._machine_parts import allreduce_rates
from tools._machine_rates import measure_device
from tools.estimate_run import main

CFG = RunConfig.model_validate(
    {
        "name": "small",
        "data": {"source": "synthetic", "synthetic_images": 6400, "image_size": 64},
        "model": {"network": "ini_resnet18", "gate": "none"},
        "optim": {"warmup_epochs": 0},
        "train": {"global_batch": 64, "epochs": 2},
    }
)
GPU = Device("a GPU", {"fp32": 10.0}, 1000.0, link_gb_per_s=100.0)
CLUSTER = Cluster(
    device=GPU,
    ranks=4,
    nodes=2,
    link_gb_per_s=10.0,
    link_latency_s=1e-3,
    share=0.5,
    cores_per_rank=8,
    loader_images_per_core_s=100.0,
    storage_gb_per_s=0.0,
    image_bytes=1e5,
)
GRADIENTS = 4 * 11_689_512


@cache
def _counted(model: ModelConfig, classes: int, side: int) -> TrainingWork:
    return training_work(partial(create_model, model, classes), side)


@pytest.fixture(autouse=True)
def _count_each_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_estimating, "training_work", lambda build, side: _counted(*build.args, side))


def _estimate(cluster: Cluster, cfg: RunConfig = CFG) -> Estimate:
    return estimate(cfg, make_plan(cfg, cluster.ranks, DataFacts(6400, 640, 1000)), cluster)


def test_a_ring_moves_twice_the_gradients_but_for_one_part() -> None:
    two = dataclasses.replace(CLUSTER, ranks=2)
    assert ring_s(100e6, two) == pytest.approx(100e6 / 10e9 + 4 * 1e-3), "4 buckets of 25 MiB"
    assert ring_s(100e6, CLUSTER) == pytest.approx(1.5 * 100e6 / 10e9 + 4 * 1e-3)
    assert ring_s(100e6, dataclasses.replace(CLUSTER, ranks=1)) == 0


def test_one_rank_is_the_roofline_over_its_share() -> None:
    alone = dataclasses.replace(CLUSTER, ranks=1, nodes=1, loader_images_per_core_s=0.0)
    found = _estimate(alone)
    work = _counted(CFG.model, 1000, 64)
    least_s = sum(work.pass_seconds(64, Rate(10e12, 1e12, 4))) + 6 * 4 * work.parameters / 1e12
    assert found.step.compute_s == pytest.approx(least_s / 0.5)
    assert found.step.step_s == pytest.approx(least_s / 0.5 + HOST_S)
    assert found.images_per_s == found.images_per_s_rank == pytest.approx(64 / found.step.step_s)
    assert found.roofline_images_per_s == pytest.approx(64 / least_s)
    assert found.steps == 200
    # 200 steps and one evaluation of 640 images an epoch, at three times the speed of training
    assert 3600 * found.hours == pytest.approx(200 * found.step.step_s + 2 * 640 / 3 / found.images_per_s)
    assert found.epochs_per_hour == pytest.approx(2 / found.hours)
    assert found.mfu_share == pytest.approx(work.flops_per_image * found.images_per_s / 10e12)


def test_the_exchange_hides_behind_the_backward_pass_but_for_one_bucket() -> None:
    fed = dataclasses.replace(CLUSTER, loader_images_per_core_s=0.0, link_latency_s=0.0)
    slow = _estimate(dataclasses.replace(fed, share=1e-3)).step  # a long backward pass hides what it can
    assert slow.exposed_s == pytest.approx(1.5 * (25 << 20) / 10e9)
    assert slow.bound in ("memory", "arithmetic")
    fast = _estimate(dataclasses.replace(fed, link_gb_per_s=0.1)).step
    assert fast.exchange_s == pytest.approx(1.5 * GRADIENTS / 0.1e9)
    assert fast.exposed_s == pytest.approx(fast.exchange_s, rel=0.02)
    assert fast.bound == "exchange"
    halved = CFG.model_copy(update={"engine": CFG.engine.model_copy(update={"compress_gradients": "bf16"})})
    assert _estimate(fed, halved).step.exchange_s == pytest.approx(_estimate(fed).step.exchange_s / 2)


def test_input_costs_nothing_until_it_is_the_slowest() -> None:
    slow = _estimate(dataclasses.replace(CLUSTER, loader_images_per_core_s=1.0))
    assert slow.step.loader_s == slow.step.step_s == pytest.approx(16 / 8)
    assert slow.step.bound == "loader"
    assert slow.images_per_s == pytest.approx(4 * 8 * 1.0)
    fed = _estimate(dataclasses.replace(CLUSTER, loader_images_per_core_s=1e6))
    assert fed.step.step_s == _estimate(dataclasses.replace(CLUSTER, loader_images_per_core_s=0)).step.step_s
    stored = _estimate(dataclasses.replace(CLUSTER, storage_gb_per_s=1e-3))
    assert stored.step.bound == "storage"
    assert stored.images_per_s == pytest.approx(2 * 1e6 / 1e5), "two nodes of 1 MB/s, 0.1 MB an image"


def test_on_a_cpu_nothing_overlaps() -> None:
    cpu = Device("a CPU", {"fp32": 0.1}, 10.0, kind="cpu", threads=1)
    full = dataclasses.replace(CLUSTER, device=cpu, cores_per_rank=1)
    spare = dataclasses.replace(full, cores_per_rank=2)
    found = _estimate(full).step
    assert found.exposed_s == found.exchange_s
    assert found.compute_s - _estimate(spare).step.compute_s == pytest.approx(16 / 100)


def test_sizes_that_change_are_weighted_by_their_steps() -> None:
    alone = dataclasses.replace(CLUSTER, ranks=1, nodes=1, loader_images_per_core_s=0.0)
    growing = {**CFG.data.model_dump(), "size_schedule": [[0, 32], [1, 64]]}
    both = _estimate(alone, RunConfig.model_validate(CFG.model_dump() | {"data": growing}))
    small = _estimate(alone, CFG.model_copy(update={"data": CFG.data.model_copy(update={"image_size": 32})}))
    assert 2 / both.images_per_s == pytest.approx(1 / small.images_per_s + 1 / _estimate(alone).images_per_s)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "r50.yaml"
    path.write_text(
        "name: r50\nmodel: {network: ini_resnet50, gate: none}\nengine: {precision: bf16}\n"
        f"data: {{root: {tmp_path}}}\ntrain: {{global_batch: 256}}\n"
    )
    return path


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("device", "published"), [("V100", 1200), ("A100", 2470), ("RTX 3090", 1218)])
def test_published_speeds_of_resnet50(
    config_file: Path, capsys: pytest.CaptureFixture[str], device: str, published: float
) -> None:
    """One GPU, mixed precision, channels last: NVIDIA's examples (V100, A100) and timm's table (3090)."""
    precision = "fp16" if device == "V100" else "bf16"
    found = _json(
        capsys, config_file, f"engine.precision={precision}", "--gpus", 1, "--device", device, "--loader", 1e6
    )
    assert found["images_per_s"] == pytest.approx(published, rel=0.25)
    assert any("ImageNet" in line for line in found["assumed"])
    assert any(line.startswith("--share 0.7") for line in found["assumed"])


def test_the_text_says_what_wins_and_what_was_assumed(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), "--gpus", "8", "--device", "H100", "--cores", "16"]) == 0
    text = capsys.readouterr().out
    assert "r50: ini_resnet50, gate none, 256 images a step on 8 x H100 (1 node)" in text
    assert "25.56 M parameters; an image: 24.5 GFLOP, 475.5 MB" in text
    assert "verdict    input bound" in text
    assert "cores a rank would do (there are 2)" in text
    assert "launch.expected_images_per_s_per_rank=730" in text, "two cores of 365 images/s"
    assert "--loader 365 images/s a core" in text
    assert "--cores" not in text.partition("assumed")[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpus", "8", "--device", "H1000"], "--device H1000: is not one of B200"),
        (["--gpus", "9", "--nodes", "2"], "--gpus 9 --nodes 2: needs the same number"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "8", "--share", "1.5"], "--share 1.5"),
        (["--gpus", "8", "--link", "0"], "--link 0: needs a number above 0"),
        (["engine.device=cpu", "--gpus", "2"], "give --machine FILE"),
        (["--gpus", "2", "--machine", "nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_what_cannot_be_estimated_is_refused(config_file: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        main([str(config_file), *arguments])
    assert says in str(error.value)


def test_a_measured_machine_is_taken_and_nothing_assumed_of_it(
    tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = [Device("a CPU", {"fp32": 0.1 * n}, 10.0 * n, kind="cpu", threads=n, roofline_share=0.6) for n in (1, 4)]
    machine = MachineFile(tuple(cpu), 4, 300.0, "dali", allreduce_gb_per_s=2.0, allreduce_latency_s=1e-3)
    write_machine(tmp_path / "m.json", machine)
    cpu_run = (config_file, "engine.device=cpu", "engine.precision=fp32", "--machine", tmp_path / "m.json")
    found = _json(capsys, *cpu_run, "--gpus", 4)
    cluster = found["cluster"]
    assert (cluster["device"]["threads"], cluster["device"]["gb_per_s"]) == (1, 10.0)
    assert (cluster["share"], cluster["link_gb_per_s"], cluster["link_latency_s"]) == (0.6, 2.0, 1e-3)
    assert (cluster["cores_per_rank"], cluster["loader_images_per_core_s"]) == (1, 300.0)
    assert len(found["assumed"]) == 1
    assert _json(capsys, *cpu_run, "--gpus", 1)["cluster"]["device"]["threads"] == 4


def test_measuring_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Really measured, briefly: plausible figures, in a file that comes back."""
    parts = ["--only", "disk", "loader", "--folder", str(tmp_path), "--json"]
    assert measure_machine.main(["--seconds", "0.05", "--out", str(tmp_path / "m.json"), *parts]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "m.json").read_text())
    assert 10 < printed["loader_images_per_core_s"] < 20_000
    assert printed["disk_mb_per_s"] > 1
    assert not list(tmp_path.glob(".measure*"))
    with pytest.raises(ConfigError, match="--folder"):
        measure_machine.main(["--only", "disk", "--folder", str(tmp_path / "none")])


def test_measuring_one_thread_of_this_cpu() -> None:
    import torch

    threads, said = torch.get_num_threads(), list[str]()
    try:
        found = measure_device("cpu", "a CPU", 1, 0.02, said.append)
    finally:
        torch.set_num_threads(threads)
    assert (found.kind, found.threads, len(said)) == ("cpu", 1, 4)
    # So short a look at a busy machine says little: the sizes must be right, to a few powers of ten.
    assert 1e-4 < found.tflops["fp32"] < 10
    assert 0.05 < found.gb_per_s < 500
    assert 1e-3 < found.roofline_share < 50
    lines = measure_machine.table(MachineFile((found,), 2, 300.0, "dali", 500.0, 1.0, 1e-3))
    assert lines[0] == "a CPU, 1 thread"
    assert lines[-1] == "two gloo processes   1 GB/s each, 1 ms at least"


@pytest.mark.ranks
def test_two_processes_exchange_gradients() -> None:
    rate, latency_s = allreduce_rates()
    assert 0.001 < rate < 100
    assert 0 < latency_s < 1


def test_the_table_of_gpus_can_be_asked_for_by_its_own_names() -> None:
    from ii_dist.metrics.peaks import device_named

    for row in DEVICES.values():
        found = device_named(row.name)
        assert found is not None, row.name
        assert found.name == row.name
