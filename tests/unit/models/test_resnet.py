"""The named networks: sizes of the paper, timm's networks underneath, the small one, configs."""

import pytest
import timm
import torch
from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.networks import NETWORKS
from ii_dist.config.schema import ModelConfig
from ii_dist.models import GATES, MODELS, create_model

# Trainable parameters at 1000 classes: plain, SE (reduction 16, no biases), folded 3x3.
PUBLISHED = {
    "resnet18": (11_689_512, 11_776_552, 11_807_152),
    "resnet34": (21_797_672, 21_954_856, 22_009_788),
    "resnet50": (25_557_032, 28_071_976, 28_991_244),
    "resnet101": (44_549_160, 49_292_328, 51_019_708),
    "resnet152": (60_192_808, 66_770_984, 69_162_252),
}


def _build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **options)
    return model


def _images(batch: int = 2, side: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network", PUBLISHED)
@pytest.mark.parametrize(("column", "gate"), [(0, "none"), (1, "se"), (2, "fold3x3")])
def test_parameters_of_the_paper(network: str, column: int, gate: str) -> None:
    with torch.device("meta"):
        model = _build(f"ini_{network}", gate=gate)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[network][column]


def test_parameters_with_other_gate_options() -> None:
    options = ({"lens_filters": 64}, {"gate_reduction": 32, "gate": "se"}, {"fold_width": 64})
    with torch.device("meta"):
        counts = [sum(p.numel() for p in _build("ini_resnet50", **o).parameters()) for o in options]
    per_stage = ((3, 256), (4, 512), (6, 1024), (3, 2048))  # blocks, channels
    lens64 = sum(n * (((2 * c // 16 - 2) * 14 + c) * (c // 16) + 11 * 64) for n, c in per_stage)
    se32 = sum(n * 2 * c * (c // 32) for n, c in per_stage)
    wide = sum(
        n * (((2 * c // 64 - 2) * 62 + c) * (c // 16) + 11 * p)
        for (n, c), p in zip(per_stage, (4, 8, 16, 32), strict=True)
    )
    assert counts == [25_557_032 + extra for extra in (lens64, se32, wide)]


@pytest.mark.parametrize("network", PUBLISHED)
def test_without_a_gate_state_dict_and_modules_are_timms(network: str) -> None:
    with torch.device("meta"):
        ours, theirs = _build(f"ini_{network}", gate="none"), _build(network)
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
    ]
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_without_a_gate_numbers_are_timms_bit_for_bit(network: str) -> None:
    ours, theirs = _build(f"ini_{network}", gate="none", num_classes=7), _build(network, num_classes=7)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} starts differently from the same seed"
    for model in (ours, theirs):
        model.train()(_images(4))  # moves the running statistics
    assert torch.equal(ours(_images()), theirs(_images()))
    assert torch.equal(ours.eval()(_images()), theirs.eval()(_images()))


@pytest.mark.parametrize("gate", [g for g in GATES if g != "none"])
def test_timms_weights_fit_and_only_the_gates_are_new(gate: str) -> None:
    ours, theirs = _build("ini_resnet18", gate=gate), _build("resnet18")
    result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys
    assert all(".gate." in key for key in result.missing_keys)


def test_the_small_network() -> None:
    model = _build("ini_resnet20", gate="none")
    # Stem 432 + 32, stages 3 x (2 x (9 x 16 x 16) + 64) and so on, projections 16->32 and 32->64, classifier 650.
    assert sum(p.numel() for p in model.parameters()) == 272_474
    sides = [tuple(f.shape[1:]) for f in _build("ini_resnet20", gate="se", features_only=True)(_images(side=32))]
    assert sides == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 20
    assert convolutions[0].stride == (1, 1)
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())
    assert model(_images(side=32)).shape == (2, 10)
    assert torch.all(model.layer1[0].bn2.weight == 0)  # type: ignore[union-attr,index]


def test_the_small_network_starts_its_stem_as_timm_starts_convolutions() -> None:
    stds = []
    for seed in range(20):
        torch.manual_seed(seed)
        stds.append(timm.create_model("ini_resnet20", gate="none").conv1.weight.std())
    assert torch.stack(stds).mean().item() == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.03)


@pytest.mark.parametrize("network", MODELS)
@pytest.mark.parametrize("gate", GATES)
def test_every_network_builds_from_a_config(network: str, gate: str) -> None:
    cfg = ModelConfig(network=network, gate=gate, fold_width=8, drop_path=0.1)
    with torch.device("meta"):
        model = create_model(cfg, num_classes=12)
        images = torch.randn(2, 3, 64, 64)
        assert model(images).shape == (2, 12)
    assert any(".gate." in name for name in model.state_dict()) == (gate != "none")


def test_a_config_reaches_the_network() -> None:
    cfg = ModelConfig(
        network="ini_resnet20", gate_reduction=8, fold_width=4, lens_filters=5, zero_init_last=False, drop_path=0.2
    )
    model = create_model(cfg, num_classes=4)
    last = model.layer3[2]  # type: ignore[union-attr,index]
    assert last.gate.excite.weight.shape == (64, 8)
    assert last.gate.lens.conv.weight.shape == (5, 1, 3, 3)
    assert last.gate.squeeze.weight.shape == (8, 30 * 2)
    assert torch.all(last.bn2.weight == 1)
    assert last.drop_path.drop_prob == pytest.approx(0.2)
    assert model.fc.weight.shape == (4, 64)  # type: ignore[union-attr]


def test_unknown_network_names_the_table() -> None:
    cfg = ModelConfig.model_construct(network="ini_resnet51")
    with pytest.raises(ConfigError, match=r"'ini_resnet51' is not one of ini_resnet18, .*ini_resnet20"):
        create_model(cfg, num_classes=10)


def test_every_parameter_gets_a_gradient_at_the_first_step() -> None:
    """A gate's gradient is zero behind a zero-initialized norm, but it is there: DDP waits for no parameter."""
    model = _build("ini_resnet20", gate="fold3x3").train()
    model(_images(8, 32)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_training_reaches_the_gates() -> None:
    """Behind norms that start at zero a gate has no gradient in the first step, and one from the second on."""
    model = _build("ini_resnet20", gate="fold3x3").train()
    gates = {name: p for name, p in model.named_parameters() if ".gate." in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spread = torch.linspace(0.2, 3, 16)[:, None, None, None]
    without = []
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(_images(16, 32) * spread + spread), torch.arange(16) % 10).backward()
        optimizer.step()
        without.append([name for name, p in gates.items() if p.grad is None or not p.grad.any()])
    assert len(without[0]) == len(gates)
    assert without[2] == []


def test_a_small_network_reduces_less_where_nothing_is_asked_for() -> None:
    hidden = [_build("ini_resnet20", **o).layer1[0].gate.squeeze.out_features for o in ({}, {"gate_reduction": 16})]  # type: ignore[union-attr,index]
    assert hidden == [4, 1]


@pytest.mark.parametrize("network", ["ini_resnet20", "ini_resnet18"])
def test_names_and_facts_are_the_table(network: str) -> None:
    assert tuple(MODELS) == tuple(NETWORKS)
    model = _build(network, gate="fold3x3", num_classes=3)
    shape = NETWORKS[network]
    stages = [getattr(model, f"layer{i + 1}") for i in range(len(shape.layers))]
    assert tuple(len(stage) for stage in stages) == shape.layers
    assert tuple(stage[-1].gate.excite.out_features for stage in stages) == shape.out_channels
