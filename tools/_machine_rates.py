"""How fast one device multiplies matrices, copies memory and trains a network: a second or two each.

In: a torch device. Out: rates, each the best of many tries, because a peak is asked for and neighbours only slow down.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ii_dist.config import RunConfig
from ii_dist.metrics.peaks import Device
from ii_dist.models import create_model
from ii_dist.models.roofline import run_rate, step_roofline
from ii_dist.models.work import training_work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
_CPU_SIDE, _GPU_SIDE = 1024, 8192  # of the matrices
_CPU_COPY_BYTES, _GPU_COPY_BYTES = 256 << 20, 1 << 30  # far more than any cache
_CPU_BATCH, _CPU_IMAGE, _GPU_BATCH, _GPU_IMAGE = 4, 96, 128, 224
_PROBE = {"model": {"network": "ini_resnet50", "gate": "none"}, "optim": {"optimizer": "sgd"}}


def measure_device(device: str, name: str, threads: int, seconds: float, say: Callable[[str], None]) -> Device:
    """Everything about one device; on a CPU with so many threads of torch."""
    on_gpu = device != "cpu"
    if not on_gpu:
        torch.set_num_threads(threads)
    where = name if on_gpu else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    tflops = {}
    for kind in ("bf16", "fp16", "tf32", "fp32") if on_gpu else ("bf16", "fp32"):
        say(f"{where}: matrix products, {kind}")
        tflops[kind] = matmul_tflops(device, kind, seconds)
    say(f"{where}: memory")
    found = Device(name, tflops, copy_gb_per_s(device, seconds), kind="cuda" if on_gpu else "cpu", threads=threads)
    say(f"{where}: a training step of ResNet-50")
    share = roofline_share(device, found, seconds)
    return Device(name, tflops, found.gb_per_s, kind=found.kind, threads=threads, roofline_share=share)


def matmul_tflops(device: str, kind: str, seconds: float) -> float:
    """1e12 operations a second of a square matrix product."""
    side = _CPU_SIDE if device == "cpu" else _GPU_SIDE
    a, b = (torch.randn(side, side, device=device).to(DTYPES[kind]) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    try:
        return 2e-12 * side**3 / best_s(lambda: torch.mm(a, b, out=out), device, seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy_gb_per_s(device: str, seconds: float) -> float:
    """1e9 bytes a second, read and written together."""
    size = _CPU_COPY_BYTES if device == "cpu" else _GPU_COPY_BYTES
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2e-9 * size / best_s(lambda: target.copy_(source), device, seconds)


def roofline_share(device: str, peaks: Device, seconds: float) -> float:
    """What part of the roofline a plain loop over ResNet-50 reaches: kernels that are no matrix products, launches."""
    on_gpu = device != "cpu"
    precision = "fp32" if not on_gpu else "bf16"
    cfg = RunConfig.model_validate({"name": "probe", "engine": {"precision": precision}, **_PROBE})
    images, side = (_GPU_BATCH, _GPU_IMAGE) if on_gpu else (_CPU_BATCH, _CPU_IMAGE)
    rate = run_rate(cfg, peaks.flops_per_s(precision), 1e9 * peaks.gb_per_s)
    least = step_roofline(cfg, training_work(lambda: create_model(cfg.model, 1000), side), images, 1, rate)
    return least.seconds / best_s(_training_step(cfg, device, images, side), device, 2 * seconds)


def _training_step(cfg: RunConfig, device: str, images: int, side: int) -> Callable[[], object]:
    model = create_model(cfg.model, 1000).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images_NCHW = torch.randn(images, 3, side, side).to(device, memory_format=torch.channels_last)
    labels_N = torch.arange(images, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=cfg.engine.precision == "bf16"):
            loss = functional.cross_entropy(model(images_NCHW), labels_N)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        return loss

    return step


def best_s(work: Callable[[], object], device: str, seconds: float) -> float:
    """The shortest of the times that `work` takes, tried for `seconds` and three times at least.

    One thread on a CPU is timed by its own CPU time: what others do then hardly counts.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else time.perf_counter
    work()
    _finish(device)
    times: list[float] = []
    end_s = time.monotonic() + seconds
    while len(times) < 3 or time.monotonic() < end_s:
        start_s = now()
        work()
        _finish(device)
        times.append(now() - start_s)
    return min(times)


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
