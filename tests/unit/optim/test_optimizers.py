"""SGD against its equations, its state, and how it is left out or set."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import ModelConfig, OptimConfig
from ii_dist.models import create_model
from ii_dist.optim import OPTIMIZERS, make_optimizer, param_groups, set_learning_rate


def _model(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(ModelConfig(network="ini_resnet20", gate="fold3x3", fold_width=8), num_classes=10)
    return model.to(memory_format=memory_format)  # type: ignore[call-overload,no-any-return]


def _backwards(model: nn.Module, steps: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        model.zero_grad()
        model(torch.randn(4, 3, 32, 32, generator=generator)).square().mean().backward()
        yield step


@pytest.mark.parametrize("nesterov", [True, False])
def test_updates_follow_the_equations(nesterov: bool) -> None:
    cfg = OptimConfig(momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    optimizer = make_optimizer(model, cfg)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    speed = {n: torch.zeros_like(p) for n, p in expected.items()}
    for rate in (0.1, 0.2, 0.05):
        set_learning_rate(optimizer, rate)
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            push = p.grad + (0.1 if name == "0.weight" else 0.0) * expected[name]
            speed[name] = 0.9 * speed[name] + push
            expected[name] = expected[name] - rate * (push + 0.9 * speed[name] if nesterov else speed[name])
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_real_network_trains_as_with_torchs_plain_loop(memory_format: torch.memory_format) -> None:
    """Also finds a gradient or momentum that lies in memory otherwise than its parameter."""
    cfg = OptimConfig(weight_decay=1e-3)
    ours, plain = _model(memory_format), _model(memory_format)
    pairs = [
        (ours, make_optimizer(ours, cfg)),
        (plain, torch.optim.SGD(param_groups(plain, 1e-3), lr=0.1, momentum=0.9, nesterov=True, foreach=False)),
    ]
    for model, optimizer in pairs:
        for _ in _backwards(model, 3):
            assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_the_same_steps_give_the_same_bits() -> None:
    finals = []
    for _ in range(2):
        model = _model(torch.channels_last)
        optimizer = make_optimizer(model, OptimConfig())
        for _ in _backwards(model, 3):
            optimizer.step()
        finals.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    threads, finals = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            model = nn.Linear(1001, 333)
            optimizer = make_optimizer(model, OptimConfig())
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.randn(p.shape)
                optimizer.step()
            finals.append(model.weight.detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(finals[0], finals[2])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_momentum_is_there_from_the_start_and_lies_like_its_parameter(memory_format: torch.memory_format) -> None:
    model = _model(memory_format)
    optimizer = make_optimizer(model, OptimConfig())
    for p in model.parameters():
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.stride() == p.stride()
        assert not buffer.any()
        assert not buffer.requires_grad
    without = make_optimizer(model, OptimConfig(momentum=0.0, nesterov=False))
    assert not without.state


def test_a_first_update_left_out_by_found_inf_leaves_no_trace() -> None:
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1))
    start = model.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(model.weight, start)
    assert not any(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    decayed = 1 + 1e-4 * start
    torch.testing.assert_close(model.weight.detach(), start - 0.1 * 1.9 * decayed)


def test_names_are_kept_beside_the_parameters() -> None:
    model = _model()
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3))
    named = {n: p for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    assert named.keys() == dict(model.named_parameters()).keys()
    assert all(named[n] is p for n, p in model.named_parameters())
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]


def test_the_rate_is_a_host_number_in_every_group() -> None:
    optimizer = make_optimizer(_model(), OptimConfig())
    set_learning_rate(optimizer, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
    assert all(type(g["lr"]) is float for g in optimizer.param_groups)


def test_unknown_optimizer_names_the_table() -> None:
    with pytest.raises(ConfigError, match=f"'adagrad' is not one of {', '.join(OPTIMIZERS)}"):
        make_optimizer(nn.Linear(1, 1), OptimConfig.model_construct(optimizer="adagrad"))


def test_the_table_holds_what_a_config_may_say() -> None:
    assert tuple(OPTIMIZERS) == OptimConfig.model_fields["optimizer"].annotation.__args__  # type: ignore[union-attr]
