"""What timm's own model tests ask of every network, asked of every name of ours.

What depends on the whole network runs without memory (meta device); the rest runs with one block a stage and small
images, once for the names that differ in depth only.
"""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters

from ii_dist.config.networks import NETWORKS
from ii_dist.models import MODELS

CLASSES = 5
FAMILIES = list({replace(shape, layers=()): name for name, shape in reversed(NETWORKS.items())}.values())
every_name = pytest.mark.parametrize("name", MODELS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def _short(name: str) -> dict[str, Any]:
    return {"layers": (1,) * len(NETWORKS[name].layers)}


def _build(name: str, **options: Any) -> Any:
    """Blocks that begin with a residual: one of 0 would hide what a gate makes of it."""
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": CLASSES, "zero_init_last": False, **_short(name), **options})


def _side(name: str) -> int:
    return 16 if NETWORKS[name].small_images else 64


def _images(name: str, batch: int = 2, channels: int = 3) -> torch.Tensor:
    side = _side(name)
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


@every_name
def test_default_cfg_describes_the_whole_network(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        cfg = model.default_cfg
        features = model.forward_features(torch.empty(1, *cfg["input_size"]))
        pooled = model.forward_head(features, pre_logits=True)
        logits = model.forward_head(features)
    assert not cfg.get("url")
    assert cfg["architecture"] == name
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert pooled.shape == (1, model.head_hidden_size)
    assert logits.shape == (1, cfg["num_classes"])
    assert model.get_submodule(cfg["first_conv"]).weight.shape[1] == cfg["input_size"][0]
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_classifier(name_only=True) == cfg["classifier"]
    side = 32 if NETWORKS[name].small_images else 224
    assert cfg["input_size"] == (3, side, side)


@every_name
def test_feature_info_of_the_whole_network(name: str) -> None:
    with torch.device("meta"):
        backbone = timm.create_model(name, features_only=True)
        side = backbone.default_cfg["input_size"][-1]
        features = backbone(torch.empty(1, 3, side, side))
    assert [f.shape[1] for f in features] == backbone.feature_info.channels()
    assert [side // f.shape[2] for f in features] == backbone.feature_info.reduction()
    assert len(features) == 1 + len(NETWORKS[name].layers)


@every_family
def test_forward_backward_and_input_channels(name: str) -> None:
    model = _build(name, in_chans=2).train()
    out = model(_images(name, 4, channels=2))
    assert out.shape == (4, CLASSES)
    out.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_family
def test_bf16(name: str) -> None:
    model = _build(name).eval()
    expected = model(_images(name))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(_images(name))
    whole = model.to(torch.bfloat16)(_images(name).bfloat16())
    assert low.dtype == whole.dtype == torch.bfloat16
    for out in (low, whole):
        torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


@every_family
def test_state_dict_round_trip(name: str) -> None:
    model = _build(name).train()
    model(_images(name, 4))  # moves the statistics
    torch.manual_seed(1)
    other = timm.create_model(name, num_classes=CLASSES, **_short(name))
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    assert torch.equal(model.eval()(_images(name)), other.eval()(_images(name)))


@every_family
def test_features_intermediates_and_forward_features_agree(name: str) -> None:
    model, backbone = _build(name).eval(), _build(name, features_only=True).eval()
    images = _images(name)
    features = backbone(images)
    last, taken = model.forward_intermediates(images)
    assert all(torch.equal(a, b) for a, b in zip(features, taken, strict=True))
    assert torch.equal(last, model.forward_features(images))
    if not NETWORKS[name].pre_activation:  # whose last norm stands behind the last stage, as in timm's ResNetV2
        assert torch.equal(taken[-1], last)
    (second,) = model.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(second, taken[1])
    chosen = _build(name, features_only=True, out_indices=(0, 2)).eval()(images)
    assert all(torch.equal(a, taken[i]) for a, i in zip(chosen, (0, 2), strict=True))


@every_family
def test_pruning_keeps_what_was_asked_for(name: str) -> None:
    model = _build(name).eval()
    _, taken = model.forward_intermediates(_images(name))
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert not any(key.startswith(("layer3", "fc", "norm.")) for key in model.state_dict())
    kept = model.forward_intermediates(_images(name), indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, (taken[0], taken[2]), strict=True))
    assert torch.equal(model(_images(name)), taken[2])
    assert model.num_features == taken[2].shape[1]


@every_family
def test_the_classifier_can_be_changed(name: str) -> None:
    model = _build(name).eval()
    images = _images(name)
    features = model.forward_features(images)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), features.mean((2, 3)), rtol=1e-5, atol=1e-5)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    model.reset_classifier(2, "catavgmax")
    assert model.head_hidden_size == 2 * model.num_features
    assert model(images).shape == (2, 2)
    assert _build(name, num_classes=0)(images).shape == (2, model.num_features)


@every_name
@pytest.mark.parametrize("coarse", [False, True])
def test_layer_decay(name: str, coarse: bool) -> None:
    """Every parameter has a layer; a gate has its block's; the order is that of the network."""
    with torch.device("meta"):
        model = timm.create_model(name)
    layer = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(layer) == {n for n, _ in model.named_parameters()}
    stages = NETWORKS[name].layers
    for n in layer:
        if ".gate." in n:
            assert layer[n] == layer[n.partition(".gate.")[0] + ".conv1.weight"], n
    blocks = [f"layer{s + 1}.{b}.conv1.weight" for s, count in enumerate(stages) for b in range(count)]
    order = [layer[model.default_cfg["first_conv"] + ".weight"], *(layer[b] for b in blocks), layer["fc.weight"]]
    assert order == sorted(order)
    assert len(set(order)) == 2 + (len(stages) if coarse else sum(stages))


@every_family
def test_gradient_checkpointing_runs_blocks_twice_and_changes_no_gradient(name: str) -> None:
    grads, runs = [], []
    for checkpointed in (False, True):
        model = _build(name).train()
        model.set_grad_checkpointing(checkpointed)
        calls: list[None] = []
        model.layer2[0].conv1.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        model(_images(name)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        runs.append(len(calls))
    assert runs == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_family
def test_drop_path_and_dropout_act_in_training_only(name: str) -> None:
    model = _build(name, layers=(2,) + (1,) * (len(NETWORKS[name].layers) - 1), drop_path_rate=0.5, drop_rate=0.5)
    images = _images(name, 4)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_the_families_are_all_of_them() -> None:
    assert {"ini_resnet18", "ini_resnet50", "ini_resnet50d", "ini_preresnet164", "ini_wrn16_8"} <= set(FAMILIES)
    assert not {"ini_resnet34", "ini_resnet101", "ini_resnet152d", "ini_wrn28_10"} & set(FAMILIES)


def test_listed_and_without_published_weights() -> None:
    assert sorted(timm.list_models("ini_*")) == sorted(MODELS)
    assert timm.list_models("ini_*", pretrained=True) == []
    assert all(timm.is_model(name) for name in MODELS)


def test_timms_own_lists_are_left_alone() -> None:
    assert not [name for name in timm.list_models(module="resnet") if name.startswith("ini_")]
    assert sorted(timm.list_models(module="named")) == sorted(MODELS)
