"""A lens of one tap whose filters start with balanced signs: nothing comes through, and nothing is ever learned."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ii_dist.models.gates import make_gate

CHANNELS, FILTERS = 32, 4


def _gate(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return make_gate("pair1x1", CHANNELS, CHANNELS, reduction=4, lens_filters=FILTERS, **options)


def _signs(gate: Any, signs: list[float]) -> Any:
    """The same filters with these signs; the authors' start gives each sign with the same probability."""
    with torch.no_grad():
        gate.lens.conv.weight.copy_(gate.lens.conv.weight.abs() * torch.tensor(signs)[:, None, None, None])
    return gate


def _maps() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(64, CHANNELS, 1, 1), torch.rand(64, CHANNELS, 1, 1) * 2


def _train(gate: Any, steps: int = 250) -> tuple[float, float, float]:
    """Loss at the start and at the end of learning factors that follow one signal; gradient norm at the start."""
    residual, identity = _maps()
    target = torch.sigmoid(2 * residual[:, :1, 0, 0]).expand(-1, CHANNELS)
    optimizer = torch.optim.SGD(gate.parameters(), lr=1.5)
    losses, first_norm = [], 0.0
    for step in range(steps):
        optimizer.zero_grad()
        loss = (gate(residual, identity)[:, :, 0, 0] - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            first_norm = float(nn.utils.get_total_norm([p.grad for p in gate.parameters() if p.grad is not None]))
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1], first_norm


@pytest.mark.parametrize("form", ["one_filter", "plain"])
def test_balanced_signs_are_dead(form: str) -> None:
    gate = _signs(_gate(gate_init="authors", lens=form), [1, -1, 1, -1])
    factors = gate(*_maps())
    torch.testing.assert_close(factors, torch.full_like(factors, 0.5), rtol=0, atol=1e-3)
    first, last, norm = _train(gate)
    assert norm < 2e-3
    assert last > 0.99 * first


@pytest.mark.parametrize("form", ["one_filter", "plain"])
def test_filters_that_cancel_to_the_last_digit_have_no_gradient_at_all(form: str) -> None:
    gate = _gate(gate_init="authors", lens=form)
    with torch.no_grad():
        gate.lens.conv.weight.fill_(0.5)
    first, last, norm = _train(_signs(gate, [1, -1, 1, -1]))
    assert norm == 0
    assert last == first


@pytest.mark.parametrize("form", ["one_filter", "plain"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_start_lives(seed: int, form: str) -> None:
    first, last, norm = _train(_gate(seed, lens=form))
    assert norm > 2e-2
    assert last < 0.7 * first


def test_the_authors_start_is_dead_as_often_as_signs_balance() -> None:
    """Four filters: 6 of 16 patterns of signs."""
    dead = sum(int(_gate(seed, gate_init="authors").lens.conv.weight.sign().sum() == 0) for seed in range(600))
    assert dead / 600 == pytest.approx(6 / 16, abs=0.07)


def test_only_a_lens_of_one_tap_starts_positive() -> None:
    def start(name: str, **options: Any) -> Tensor:
        torch.manual_seed(0)
        gate: Any = make_gate(name, 64, 1024, fold_width=8, **options)
        weight: Tensor = gate.lens.conv.weight.detach()
        return weight

    assert start("pair1x1").min() > 0
    assert start("fold3x3", lens_kernel=1).min() > 0
    assert torch.equal(start("pair1x1"), start("pair1x1", gate_init="authors").abs())
    for name in ("pair2x1", "fold3x3"):
        assert start(name).min() < 0
        assert torch.equal(start(name), start(name, gate_init="authors"))


@pytest.mark.parametrize(("init", "positive"), [("cured", True), ("authors", False)])
def test_the_start_survives_the_network_around_it(init: str, positive: bool) -> None:
    """timm draws every convolution of a network again; a gate's keep what the gate gave them."""
    for name in ("ini_resnet20", "ini_resnet18", "ini_preresnet110"):
        model = timm.create_model(name, gate="pair1x1", lens_filters=4, gate_init=init)
        weights = torch.cat([m.lens.conv.weight.flatten() for n, m in model.named_modules() if n.endswith(".gate")])
        assert bool((weights > 0).all()) is positive
