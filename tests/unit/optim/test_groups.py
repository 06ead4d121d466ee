"""Which parameters are decayed, and that none is lost."""

import pytest
import torch
from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import ModelConfig
from ii_dist.models import GATES, create_model
from ii_dist.optim import param_groups


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("network", ["ini_resnet50", "ini_resnet20"])
def test_every_parameter_is_in_one_group_under_its_name(network: str, gate: str) -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig(network=network, gate=gate, fold_width=8), num_classes=10)
    groups = param_groups(model, 1e-4)
    pairs = [pair for group in groups for pair in group["params"]]
    assert len(pairs) == len({id(p) for _, p in pairs}) == len(list(model.parameters()))
    assert all(dict(model.named_parameters())[name] is p for name, p in pairs)


def test_only_weights_of_convolutions_and_linear_layers_are_decayed() -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig(network="ini_resnet50", gate="fold3x3"), num_classes=10)
    decayed, kept = param_groups(model, 0.5)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    # By shape, an oracle of its own: a norm's parameters and biases are vectors, weights are not.
    assert all(p.ndim >= 2 for _, p in decayed["params"])
    assert all(p.ndim == 1 for _, p in kept["params"])
    names = {name for name, _ in kept["params"]}
    assert {"fc.bias", "bn1.weight", "layer1.0.downsample.1.bias", "layer4.2.gate.lens.norm.weight"} <= names
    names = {name for name, _ in decayed["params"]}
    assert {"fc.weight", "conv1.weight", "layer4.2.gate.lens.conv.weight", "layer1.0.gate.squeeze.weight"} <= names


def test_names_decide_nothing() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Linear(2, 2, bias=False)
            self.conv = nn.LayerNorm(2)
            self.weight = nn.Parameter(torch.ones(2, 2))  # of no layer: not decayed
            self.norm = nn.ConvTranspose1d(1, 1, 3)

    decayed, kept = param_groups(Odd(), 0.1)
    assert [n for n, _ in decayed["params"]] == ["bias.weight", "norm.weight"]
    assert [n for n, _ in kept["params"]] == ["weight", "conv.weight", "conv.bias", "norm.bias"]


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    (decayed,) = param_groups(model, 0.1)
    assert [n for n, _ in decayed["params"]] == ["0.weight"]


def test_an_empty_group_is_left_out() -> None:
    (kept,) = param_groups(nn.BatchNorm2d(3), 0.1)
    assert kept["weight_decay"] == 0.0


def test_all_are_decayed_if_asked_for() -> None:
    groups = param_groups(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 0.1, decay_all=True)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]


@pytest.mark.parametrize("network", ["ini_resnet50", "ini_preresnet20"])
def test_layer_decay_gives_each_layer_a_share_of_the_next_ones_rate(network: str) -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig(network=network, gate="fold3x3", fold_width=8), num_classes=10)
    groups = param_groups(model, 1e-4, layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for name, _ in group["params"]}
    assert scale.keys() == dict(model.named_parameters()).keys()
    stem, head = next(n for n, _ in model.named_parameters()), [n for n, _ in model.named_parameters()][-1]
    assert scale[head] == 1.0
    assert scale[stem] == min(scale.values())
    # A block is one layer: its gate learns as fast as its convolutions, half as fast as the next block.
    block = {value for name, value in scale.items() if name.startswith("layer2.1.")}
    after = {value for name, value in scale.items() if name.startswith("layer2.2.")}
    assert len(block) == 1
    assert after == {2 * value for value in block}
    assert all(0 < value <= 1 for value in scale.values())


def test_layer_decay_needs_a_network_that_knows_its_layers() -> None:
    with pytest.raises(ConfigError, match=r"optim.layer_decay 0.5: Linear does not say what its layers are"):
        param_groups(nn.Linear(1, 1), 0.1, layer_decay=0.5)
