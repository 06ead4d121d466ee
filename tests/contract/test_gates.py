"""What every gate of the table must do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ii_dist.models import fuse_lenses
from ii_dist.models.gates import GATES, make_gate

SIZES = [(64, 64), (64, 256), (48, 48)]  # (planes, channels)
# Every row of the table, and rows with options that change what is computed.
VARIANTS: dict[str, dict[str, Any]] = {
    "fold3x3 groups": {"fold_layout": "groups", "fold_width": 4},
    "fold3x3 plain": {"lens": "plain"},
    "pair1x1 plain": {"lens": "plain"},
}
REAL_GATES = [name for name in GATES if name != "none"] + list(VARIANTS)


def _gate(name: str, planes: int = 64, channels: int = 64) -> nn.Module:
    torch.manual_seed(1)
    gate = make_gate(name.split()[0], channels, planes, **{"fold_width": 8, **VARIANTS.get(name, {})})
    assert gate is not None
    return gate


def _maps(channels: int = 64, batch: int = 4, **options: object) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    residual, identity = torch.randn(2, batch, channels, 5, 6, **options).unbind()  # type: ignore[call-overload]
    return residual, identity.abs()


def test_none_is_no_module() -> None:
    assert make_gate("none", 64, 64) is None


@pytest.mark.parametrize("name", REAL_GATES)
@pytest.mark.parametrize(("planes", "channels"), SIZES)
def test_shape_and_range(name: str, planes: int, channels: int) -> None:
    scale = _gate(name, planes, channels)(*_maps(channels))
    assert scale.shape == (4, channels, 1, 1)
    assert scale.min() > 0
    assert scale.max() < 1


@pytest.mark.parametrize("name", REAL_GATES)
@pytest.mark.parametrize("training", [True, False])
def test_samples_and_channels_get_factors_of_their_own(name: str, training: bool) -> None:
    scale = _gate(name).train(training)(*_maps())[:, :, 0, 0]
    assert scale.std(0).min() > 0
    assert scale.std(1).min() > 0


@pytest.mark.parametrize("name", REAL_GATES)
@pytest.mark.parametrize(("planes", "channels"), SIZES)
def test_gradients_reach_every_parameter_and_the_residual(name: str, planes: int, channels: int) -> None:
    gate = _gate(name, planes, channels)
    residual, identity = _maps(channels, batch=8)
    residual.requires_grad_()
    (gate(residual, identity) * torch.randn(8, channels, 1, 1)).sum().backward()
    assert residual.grad is not None
    assert residual.grad.abs().sum() > 0
    for parameter_name, parameter in gate.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", REAL_GATES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_exact(name: str, training: bool) -> None:
    gate = _gate(name, 16, 16).double().train(training)
    residual, identity = (x[..., :1, :2].clone() for x in _maps(16, batch=2, dtype=torch.float64))
    inputs = (residual.requires_grad_(), identity.requires_grad_())
    assert torch.autograd.gradcheck(gate, inputs)


@pytest.mark.parametrize("name", REAL_GATES)
def test_state_dict_round_trip(name: str) -> None:
    one, other = _gate(name), _gate(name)
    with torch.no_grad():
        for tensor in (*one.parameters(), *one.buffers()):
            tensor.add_(1)
    maps = _maps()
    one(*maps)  # moves running statistics, where there are any
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one.eval()(*maps), other.eval()(*maps))


@pytest.mark.parametrize("name", REAL_GATES)
def test_both_memory_formats_give_the_same_and_gradients_keep_theirs(name: str) -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        gate = _gate(name).to(memory_format=memory_format)  # type: ignore[call-overload]
        residual, identity = (x.contiguous(memory_format=memory_format).requires_grad_() for x in _maps())
        out = residual * gate(residual, identity)
        assert out.is_contiguous(memory_format=memory_format)
        out.square().sum().backward()
        assert residual.grad is not None
        assert residual.grad.is_contiguous(memory_format=memory_format)
        results.append((out, residual.grad))
    for plain, last in zip(*results, strict=True):
        torch.testing.assert_close(plain, last.contiguous(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REAL_GATES)
def test_under_autocast_the_factors_have_the_dtype_of_the_maps(name: str) -> None:
    gate = _gate(name)
    residual, identity = _maps()
    exact = gate(residual, identity)
    with torch.autocast("cpu", torch.bfloat16):
        scale = gate(residual.bfloat16(), identity.bfloat16())
    assert scale.dtype == torch.bfloat16
    torch.testing.assert_close(scale.float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", REAL_GATES)
def test_a_whole_gate_in_half_precision(name: str) -> None:
    scale = _gate(name).bfloat16()(*(x.bfloat16() for x in _maps()))
    assert scale.dtype == torch.bfloat16
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("name", REAL_GATES)
def test_a_map_of_one_pixel(name: str) -> None:
    gate = _gate(name)
    residual, identity = torch.randn(2, 3, 64, 1, 1).unbind()
    assert gate(residual, identity).shape == (3, 64, 1, 1)


@pytest.mark.parametrize("name", REAL_GATES)
def test_built_on_meta(name: str) -> None:
    with torch.device("meta"):
        gate = _gate(name, 512, 2048)
        assert gate(*_maps(2048)).shape == (4, 2048, 1, 1)
    assert {p.device.type for p in gate.parameters()} == {"meta"}


@pytest.mark.parametrize("name", REAL_GATES)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole_it_gives_the_same(name: str, training: bool) -> None:
    gate, eager = _gate(name).train(training), _gate(name).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(gate, backend="aot_eager", fullgraph=True)
    results = []
    for call in (compiled, eager):
        residual, identity = (x.requires_grad_() for x in _maps())
        scale = call(residual, identity)
        scale.square().sum().backward()
        results.append((scale, residual.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REAL_GATES)
def test_fused_it_gives_the_same(name: str) -> None:
    gate = _gate(name)
    maps = _maps()
    gate(*maps)
    expected = gate.eval()(*maps)
    fuse_lenses(gate)
    torch.testing.assert_close(gate(*maps), expected, rtol=0, atol=1e-6)
