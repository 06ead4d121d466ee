"""Our names behave in timm as timm's own."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import BlurPool2d
from torch import nn

from ii_dist.models import GATES

NARROW: dict[str, Any] = {"layers": (1, 1, 1, 1), "zero_init_last": False}


def _images(side: int = 64, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def _build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def test_pretrained_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"[Nn]o pretrained weights"):
        _build("ini_resnet18", pretrained=True)


@pytest.mark.parametrize("gate", GATES)
def test_input_channels_and_classes(gate: str) -> None:
    model = _build("ini_resnet50", gate=gate, num_classes=5, in_chans=1, **NARROW)
    assert model(_images(channels=1)).shape == (2, 5)


@pytest.mark.parametrize("name", ["ini_resnet50", "ini_resnet20"])
@pytest.mark.parametrize("gate", GATES)
def test_features_only_agrees_with_forward_features(name: str, gate: str) -> None:
    options = {} if name == "ini_resnet20" else NARROW
    model = _build(name, gate=gate, **options).eval()
    backbone = _build(name, gate=gate, features_only=True, **options).eval()
    features = backbone(_images())
    assert backbone.feature_info.channels() == [f.shape[1] for f in features]
    assert backbone.feature_info.reduction() == [64 // f.shape[2] for f in features]
    torch.testing.assert_close(features[-1], model.forward_features(_images()))
    chosen = _build(name, gate=gate, features_only=True, out_indices=(1, 3), **options)
    assert [f.shape for f in chosen(_images())] == [features[1].shape, features[3].shape]


OPTIONS: dict[str, dict[str, Any]] = {
    "d": {"stem_type": "deep", "stem_width": 32, "avg_down": True},
    "tiered stem, convolution for pool": {"stem_type": "deep_tiered", "stem_width": 32, "replace_stem_pool": True},
    "resnext": {"cardinality": 8, "base_width": 4},
    "wide": {"base_width": 128},
    "anti-aliased": {"aa_layer": BlurPool2d},
    "drop path": {"drop_path_rate": 0.5},
    "drop block": {"drop_block_rate": 0.1},
    "attention beside": {"block_args": {"attn_layer": "eca"}},
    "senet": {"block_reduce_first": 2, "down_kernel_size": 3},
    "dilated": {"output_stride": 8},
    "activation": {"act_layer": "silu"},
    "dropout": {"drop_rate": 0.3},
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("option", OPTIONS)
def test_timms_options_work_with_every_gate(option: str, gate: str) -> None:
    options = {**NARROW, "num_classes": 3, **OPTIONS[option]}
    model, plain = _build("ini_resnet50", gate=gate, **options), _build("resnet50", **options)
    ours = {k: v.shape for k, v in model.state_dict().items() if ".gate." not in k}
    assert ours == {k: v.shape for k, v in plain.state_dict().items()}
    torch.manual_seed(1)
    out = model(_images(32))
    if gate == "none":
        torch.manual_seed(1)
        assert torch.equal(out, plain(_images(32)))
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_drop_path_draws_as_timm_does() -> None:
    """The gate multiplies by 1 here, so both networks must drop the same samples and give the same numbers."""

    class One(nn.Module):
        def forward(self, residual: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
            return residual.new_ones(residual.shape[0], residual.shape[1], 1, 1)

    options = {"drop_path_rate": 0.5, "zero_init_last": False, "num_classes": 3}
    ours, plain = _build("ini_resnet18", gate="none", **options), _build("resnet18", **options)
    for module in ours.modules():
        if hasattr(module, "gate"):
            module.gate = One()
    outputs = []
    for model in (ours, plain):
        torch.manual_seed(3)
        outputs.append(model.train()(_images(batch=8)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_gradient_checkpointing_changes_no_gradient(gate: str) -> None:
    grads = []
    for checkpointed in (False, True):
        model = _build("ini_resnet20", gate=gate, zero_init_last=False)
        model.set_grad_checkpointing(checkpointed)
        model(_images(32)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("gate", GATES)
def test_compiles_to_one_graph(gate: str) -> None:
    torch._dynamo.reset()
    model = _build("ini_resnet20", gate=gate, layers=(1, 1, 1), zero_init_last=False).eval()
    expected = model(_images(32))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(_images(32)), expected, rtol=1e-4, atol=1e-4)
    model.train()
    images = _images(32)
    compiled(images).square().sum().backward()
    from_graph = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(images).square().sum().backward()
    for a, b in zip(from_graph, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gate", GATES)
def test_autocast_and_channels_last(gate: str) -> None:
    model = _build("ini_resnet50", gate=gate, num_classes=3, **NARROW).eval()
    expected = model(_images())
    model.to(memory_format=torch.channels_last)
    images = _images().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    assert model.forward_features(images).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1)


def test_synchronized_norms_can_replace_the_lens_norm() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(_build("ini_resnet20", gate="fold3x3"))
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())
    assert model.eval()(_images(32)).shape == (2, 10)
