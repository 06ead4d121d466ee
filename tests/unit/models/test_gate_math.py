"""Gates against equations written as loops, their sizes against the paper's table, their errors."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.networks import GATE_NAMES, fold_widths
from ii_dist.models.gates import GATES, FoldGate, Lens, SqueezeExcite, make_gate


def _sizes(gate: nn.Module | None) -> int:
    return sum(p.numel() for p in gate.parameters()) if gate else 0


def test_the_table_and_the_names_that_a_config_may_use_agree() -> None:
    assert tuple(GATES) == GATE_NAMES


# (planes, channels) -> parameters of se and fold3x3, from the table for ImageNet ResNets, reduction 16.
PUBLISHED = {
    (64, 64): (512, 636),
    (128, 128): (2_048, 2_680),
    (256, 256): (8_192, 10_992),
    (512, 512): (32_768, 44_512),
    (64, 256): (8_192, 10_860),
    (128, 512): (32_768, 44_248),
    (256, 1024): (131_072, 178_608),
    (512, 2048): (524_288, 717_664),
}


@pytest.mark.parametrize(("planes", "channels"), PUBLISHED)
def test_parameters_of_one_gate(planes: int, channels: int) -> None:
    counts = [_sizes(make_gate(name, channels, planes)) for name in ("se", "fold3x3")]
    assert tuple(counts) == PUBLISHED[planes, channels]
    assert make_gate("none", channels, planes) is None


def test_all_layers_but_the_norm_are_without_bias() -> None:
    gate = make_gate("fold3x3", 64, 64)
    assert gate is not None
    assert [name for name, _ in gate.named_parameters() if name.endswith("bias")] == ["lens.norm.bias"]


def _linear(weight: Tensor, x: list[float]) -> list[float]:
    return [sum(weight[i, j].item() * x[j] for j in range(len(x))) for i in range(weight.shape[0])]


def _excite_by_loops(gate: SqueezeExcite, q: list[float]) -> list[float]:
    hidden = [max(0.0, h) for h in _linear(gate.squeeze.weight, q)]
    return [1 / (1 + math.exp(-z)) for z in _linear(gate.excite.weight, hidden)]


def _lens_by_loops(lens: Lens, images: list[list[list[float]]], training: bool) -> list[list[float]]:
    """images[n][row][column] -> flattened mean over filters of norm(convolution), row by row."""
    height, width = len(images[0]) - 2, len(images[0][0]) - 2
    places = list(product(range(height), range(width)))
    views = [[0.0] * len(places) for _ in images]
    filters = lens.conv.out_channels
    for m in range(filters):
        taps = [(a, b, lens.conv.weight[m, 0, a, b].item()) for a in range(3) for b in range(3)]
        maps = [[sum(w * image[i + a][j + b] for a, b, w in taps) for i, j in places] for image in images]
        mean, var = lens.norm.running_mean[m].item(), lens.norm.running_var[m].item()  # type: ignore[index]
        if training:
            values = [z for one in maps for z in one]
            mean = sum(values) / len(values)
            var = sum((z - mean) ** 2 for z in values) / len(values)
        gain, shift = lens.norm.weight[m].item() / math.sqrt(var + lens.norm.eps), lens.norm.bias[m].item()
        for n, one in enumerate(maps):
            for place, z in enumerate(one):
                views[n][place] += (gain * (z - mean) + shift) / filters
    return views


@pytest.mark.parametrize("training", [True, False])
def test_fold3x3_equals_its_equations_by_loops(training: bool) -> None:
    torch.manual_seed(0)
    channels, width, batch = 16, 4, 2
    gate = make_gate("fold3x3", channels, channels, reduction=4, fold_width=width, lens_filters=3)
    assert isinstance(gate, FoldGate)
    gate.double().train(training)
    with torch.no_grad():
        for vector in (gate.lens.norm.weight, gate.lens.norm.bias, gate.lens.norm.running_mean):
            assert vector is not None
            vector.normal_()
    residual, identity = torch.randn(2, batch, channels, 3, 5, dtype=torch.float64).unbind()
    u = residual.flatten(2).sum(2) / 15
    v = identity.flatten(2).sum(2) / 15
    images = []
    for n in range(batch):
        rows = []
        for i in range(channels // width):
            rows.append([u[n, i * width + j].item() for j in range(width)])
            rows.append([v[n, i * width + j].item() for j in range(width)])
        images.append(rows)
    expected = [_excite_by_loops(gate, q) for q in _lens_by_loops(gate.lens, images, training)]
    scale = gate(residual, identity)
    assert scale.shape == (batch, channels, 1, 1)
    torch.testing.assert_close(scale[:, :, 0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_se_equals_its_equation_by_loops_and_does_not_look_at_the_identity() -> None:
    torch.manual_seed(0)
    gate = make_gate("se", 8, 8, reduction=4)
    assert isinstance(gate, SqueezeExcite)
    gate.double()
    residual = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    expected = [_excite_by_loops(gate, (residual[n].flatten(1).sum(1) / 9).tolist()) for n in range(2)]
    scale = gate(residual, torch.full_like(residual, torch.nan))
    torch.testing.assert_close(scale[:, :, 0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["se", "fold3x3"])
def test_a_gate_starts_near_one_half(name: str) -> None:
    torch.manual_seed(0)
    gate = make_gate(name, 256, 64)
    assert gate is not None
    scale = gate(torch.randn(8, 256, 7, 7), torch.rand(8, 256, 7, 7))
    assert scale.mean().item() == pytest.approx(0.5, abs=0.05)
    assert 0 < scale.std().item() < 0.2


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_lens_weight_its_gradient_and_its_momentum_stay_plain(memory_format: torch.memory_format) -> None:
    lens = Lens(4, kernel_size=3).to(memory_format=memory_format)  # type: ignore[call-overload]
    lens(torch.randn(2, 1, 8, 16)).sum().backward()
    weight = lens.conv.weight
    assert weight.grad is not None
    assert weight.stride() == weight.grad.stride() == torch.zeros_like(weight).stride() == (9, 9, 3, 1)


def test_unknown_gate_names_the_table() -> None:
    with pytest.raises(ConfigError, match="gate 'sw' is not one of none, se, fold3x3"):
        make_gate("sw", 64, 64)


def test_reduction_beyond_the_channels() -> None:
    with pytest.raises(ConfigError, match="gate_reduction 65: needs 1 to 64"):
        make_gate("se", 64, 64, reduction=65)


@pytest.mark.parametrize(
    ("channels", "width", "possible"), [(64, 12, "4, 8, 16, 32"), (16, 16, "4, 8"), (2, 3, "none")]
)
def test_a_width_that_does_not_fold_says_which_would(channels: int, width: int, possible: str) -> None:
    with pytest.raises(ConfigError, match=f"fold_width {width}: .*possible: {possible}$"):
        make_gate("fold3x3", channels, channels, reduction=1, fold_width=width)


def test_every_possible_width_builds_and_no_other() -> None:
    for width in range(1, 50):
        if width in fold_widths([48]):
            assert make_gate("fold3x3", 48, 48, fold_width=width) is not None
        else:
            with pytest.raises(ConfigError):
                make_gate("fold3x3", 48, 48, fold_width=width)
    assert fold_widths([16, 32, 64]) == [4, 8]
