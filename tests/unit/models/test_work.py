"""FLOPs and bytes of training, against torch's own counter, the hand-made reckoning for ResNet-50, and arithmetic."""

import re
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ii_dist.config import RunConfig
from ii_dist.models import GATES, MODELS
from ii_dist.models.roofline import run_rate, step_roofline
from ii_dist.models.work import Rate, TrainingWork, training_work

H100, H200 = (798e12, 3.0e12), (788e12, 4.3e12)  # as measured: matrix product, copy


@cache
def _work(name: str = "ini_resnet50", gate: str = "none", side: int = 224) -> TrainingWork:
    return training_work(lambda: timm.create_model(name, gate=gate), side)


def test_resnet50_as_reckoned_by_hand() -> None:
    """Shapes by hooks, passes by hand: 25.56 M, 4.089 GMAC, 24.5 GFLOP (24.3 without the gradient of the images)."""
    work = _work()
    assert work.parameters == 25_557_032
    assert work.macs / 1e9 == pytest.approx(4.089, abs=5e-4)
    assert work.flops_per_image / 1e9 == pytest.approx(24.5, abs=0.05)
    assert work.counted_flops_per_image / 1e9 == pytest.approx(24.3, abs=0.05)
    assert 2e-6 * work.elements_per_image() == pytest.approx(475, rel=2e-3)
    assert 2e-6 * work.elements_per_image(fused=True) == pytest.approx(402, rel=2e-3)
    by_kind = {kind: 2e-6 * work.elements_per_image(kind=kind) for kind in ("conv", "norm", "relu", "sum", "pool")}
    assert by_kind == pytest.approx({"conv": 130, "norm": 67 + 111, "relu": 96, "sum": 66, "pool": 5}, rel=0.015, abs=1)


@pytest.mark.parametrize(("machine", "plain", "fused"), [(H100, 6010, 7051), (H200, 8202, 9544)])
def test_the_roofline_of_resnet50(machine: tuple[float, float], plain: float, fused: float) -> None:
    """Images/s where each convolution takes the longer of arithmetic and memory, and the rest is memory."""
    for compiled, wanted in ((False, plain), (True, fused)):
        rate = Rate(*machine, bytes_per_element=2, fused=compiled)
        assert 4096 / sum(_work().pass_seconds(4096, rate)) == pytest.approx(wanted, rel=0.01)
        assert _work().bound(4096, rate) == "memory"


@pytest.mark.parametrize(("name", "gate"), [("ini_resnet18", "none"), ("ini_resnet20", "double_fc")])
def test_operations_agree_with_torchs_own_counter(name: str, gate: str) -> None:
    """(Of convolutions in groups torch's counter takes the gradient of the weights for one without groups.)"""
    work, images, side = _work(name, gate, 64), 3, 64
    with torch.device("meta"):
        model = timm.create_model(name, gate=gate).train()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(images, 3, side, side)).sum().backward()
    ours = sum(kernel.flops + images * kernel.flops_per_image for kernel in work.kernels)
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in MODELS if not re.search("101|152|110|164|22_|28_|34", name)])
def test_every_kind_of_network_is_counted(name: str) -> None:
    """A plain forward and twice that backward; less than 2 % is not: the gradient of the images, small matrices."""
    work = _work(name, "fold3x3" if name in ("ini_resnet20", "ini_resnet18") else "none", 32)
    assert work.counted_flops_per_image == pytest.approx(work.flops_per_image, rel=0.06)
    assert 0 < work.elements_per_image(fused=True) < work.elements_per_image()
    assert all(kernel.elements_per_image >= 0 for kernel in work.kernels)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_counted_and_costs_memory(gate: str) -> None:
    plain, gated = _work("ini_resnet20", "none", 32), _work("ini_resnet20", gate, 32)
    assert gated.parameters >= plain.parameters
    if gate != "none":
        assert gated.elements_per_image() > 1.1 * plain.elements_per_image()
        assert gated.elements_per_image(fused=True) > plain.elements_per_image(fused=True)


class _Block(nn.Module):
    """A convolution and what follows it, so that every pass can be counted with a pencil."""

    def __init__(self, follows: Callable[["_Block", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.scale, self.follows = nn.Parameter(torch.ones(1)), follows

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.follows(self, self.conv(x_NCHW))


def _relu_and_sum(self: _Block, x_NCHW: torch.Tensor) -> torch.Tensor:
    normed_NCHW: torch.Tensor = self.norm(x_NCHW)
    return normed_NCHW.relu() + normed_NCHW


CONV = 2 + 2  # forward in, out; backward only the weights' gradient: in, gradient
NORM = 3 + 5  # forward X, X, Y; backward X, X, dY, dY, dX


@pytest.mark.parametrize(
    ("follows", "plain", "fused"),
    [
        (lambda self, x: x, CONV - 1, CONV - 1),
        # Y goes straight into the sum at the end.
        (lambda self, x: self.norm(x), CONV + NORM - 2, CONV + NORM - 2 - 2),
        # ReLU X, Y; Y, dX. X stays inside; half an element of mask is written once and read twice.
        (lambda self, x: self.norm(x).relu(), CONV + NORM + 4, CONV + NORM + 4 - 2 + 0.5 - 1),
        # Product X, Y; dX; X and X dY, which one sum reads. Both products go straight into their sums.
        (lambda self, x: x * self.scale, CONV + 2 + 1 + 3, CONV + 2 + 1 + 3 - 4),
        # Two read the norm's output: the first has it for nothing. The sum of its gradients reads one of them, writes.
        (_relu_and_sum, CONV + NORM + 4 + 3 + 2, CONV + NORM + 4 + 3 + 2 - 2 + 0.5 + 0.5),
        # A norm's gradient goes through memory into the sum of gradients.
        (lambda self, x: x + self.norm(x).relu(), CONV + NORM + 4 + 3 + 2, CONV + NORM + 4 + 3 + 2 - 2 + 0.5 - 1),
    ],
    ids=["conv", "norm", "relu", "product", "two readers", "pre-activation"],
)
def test_passes_counted_with_a_pencil(
    follows: Callable[[_Block, torch.Tensor], torch.Tensor], plain: float, fused: float
) -> None:
    """At the end a sum that reads the last map once, and whose gradient is one number."""
    elements = 3 * 8 * 8
    work = training_work(lambda: _Block(follows), 8)
    assert work.elements_per_image() / elements == pytest.approx(plain + 1, abs=0.02)
    assert work.elements_per_image(fused=True) / elements == pytest.approx(fused + 1, abs=0.02)


def test_what_grows_with_the_images_and_what_does_not() -> None:
    work = _work("ini_resnet18", "none", 64)
    rate = Rate(1e30, 1e9, 4)  # memory only
    one, two, three = (sum(work.pass_seconds(images, rate)) for images in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    weights_s = 2 * one - two
    # read forward, read and written backward (the stem's are not read there), in float32
    assert weights_s == pytest.approx(3 * 4 * work.parameters / 1e9, rel=0.02)


def test_a_runs_step() -> None:
    work, rate = _work("ini_resnet18", "none", 64), Rate(1e30, 1e9, 4)
    cfg = RunConfig.model_validate({"name": "x", "engine": {"precision": "bf16", "compile": True}})
    assert run_rate(cfg, 2.0, 3.0) == Rate(2.0, 3.0, 2, True)
    once, twice = (step_roofline(RunConfig(name="x"), work, 8, n, rate) for n in (1, 2))
    assert (once.images, twice.images) == (8, 16)
    assert twice.forward_s == pytest.approx(2 * once.forward_s)
    assert twice.last_backward_s == once.last_backward_s == once.backward_s
    assert twice.update_s == once.update_s == pytest.approx(6 * 4 * work.parameters / 1e9)
    assert once.flops == 8 * 6 * work.macs
    again = RunConfig.model_validate({"name": "x", "engine": {"checkpoint_activations": True}})
    more = step_roofline(again, work, 8, 1, rate)
    assert more.backward_s == pytest.approx(once.backward_s + once.forward_s)
    assert more.flops == once.flops


def test_counting_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    training_work(lambda: timm.create_model("ini_preresnet20", gate="fold3x3", drop_path_rate=0.5), 16)
    assert torch.equal(before, torch.get_rng_state())
