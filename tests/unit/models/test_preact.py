"""Pre-activation networks against a transcription of the authors' equations, and their blocks' parts."""

from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ii_dist.models import GATES
from ii_dist.models.gates import GateChoice
from ii_dist.models.preact import PreActBasic, PreActBottleneck, PreActResNet

NAMES = ("ini_preresnet110", "ini_preresnet164", "ini_wrn16_8")
SHORT = {"layers": (2, 1, 1)}


def _build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def _images(batch: int = 2, side: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """In evaluation, written out: (x - mean) / sqrt(var + 1e-5), then gain and shift where there are any."""
    mean, var = (state[f"{name}.running_{what}"][:, None, None] for what in ("mean", "var"))
    y = (x - mean) / (var + 1e-5).sqrt()
    if f"{name}.weight" in state:
        y = y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]
    return y


def _by_the_equations(state: dict[str, Tensor], gates: dict[str, Any], x: Tensor, layers: tuple[int, ...]) -> Tensor:
    """The network as functions of its state dict: the one place of these tests that knows the order of things."""
    x = F.conv2d(_norm(state, "norm_in", x), state["conv1.weight"], padding=1)
    if "bn1.weight" in state:
        x = _norm(state, "bn1", x)  # and no activation
    for stage, blocks in enumerate(layers, start=1):
        for i in range(blocks):
            name = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            active = _norm(state, f"{name}.bn1", x).relu()
            convolutions = [w for key, w in state.items() if key.startswith(f"{name}.conv")]
            kernels = [w.shape[-1] for w in convolutions]
            strided = kernels.index(3)
            residual = active
            for j, weight in enumerate(convolutions, start=1):
                if j > 1:
                    residual = _norm(state, f"{name}.bn{j}", residual).relu()
                residual = F.conv2d(
                    residual, weight, stride=stride if j - 1 == strided else 1, padding=kernels[j - 1] // 2
                )
            projection = state.get(f"{name}.downsample.weight")
            identity = x if projection is None else F.conv2d(active, projection, stride=stride)
            scale = gates[name](residual, identity) if gates else 1.0
            x = residual * scale + identity
    pooled = _norm(state, "norm", x).relu().mean((2, 3))
    return pooled @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", NAMES)
def test_output_is_the_authors_equations(name: str, gate: str) -> None:
    options: dict[str, Any] = {"channels": (32, 32, 64)} if name == "ini_wrn16_8" else {}
    model = _build(name, gate=gate, **SHORT, **options).double()
    images = _images(4).double()
    model.train()(images * 3 + 1)  # moves the running statistics
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        gates = {n.removesuffix(".gate"): m for n, m in model.named_modules() if n.endswith(".gate")}
        expected = _by_the_equations(model.state_dict(), gates, images, (2, 1, 1))
        assert bool(gates) == (gate != "none")
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_the_whole_networks_have_their_depth_and_width() -> None:
    """Layers on the longest path, as the names count them: stem, convolutions of the blocks, classifier."""
    for name, depth, widths in (
        ("ini_preresnet110", 110, (16, 16, 32, 64)),
        ("ini_preresnet164", 164, (16, 64, 128, 256)),
        ("ini_wrn16_8", 14, (16, 128, 256, 512)),  # their names count the projections too: 2 of them
        ("ini_wrn22_10", 20, (16, 160, 320, 640)),
        ("ini_wrn28_10", 26, (16, 160, 320, 640)),
    ):
        with torch.device("meta"):
            model = _build(name, gate="none")
            last, taken = model.forward_intermediates(torch.empty(1, 3, 32, 32))
        path = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
        assert len(path) + 1 == depth, name
        assert tuple(t.shape[1] for t in taken) == widths
        assert [t.shape[2] for t in taken] == [32, 32, 16, 8]
        assert last.shape == (1, widths[-1], 8, 8)


def test_the_input_is_normalized_without_gain_and_shift() -> None:
    model = _build("ini_wrn16_8", **SHORT)
    assert [n for n, _ in model.named_parameters() if n.startswith("norm_in")] == []
    stem = model.norm_in(_images(8) * 5 + 7)
    assert stem.mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(stem.var((0, 2, 3), correction=0), torch.ones(3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [PreActBasic, PreActBottleneck])
def test_a_projection_stands_where_shape_changes_and_nowhere_else(kind: Any) -> None:
    gate = GateChoice("none")
    assert kind(32 * kind.expansion, 32, gate=gate).downsample is None
    assert kind(16, 32, gate=gate).downsample.weight.shape == (32 * kind.expansion, 16, 1, 1)
    assert kind(32 * kind.expansion, 32, 2, gate=gate).downsample.stride == (2, 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gate", ["none", "fold3x3"])
def test_a_block_begins_as_the_identity_where_it_is_asked_to(name: str, gate: str) -> None:
    model = _build(name, gate=gate, zero_init_last=True, **SHORT)
    block = model.layer1[1]
    x = torch.randn(2, block.bn1.num_features, 8, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(_build(name, gate=gate, **SHORT).layer1[1](x), x)


def test_convolutions_start_as_the_authors() -> None:
    """Normal with variance 2 / (kernel * kernel * output channels)."""
    model = _build("ini_wrn16_8", gate="none", **SHORT)
    for conv in (model.layer2[0].conv1, model.layer3[0].conv2, model.layer3[0].downsample):
        fan_out = conv.kernel_size[0] ** 2 * conv.out_channels
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
        assert conv.weight.mean().item() == pytest.approx(0, abs=0.01 * (2 / fan_out) ** 0.5 * 10)


def test_stochastic_depth_grows_from_block_to_block_and_keeps_what_it_keeps() -> None:
    model = _build("ini_preresnet164", layers=(2, 2, 1), drop_path_rate=0.4)
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    rates = [block.drop_path.drop_prob if block.drop_path else 0.0 for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    dropped = PreActBasic(32, 32, gate=GateChoice(fold_width=8), drop_path=0.5).train()
    x = torch.randn(64, 32, 4, 4)
    kept = (dropped(x) != x).flatten(1).any(1)
    assert 10 < kept.sum() < 54


def test_dropout_before_the_classifier() -> None:
    model = _build("ini_preresnet110", drop_rate=0.5, **SHORT)
    features = torch.ones(4, 64, 2, 2)
    assert not torch.equal(model.train().forward_head(features), model.forward_head(features))
    assert torch.equal(model.eval().forward_head(features), model.forward_head(features))
    assert model.forward_head(features, pre_logits=True).shape == (4, 64)


def test_the_last_norm_can_be_had_among_the_features() -> None:
    model = _build("ini_preresnet164", **SHORT).eval()
    last, raw = model.forward_intermediates(_images())
    _, normed = model.forward_intermediates(_images(), norm=True)
    assert torch.equal(last, normed[-1])
    assert torch.equal(last, model.act(model.norm(raw[-1])))
    assert all(torch.equal(a, b) for a, b in zip(raw[:-1], normed[:-1], strict=True))
    assert not torch.equal(raw[-1], normed[-1])


def test_made_for_a_device_and_dtype() -> None:
    model = _build("ini_wrn16_8", device=torch.device("meta"), dtype=torch.bfloat16, **SHORT)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.reset_classifier(3)
    assert model.fc.weight.is_meta
    assert model.fc.weight.dtype == torch.bfloat16


def test_layer_decay_sees_the_order_of_the_network() -> None:
    from timm.models import group_parameters

    model = _build("ini_wrn16_8", **SHORT)
    layer = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert set(layer) == {n for n, _ in model.named_parameters()}
    order = [
        "conv1.weight",
        "layer1.0.conv1.weight",
        "layer1.1.bn2.bias",
        "layer2.0.conv1.weight",
        "layer3.0.bn1.weight",
    ]
    assert all(layer[a] < layer[b] for a, b in pairwise([*order, "fc.weight"]))
    assert layer["bn1.weight"] == layer["conv1.weight"]
    assert layer["layer1.0.gate.squeeze.weight"] == layer["layer1.0.conv1.weight"]
    assert layer["norm.weight"] == layer["layer3.0.conv1.weight"]  # with the last block, as in timm's ResNetV2
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["layer1.0.conv1.weight"] == coarse["layer1.1.conv1.weight"]


def test_an_option_of_other_networks_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'output_stride'"):
        _build("ini_wrn16_8", output_stride=8)


def test_it_is_the_class_that_it_says() -> None:
    assert isinstance(_build("ini_wrn16_8", **SHORT), PreActResNet)
