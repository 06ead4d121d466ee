"""The named networks: sizes of the paper, timm's networks underneath, the small one, configs."""

import pytest
import timm
import torch
from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.networks import NETWORKS
from ii_dist.config.schema import ModelConfig
from ii_dist.models import GATES, MODELS, create_model

TIMMS = [n.removeprefix("ini_") for n, shape in NETWORKS.items() if not shape.small_images]
ONE_BLOCK = {"layers": (1, 1, 1, 1)}


def _build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **options)
    return model


def _images(batch: int = 2, side: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network", TIMMS)
def test_without_a_gate_state_dict_and_modules_are_timms(network: str) -> None:
    with torch.device("meta"):
        ours, theirs = _build(f"ini_{network}", gate="none"), _build(network)
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
    ]
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]


@pytest.mark.parametrize("network", TIMMS)
def test_without_a_gate_numbers_are_timms_bit_for_bit(network: str) -> None:
    options = {"num_classes": 7, **ONE_BLOCK}
    ours, theirs = _build(f"ini_{network}", gate="none", **options), _build(network, **options)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} starts differently from the same seed"
    for model in (ours, theirs):
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.ones_(norm.weight)  # the last of a block starts at 0, and the residual with it
        model.train()(_images(4))  # moves the running statistics
    assert torch.equal(ours(_images()), theirs(_images()))
    assert torch.equal(ours.eval()(_images()), theirs.eval()(_images()))


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_a_whole_network_without_a_gate_is_timms_bit_for_bit(network: str) -> None:
    ours, theirs = _build(f"ini_{network}", gate="none").eval(), _build(network).eval()
    assert torch.equal(ours(_images(1)), theirs(_images(1)))


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


@pytest.mark.parametrize("network", ["ini_resnet18", "ini_preresnet164"])
def test_a_gate_keeps_the_start_that_it_gave_itself(network: str) -> None:
    """The network's own start of convolutions would give the cured lens of one tap weights of either sign."""
    model = _build(network, gate="pair1x1", lens_filters=64)
    lenses = [p for name, p in model.named_parameters() if name.endswith("gate.lens.conv.weight")]
    assert lenses
    assert all((p > 0).all() for p in lenses)


@pytest.mark.parametrize("network", MODELS)
@pytest.mark.parametrize("gate", GATES)
def test_every_network_builds_from_a_config(network: str, gate: str) -> None:
    cfg = ModelConfig(network=network, gate=gate, fold_width=8, drop_path=0.1)
    with torch.device("meta"):
        model = create_model(cfg, num_classes=12)
    assert any(".gate." in name for name in model.state_dict()) == (gate != "none")
    assert model.get_classifier().out_features == 12  # type: ignore[operator]


@pytest.mark.parametrize("network", MODELS)
def test_the_networks_own_fold_is_one_that_the_config_takes(network: str) -> None:
    ModelConfig(network=network, gate="fold3x3")


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


@pytest.mark.parametrize("network", MODELS)
def test_names_and_facts_are_the_table(network: str) -> None:
    assert tuple(MODELS) == tuple(NETWORKS)
    with torch.device("meta"):
        model = _build(network, gate="fold3x3", num_classes=3)
    shape = NETWORKS[network]
    stages = [getattr(model, f"layer{i + 1}") for i in range(len(shape.layers))]
    assert tuple(len(stage) for stage in stages) == shape.layers
    assert tuple(stage[-1].gate.excite.out_features for stage in stages) == shape.out_channels
    gate = stages[0][0].gate
    assert (gate.fold_width, gate.fold_layout) == (shape.fold_width, shape.fold_layout)


def test_the_small_networks_checkpoints_still_fit() -> None:
    """Names that files were written with."""
    keys = list(_build("ini_resnet20", gate="fold3x3").state_dict())
    block = [k.removeprefix("layer2.0.") for k in keys if k.startswith("layer2.0.")]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    lens = ["gate.lens.conv.weight", *(f"gate.lens.norm.{n}" for n in norm)]
    assert sorted(block) == sorted(
        [
            *("conv1.weight", "conv2.weight", "downsample.0.weight", "gate.squeeze.weight", "gate.excite.weight"),
            *(f"{bn}.{n}" for bn in ("bn1", "bn2", "downsample.1") for n in norm),
            *lens,
        ]
    )
    assert [k for k in keys if not k.startswith("layer")] == [
        "conv1.weight",
        *(f"bn1.{n}" for n in norm),
        "fc.weight",
        "fc.bias",
    ]
