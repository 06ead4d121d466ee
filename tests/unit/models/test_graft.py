"""Gates on the residual blocks of other families."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ii_dist.config.errors import ConfigError
from ii_dist.models import GATES, GateChoice, make_gate
from ii_dist.models.graft import GRAFTS, graft_gates

# name -> (blocks with identity, channels that leave each of them), at the network's natural width; from the papers.
FAMILIES: dict[str, tuple[int, ...]] = {
    "resnet18": (64,) * 2 + (128,) * 2 + (256,) * 2 + (512,) * 2,
    "mobilenetv2_100": (24, 32, 32, 64, 64, 64, 96, 96, 160, 160),
    "mobilenetv3_small_100": (24, 40, 40, 48, 96, 96),
    "mobilenetv4_conv_small": (96,) * 5 + (128,) * 5,
    "efficientnet_b0": (24, 40, 80, 80, 112, 112, 192, 192, 192),
    "efficientnet_cc_b0_4e": (24, 40, 80, 80, 112, 112, 192, 192, 192),
    "tf_efficientnetv2_b0": (32, 48) + (96,) * 2 + (112,) * 4 + (192,) * 7,
    "regnety_002": (24,) + (56,) + (152,) * 4 + (368,) * 7,
    "convnext_atto": (40,) * 2 + (80,) * 2 + (160,) * 6 + (320,) * 2,
}
SMALL = ("resnet18", "mobilenetv3_small_100", "regnety_002", "convnext_atto")


def _build(name: str, **options: Any) -> Any:
    """With norms and layer scales that let residuals through: most start them at 0, or at a millionth."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **options)
    for key, p in model.named_parameters():
        if p.dim() == 1 and key.endswith(("weight", "gamma")):
            nn.init.uniform_(p, 0.5, 1.5)
    return model


def _images(batch: int = 2, side: int = 64) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class One(nn.Module):
    """A gate that changes nothing."""

    def forward(self, residual: Tensor, identity: Tensor) -> Tensor:
        assert residual.shape == identity.shape
        return residual.new_ones(residual.shape[0], residual.shape[1], 1, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_gate_of_ones_the_network_is_what_it_was(name: str) -> None:
    plain, grafted = _build(name).eval(), _build(name).eval()
    blocks = graft_gates(grafted, "se")
    for block in blocks:
        grafted.get_submodule(block).gate = One()
    torch.testing.assert_close(grafted(_images()), plain(_images()), rtol=1e-5, atol=1e-5)
    assert list(grafted.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_block_with_identity_gets_a_gate_and_no_other(name: str, gate: str) -> None:
    with torch.device("meta"):
        model = _build(name)
        before, keys = _parameters(model), set(model.state_dict())
        blocks = graft_gates(model, gate)
        y = model(_images().to("meta"))
    assert y.shape == (2, 4)
    gates = [model.get_submodule(f"{block}.gate") for block in blocks]
    assert tuple(g.excite.out_features for g in gates) == FAMILIES[name]
    assert {n for n, m in model.named_modules() if n.endswith(".gate") and n[:-5] in blocks} == {
        f"{b}.gate" for b in blocks
    }
    assert _parameters(model) == before + sum(map(_parameters, gates))
    new = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict())
    assert all(any(key.startswith(f"{block}.gate.") for block in blocks) for key in new)


def test_a_grafted_resnet_is_the_named_one() -> None:
    grafted, named = _build("resnet18"), _build("ini_resnet18")
    graft_gates(grafted, GateChoice("fold3x3", fold_width=16))
    assert {k: v.shape for k, v in grafted.state_dict().items()} == {k: v.shape for k, v in named.state_dict().items()}
    grafted.load_state_dict(named.state_dict())
    assert torch.equal(grafted.train()(_images(4)), named.train()(_images(4)))
    with torch.device("meta"):
        deep = timm.create_model("resnet50")
        assert len(graft_gates(deep)) == 16
    assert _parameters(deep) == 28_991_244


@pytest.mark.parametrize("gate", ["se", "fold3x3"])
@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name: str, gate: str) -> None:
    model = _build(name).train()
    blocks = graft_gates(model, gate)
    model(_images(4)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(any(p.grad.any() for p in model.get_submodule(f"{b}.gate").parameters()) for b in blocks)


@pytest.mark.parametrize("name", SMALL)
def test_output_is_residual_times_scale_plus_identity(name: str) -> None:
    """The last gated block, by hooks: what its gate was given, what it answered, what the block made of it."""
    model = _build(name).eval()
    block = model.get_submodule(graft_gates(model, "fold3x3")[-1])
    seen: dict[str, Any] = {}
    block.gate.register_forward_hook(lambda m, i, out: seen.update(residual=i[0].clone(), identity=i[1].clone(), s=out))
    block.register_forward_hook(lambda m, i, out: seen.update(x=i[0].clone(), y=out.clone()))
    model(_images())
    expected = seen["residual"] * seen["s"] + seen["identity"]
    if name in {"resnet18", "regnety_002"}:
        expected = expected.relu()
    torch.testing.assert_close(seen["y"], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(seen["identity"], seen["x"])
    assert not torch.equal(seen["residual"], seen["x"])


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_round_trip_copy_and_low_precision(name: str) -> None:
    model, other = _build(name).eval(), timm.create_model(name, num_classes=4).eval()
    graft_gates(model)
    graft_gates(other)
    assert not torch.equal(model(_images()), other(_images()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(_images()), other(_images()))
    assert torch.equal(copy.deepcopy(model)(_images()), model(_images()))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(_images())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(_images()), rtol=0.1, atol=0.1)


def test_weights_of_the_plain_network_still_fit() -> None:
    plain, grafted = _build("mobilenetv3_small_100"), timm.create_model("mobilenetv3_small_100", num_classes=4)
    blocks = graft_gates(grafted)
    result = grafted.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {key.partition(".gate.")[0] for key in result.missing_keys} == set(blocks)


@pytest.mark.parametrize("name", SMALL)
def test_a_block_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = _build(name).eval()
    block = model.get_submodule(graft_gates(model)[0])
    x = torch.randn(2, next(block.parameters()).shape[1 if name != "convnext_atto" else 0], 6, 6)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)


def test_stochastic_depth_drops_the_gated_residual() -> None:
    model = _build("mobilenetv3_small_100", drop_path_rate=0.9).train()
    block = model.get_submodule(graft_gates(model)[-1])
    x = torch.randn(32, block.bn3.num_features, 4, 4)
    kept = (block(x) != x).flatten(1).any(1)
    assert 0 < kept.sum() < 32


def test_gates_are_where_and_as_the_block_is() -> None:
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_050").to(torch.bfloat16).eval()
        graft_gates(model)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert not any(m.training for m in model.modules())


def test_sizes_are_fitted_to_each_block_unless_they_are_asked_for() -> None:
    def sizes(gate: str | GateChoice) -> list[tuple[int, int]]:
        with torch.device("meta"):
            model = timm.create_model("mobilenetv2_050")
            gates = [model.get_submodule(f"{block}.gate") for block in graft_gates(model, gate)]
        return [(g.fold_width, g.squeeze.out_features) for g in gates]  # type: ignore[misc]

    fitted, asked = sizes("fold3x3"), sizes(GateChoice(reduction=8, fold_width=8))
    assert fitted[0] == (8, 4)  # 16 channels: 4 x 8 of 16 columns would be 2 rows; 16 / 16 units would be one
    assert fitted[-1] == (16, 5)  # 80 channels
    assert asked[0] == (8, 2)
    assert asked[-1] == (8, 10)


def test_no_gate_changes_nothing() -> None:
    model = _build("mobilenetv3_small_100")
    kinds = [type(m) for m in model.modules()]
    assert graft_gates(model, "none") == []
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "densenet121",
            "densenet121 has no residual block that takes a gate; supported: ResNet .*MobileNetV2.*ConvNeXt",
        ),
        ("res2net50_26w_4s", "res2net50_26w_4s has no residual block"),
        (
            "mobilenetv4_hybrid_medium",
            r"block blocks.2.4 of mobilenetv4_hybrid_medium \(MobileAttention\) takes no gate",
        ),
        ("ini_resnet18", "block layer1.0 of ini_resnet18 is made for a gate already; give `gate` to its constructor"),
    ],
)
def test_an_unsupported_network_is_refused_in_one_line(name: str, said: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ConfigError, match=said) as refusal:
        graft_gates(model)
    assert "\n" not in str(refusal.value)
    assert [type(m) for m in model.modules()] == kinds


def test_a_second_graft_is_refused() -> None:
    model = _build("mobilenetv3_small_100")
    graft_gates(model)
    with pytest.raises(ConfigError, match=r"block blocks.1.1 of mobilenetv3_small_100 is made for a gate already"):
        graft_gates(model)


def test_a_size_that_does_not_fit_names_the_block_and_touches_none() -> None:
    model = _build("mobilenetv3_small_100")
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match=r"block blocks.1.1: fold_width 16: 24 channels .*possible: .*8"):
        graft_gates(model, GateChoice("fold3x3", fold_width=16, reduction=8))
    with pytest.raises(ConfigError, match=r"block blocks.1.1: gate 'sw' is not one of none, se"):
        graft_gates(model, "sw")
    assert list(model.state_dict()) == keys
    assert type(model.get_submodule("blocks.1.1")) in GRAFTS


def test_a_gates_size_follows_the_planes_of_a_bottleneck() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnext50_32x4d")
        graft_gates(model)
    alone = make_gate(GateChoice("fold3x3", fold_width=16), 2048, 512)
    assert alone is not None
    assert _parameters(model.layer4[2].gate) == _parameters(alone)
