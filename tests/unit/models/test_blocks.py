"""A block is act(residual * scale + identity), in timm's order of things."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ii_dist.models.blocks import GatedBasicBlock, GatedBottleneck, _ScaleAdd
from ii_dist.models.compat import BasicBlock, Bottleneck
from ii_dist.models.gates import GateChoice

Block = GatedBasicBlock | GatedBottleneck


def _block(kind: type[Block], gate: str = "fold3x3", **options: Any) -> Any:
    torch.manual_seed(0)
    planes = 32
    inplanes = planes * kind.expansion
    return kind(inplanes, planes, gate=GateChoice(gate, reduction=8, fold_width=8), **options).train()


def _branches(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output of the block, and what its last norm and its identity path gave on the way."""
    seen: dict[str, Tensor] = {"identity": x}
    last_norm = block.bn3 if isinstance(block, GatedBottleneck) else block.bn2
    hooks = [last_norm.register_forward_hook(lambda m, i, out: seen.update(residual=out.clone()))]
    if block.downsample is not None:
        hooks.append(block.downsample.register_forward_hook(lambda m, i, out: seen.update(identity=out.clone())))
    y = block(x)
    for hook in hooks:
        hook.remove()
    return y, seen["residual"], seen["identity"]


@pytest.mark.parametrize("kind", [GatedBasicBlock, GatedBottleneck])
@pytest.mark.parametrize("gate", ["se", "fold3x3"])
@pytest.mark.parametrize("projected", [False, True])
def test_output_is_the_equation(kind: type[Block], gate: str, projected: bool) -> None:
    channels = 32 * kind.expansion
    project = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
    block = _block(kind, gate, downsample=project if projected else None)
    x = torch.randn(2, channels, 6, 6)
    y, residual, identity = _branches(block, x.clone())
    scale = block.gate(residual, identity)
    torch.testing.assert_close(y, torch.relu(residual * scale + identity), rtol=1e-6, atol=1e-6)
    assert projected == (not torch.equal(identity, x))


@pytest.mark.parametrize("kind", [GatedBasicBlock, GatedBottleneck])
def test_drop_path_drops_the_gated_residual_of_whole_samples(kind: type[Block]) -> None:
    class DropOdd(nn.Module):
        """Stands for a drawn mask: keeps even samples, scaled up."""

        def forward(self, x: Tensor) -> Tensor:
            kept = (torch.arange(len(x)) % 2 == 0).to(x.dtype) * 2
            return x * kept[:, None, None, None]

    block = _block(kind, drop_path=DropOdd())
    x = torch.randn(4, 32 * kind.expansion, 6, 6)
    y, residual, identity = _branches(block, x.clone())
    expected = torch.relu(DropOdd()(residual * block.gate(residual, identity)) + identity)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(y[1], torch.relu(x[1]))


@pytest.mark.parametrize(("kind", "timms"), [(GatedBasicBlock, BasicBlock), (GatedBottleneck, Bottleneck)])
def test_without_a_gate_a_block_is_timms_bit_for_bit(kind: type[Block], timms: Any) -> None:
    ours = _block(kind, "none")
    torch.manual_seed(0)
    theirs = timms(32 * kind.expansion, 32).train()
    x = torch.randn(2, 32 * kind.expansion, 6, 6)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(dict(ours.named_modules())) == list(dict(theirs.named_modules()))
    assert torch.equal(ours(x.clone()), theirs(x.clone()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_goes_through_forward_and_backward(memory_format: torch.memory_format) -> None:
    block = _block(GatedBottleneck).to(memory_format=memory_format)
    x = torch.randn(2, 128, 6, 6).contiguous(memory_format=memory_format).requires_grad_()
    y = block(x)
    assert y.is_contiguous(memory_format=memory_format)
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=memory_format)


def test_scale_add_has_exact_gradients() -> None:
    shapes = ((2, 3, 4, 5), (2, 3, 1, 1), (2, 3, 4, 5))
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(_ScaleAdd.apply, inputs)
    assert torch.autograd.gradgradcheck(_ScaleAdd.apply, inputs)


def test_a_block_made_for_a_device_and_dtype_has_its_gate_there() -> None:
    block = _block(GatedBasicBlock, device=torch.device("meta"), dtype=torch.bfloat16)
    assert {p.device.type for p in block.parameters()} == {"meta"}
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
