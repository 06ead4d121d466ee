"""What only a GPU can show: steps without a host sync, DALI on the device, saves from device memory.

Run with `make gpu-check` on a machine with CUDA; skipped elsewhere.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ii_dist.checkpoint import CheckpointStore, RunFacts, Saver, find_newest, load_step
from ii_dist.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    DataFacts,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RunFolder,
    TrainConfig,
    make_plan,
)
from ii_dist.data import Batch, build_index, make_eval_source, make_train_source, write_index
from ii_dist.data.mix import draw_mixing
from ii_dist.data.mix_images import mix_batch
from ii_dist.data.positions import TrainSchedule
from ii_dist.data.retouch import Retouch
from ii_dist.data.source import Request
from ii_dist.engine import EngineParts, make_engine
from ii_dist.engine.losses import Labels, loss_sum
from ii_dist.metrics.clock import StepClock
from ii_dist.metrics.machine import gpu_look
from ii_dist.metrics.means import RunningMeans
from ii_dist.metrics.phases import make_phase_timer
from ii_dist.models import create_model
from ii_dist.runtime import World
from tests.images import make_image_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLASSES = 10


def parts(device: str, **engine: object) -> EngineParts:
    cfg = RunConfig(
        name="gpu",
        engine=EngineConfig.model_validate({"device": "cuda", **engine}),
        optim=OptimConfig(lr=0.05, lr_reference_batch=0, warmup_epochs=0),
        train=TrainConfig(global_batch=32, epochs=2),
    )
    plan = make_plan(cfg, 1, DataFacts(320, 32, CLASSES))
    return EngineParts(cfg.engine, cfg.optim, plan, torch.device(device), image_size=32)


def batch(seed: int, device: str) -> Batch:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(32, 3, 32, 32, generator=g).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (32,), generator=g)
    return Batch(images.to(device), labels.to(device), torch.ones(32, device=device), labels)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_asks_the_device_nothing(precision: str) -> None:
    engine = make_engine(
        create_model(ModelConfig(network="ini_resnet20"), CLASSES), parts("cuda:0", precision=precision)
    )
    means, one = RunningMeans("cuda:0"), batch(0, "cuda:0")
    for _ in range(3):
        means.add(engine.train_step([one]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            means.add(engine.train_step([one]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    read = means.read()
    assert read["steps"] == 6
    assert read["loss"] > 0


def test_measuring_phases_asks_the_device_nothing() -> None:
    """Every step measured, one line of numbers in between; the events are read only after the line's own wait."""
    timer = make_phase_timer("cuda", 1)
    clock = StepClock(phases=timer)
    made_from = replace(parts("cuda:0", precision="bf16"), phases=timer)
    engine = make_engine(create_model(ModelConfig(network="ini_resnet20"), CLASSES), made_from)
    means, one = RunningMeans("cuda:0"), batch(0, "cpu")
    pinned = Batch(*(each.pin_memory() for each in (one.images_NCHW, one.labels_N, one.weight_N, one.index_N)))

    def steps(count: int) -> None:
        for _ in range(count):
            with clock.data_wait():
                batches = [pinned]
            means.add(engine.train_step(batches))
            clock.tick(32)

    steps(3)
    means.read()
    clock.read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(4)
        early = clock.read()  # the device may be behind: what it has not passed stays for the next read
        steps(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert means.read()["steps"] == 8
    late = clock.read()
    assert early.phases.steps + late.phases.steps == 8
    assert late.phases.steps >= 4
    seconds = late.phases.means_s()
    assert all(seconds[phase] > 0 for phase in ("copy", "forward", "backward", "optimizer"))
    assert sum(seconds.values()) == pytest.approx((early.stretch.seconds + late.stretch.seconds) / 8, rel=0.5)


def test_the_driver_tells_of_this_gpu() -> None:
    pytest.importorskip("pynvml")
    look = gpu_look(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    assert look is not None
    told = look()
    assert 0 <= told["gpu/utilization_share"] <= 1
    assert 0 < told["gpu/temperature_c"] < 120


def test_a_step_equals_the_cpu() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = create_model(ModelConfig(network="ini_resnet20"), CLASSES)
    gpu = make_engine(copy.deepcopy(model), parts("cuda:0"))
    cpu = make_engine(model, parts("cpu"))
    for step in range(5):
        on_gpu, on_cpu = gpu.train_step([batch(step, "cuda:0")]), cpu.train_step([batch(step, "cpu")])
        assert on_gpu["loss"].item() == pytest.approx(on_cpu["loss"].item(), rel=1e-3)


def test_a_non_finite_step_is_left_out_on_the_device() -> None:
    engine = make_engine(create_model(ModelConfig(network="ini_resnet20"), CLASSES), parts("cuda:0"))
    engine.train_step([batch(0, "cuda:0")])
    before = {n: t.clone() for n, t in engine.state().tensors.items() if "num_batches" not in n}
    bad = batch(1, "cuda:0")
    bad.images_NCHW[0, 0, 0, 0] = float("nan")
    assert engine.train_step([bad])["skipped"].item() == 1
    assert all(torch.equal(t, before[n]) for n, t in engine.state().tensors.items() if n in before)


def test_dali_decodes_on_the_gpu_what_it_decodes_on_the_cpu(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_image_folder(tmp_path / split, classes=3, per_class=16, size=(96, 80))
        rows, classes = build_index(tmp_path / split)
        write_index(tmp_path / f"{split}.index", rows, classes, root=split)
    data = DataConfig(root=str(tmp_path), image_size=64, eval_resize=72, eval_image_size=64)
    plan = make_plan(RunConfig(name="x", train=TrainConfig(global_batch=16)), 1, DataFacts(48, 48, 3))
    world = World(gpus=1)
    for make, more in ((make_train_source, ()), (make_eval_source, (16,))):
        sources = [make(data, plan, world, 0, device, True, *more) for device in ("cpu", "cuda:0")]
        on_cpu, on_gpu = (next(iter(source)) for source in sources)
        assert on_gpu.images_NCHW.is_cuda
        assert torch.equal(on_cpu.labels_N, on_gpu.labels_N.cpu())
        # nvJPEG and libjpeg-turbo round differently: within a few of 255 steps.
        assert (on_cpu.images_NCHW - on_gpu.images_NCHW.cpu()).abs().mean() < 0.05
        for source in sources:
            source.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dali_mixes_and_resizes_on_the_gpu_as_on_the_cpu(tmp_path: Path, dtype: str) -> None:
    for split in ("train", "val"):
        make_image_folder(tmp_path / split, classes=3, per_class=16, size=(96, 80))
        rows, classes = build_index(tmp_path / split)
        write_index(tmp_path / f"{split}.index", rows, classes, root=split)
    fields = {
        "root": str(tmp_path),
        "size_schedule": [[0, 32], [2, 64]],
        "size_multiple": 16,
        "image_dtype": dtype,
        "augment": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    }
    data = DataConfig.model_validate(fields)
    run = RunConfig(name="x", data=data.model_copy(update={"image_dtype": "auto"}), train=TrainConfig(global_batch=16))
    plan, world = make_plan(run, 1, DataFacts(48, 48, 3)), World(gpus=1)
    sources = [make_train_source(data, plan, world, 0, device, True) for device in ("cpu", "cuda:0")]
    for number, (on_cpu, on_gpu) in enumerate(zip(*sources, strict=False)):
        assert on_gpu.images_NCHW.shape == (16, 3, *[(32, 48, 64)[number // 3]] * 2)
        assert on_gpu.images_NCHW.dtype == on_cpu.images_NCHW.dtype == getattr(torch, dtype)
        assert on_gpu.images_NCHW.is_contiguous(memory_format=torch.channels_last)
        for name in ("labels_N", "partner_labels_N", "label_share_N"):
            assert torch.equal(getattr(on_cpu, name), getattr(on_gpu, name).cpu())
        gap = (on_cpu.images_NCHW.float() - on_gpu.images_NCHW.cpu().float()).abs()
        assert (
            gap.mean() < 0.05
        )  # the decoders and the resizes round differently; a wrong partner would be ten times that
        if number == 8:
            break
    for source in sources:
        source.close()


def test_mixing_gives_the_same_bits_on_the_gpu_and_asks_it_nothing() -> None:
    mixing = draw_mixing(0, 0, np.arange(32), 48, AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0))
    images_NCHW = torch.randn(32, 3, 48, 48).contiguous(memory_format=torch.channels_last)
    arguments = images_NCHW, torch.from_numpy(mixing.own_N), torch.from_numpy(mixing.box_N4)
    on_gpu = [each.cuda() for each in arguments]
    mix_batch(*on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = mix_batch(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), mix_batch(*arguments))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_the_loss_of_mixed_labels_asks_the_device_nothing(loss: str) -> None:
    optim = OptimConfig.model_validate({"loss": loss})
    logits_NC, own_N = torch.randn(32, CLASSES), torch.randint(CLASSES, (32,))
    labels = Labels(own_N, own_N.flip(0), torch.rand(32))
    on_gpu = Labels(*(each.cuda() for each in (labels.own_N, labels.partner_N, labels.share_N)))  # type: ignore[union-attr]
    logits_on_gpu_NC = logits_NC.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = loss_sum(logits_on_gpu_NC, on_gpu, optim)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.item() == pytest.approx(loss_sum(logits_NC, labels, optim).item(), rel=1e-5)


def test_a_save_from_device_memory_holds_the_values_of_its_step(tmp_path: Path) -> None:
    engine = make_engine(create_model(ModelConfig(network="ini_resnet20"), CLASSES), parts("cuda:0"))
    engine.train_step([batch(0, "cuda:0")])
    folder = RunFolder(tmp_path)
    store = CheckpointStore(folder, RunFacts("ddp", 32), rank=0, world_size=1, fence=0)
    saver = Saver(store, CheckpointConfig())
    state = engine.state()
    expected = {n: t.cpu().clone() for n, t in state.tensors.items()}
    saver.save(1, 0, 32, state.tensors, {"engine": state.scalars})
    for step in range(1, 5):  # training goes on while the copy is on its way
        engine.train_step([batch(step, "cuda:0")])
    assert [r.ok for r in saver.close()] == [True]
    found, _ = find_newest(folder.checkpoints)
    assert found is not None
    tensors, _ = load_step(found.path, found.manifest)
    assert all(torch.equal(tensors[n], t) for n, t in expected.items())


def test_operations_of_a_batch_are_those_of_the_cpu_and_ask_the_device_nothing() -> None:
    augment = AugmentConfig(
        colour_jitter=(0.4, 0.4, 0.4, 0.1),
        policy="randaugment",
        policy_ops=3,
        policy_probability=1.0,
        erase_probability=0.5,
        erase_fill="noise",
    )
    data = DataConfig(augment=augment)
    plan = make_plan(RunConfig(name="x", train=TrainConfig(global_batch=64)), 1, DataFacts(640, 64, 3))
    request = Request(data, TrainSchedule(plan, 0, 0), True, 0, "cuda:0", True, 1)
    rows = request.schedule.rows(0)
    images_NCHW = torch.randint(256, (64, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu, sent = Retouch(request, "cpu"), Retouch(request, "cuda:0"), images_NCHW.cuda()
    on_gpu.finished(sent, rows)  # the noise is sent once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = on_gpu.finished(sent, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_contiguous(memory_format=torch.channels_last)
    gap = (found.cpu() - on_cpu.finished(images_NCHW, rows)).abs()
    assert gap.median() < 1e-5
    assert gap.mean() < 0.05  # a level aside, magnified by the operations that follow
    assert torch.equal(on_gpu.finished(sent[:7], replace(rows, index_N=rows.index_N[:7])), found[:7])


def test_dali_on_the_gpu_leaves_operations_to_torch(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_image_folder(tmp_path / split, classes=3, per_class=16, size=(96, 80))
        rows, classes = build_index(tmp_path / split)
        write_index(tmp_path / f"{split}.index", rows, classes, root=split)
    augment = AugmentConfig(colour_jitter=(0.2, 0.2, 0.2, 0.0), erase_probability=0.5)
    data = DataConfig(root=str(tmp_path), image_size=64, augment=augment)
    plan = make_plan(RunConfig(name="x", train=TrainConfig(global_batch=16)), 1, DataFacts(48, 48, 3))
    sources = [make_train_source(data, plan, World(gpus=1), 0, device, True) for device in ("cpu", "cuda:0")]
    on_cpu, on_gpu = (next(iter(source)) for source in sources)
    assert (on_cpu.images_NCHW - on_gpu.images_NCHW.cpu()).abs().mean() < 0.05
    assert torch.equal(on_cpu.images_NCHW == 0, on_gpu.images_NCHW.cpu() == 0)
    for source in sources:
        source.close()
