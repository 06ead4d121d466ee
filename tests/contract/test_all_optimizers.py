"""Every optimizer of the table against its equations, and its state out of an engine and in again, bit for bit."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ii_dist.config import DataFacts, EngineConfig, OptimConfig, RunConfig, TrainConfig, make_plan
from ii_dist.config.schema import WHOLE_TENSOR_OPTIMIZERS
from ii_dist.engine import EngineParts, EngineState, make_engine
from ii_dist.models.compat import ensure_torchvision
from ii_dist.optim import LAYER_WISE, ON_PIECES, OPTIMIZERS, make_optimizer, set_learning_rate, takes_found_inf
from tests.contract.test_engines import CLASSES, images, network

ensure_torchvision()  # timm's optimizers cannot be imported without

State = dict[str, Tensor]
DECAY, RATES = 0.1, (0.1, 0.2, 0.05)


def adamw(p: Tensor, g: Tensor, state: State, rate: float, decay: float) -> Tensor:
    direction = _moments(g, state, 1e-8)
    return p * (1 - rate * decay) - rate * direction


def lamb(p: Tensor, g: Tensor, state: State, rate: float, decay: float) -> Tensor:
    update = _moments(g, state, 1e-6) + decay * p
    trust = p.norm() / update.norm() if decay and p.norm() > 0 and update.norm() > 0 else torch.ones(())
    return p - rate * trust * update


def lars(p: Tensor, g: Tensor, state: State, rate: float, decay: float) -> Tensor:
    if decay:
        g = (g + decay * p) * (0.001 * p.norm() / (g.norm() + decay * p.norm() + 1e-8))
    state["v"] = 0.9 * state.get("v", torch.zeros_like(g)) + g
    return p - rate * (g + 0.9 * state["v"])


def sgd(p: Tensor, g: Tensor, state: State, rate: float, decay: float) -> Tensor:
    g = g + decay * p
    state["v"] = 0.9 * state.get("v", torch.zeros_like(g)) + g
    return p - rate * (g + 0.9 * state["v"])


def _moments(g: Tensor, state: State, eps: float) -> Tensor:
    """Adam's direction with its bias corrections, betas 0.9 and 0.999."""
    zero = torch.zeros_like(g)
    state["t"] = state.get("t", torch.zeros(())) + 1
    state["m"] = 0.9 * state.get("m", zero) + 0.1 * g
    state["s"] = 0.999 * state.get("s", zero) + 0.001 * g * g
    t = float(state["t"])
    return state["m"] / (1 - 0.9**t) / ((state["s"] / (1 - 0.999**t)).sqrt() + eps)


EQUATIONS: dict[str, Callable[[Tensor, Tensor, State, float, float], Tensor]] = {
    "sgd": sgd,
    "adamw": adamw,
    "lamb": lamb,
    "lars": lars,
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_updates_follow_the_equations(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    optimizer = make_optimizer(model, OptimConfig.model_validate({"optimizer": name, "weight_decay": DECAY}))
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    states: dict[str, State] = {n: {} for n in expected}
    for rate in RATES:
        set_learning_rate(optimizer, rate)
        for n, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            decay = DECAY if n == "0.weight" else 0.0
            expected[n] = EQUATIONS[name](expected[n], p.grad, states[n], rate, decay)
        optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-6, atol=1e-9, msg=lambda text, n=n: f"{n}: {text}")


def test_muon_turns_a_matrix_by_an_almost_orthogonal_step_and_the_rest_by_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16))
    plain = copy.deepcopy(model)
    cfg = OptimConfig.model_validate({"optimizer": "muon", "nesterov": False, "weight_decay": 0.0, "eps": 1e-8})
    optimizer = make_optimizer(model, cfg)
    adam = make_optimizer(plain, cfg.model_copy(update={"optimizer": "adamw"}))
    before = model[0].weight.detach().clone()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    for each in (optimizer, adam):
        set_learning_rate(each, 0.1)
        each.step()
    singular = torch.linalg.svdvals((model[0].weight.detach() - before).flatten(1))
    assert singular.max() / singular.min() < 2  # of the gradient itself: about 3 and no upper limit
    for key in ("weight", "bias"):
        torch.testing.assert_close(getattr(model[1], key), getattr(plain[1], key))


def _parts(optimizer: str) -> EngineParts:
    cfg = RunConfig(
        name="x",
        engine=EngineConfig(device="cpu"),
        optim=OptimConfig.model_validate({"optimizer": optimizer, "lr": 0.02, "warmup_epochs": 1}),
        train=TrainConfig(global_batch=12, epochs=5),
    )
    plan = make_plan(cfg, 1, DataFacts(48, 8, CLASSES))
    return EngineParts(cfg.engine, cfg.optim, plan, torch.device("cpu"), seed=3, image_size=8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_over_bit_for_bit(name: str) -> None:
    through = make_engine(network(), _parts(name))
    for step in range(3):
        through.train_step([images(step)])
    state = through.state()
    saved = EngineState({n: t.clone() for n, t in state.tensors.items()}, dict(state.scalars))
    fresh = make_engine(network(seed=99), _parts(name))
    fresh.load_state(saved)
    for step in range(3, 7):
        one, two = through.train_step([images(step)]), fresh.train_step([images(step)])
        assert all(torch.equal(one[key], two[key]) for key in one)
    first, second = through.state().tensors, fresh.state().tensors
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_non_finite_step_leaves_no_trace(name: str) -> None:
    engine = make_engine(network(), _parts(name))
    engine.train_step([images(0)])
    before = {n: t.clone() for n, t in engine.state().tensors.items() if "num_batches" not in n}
    bad = images(1)
    bad.images_NCHW[0, 0, 0, 0] = float("nan")
    assert engine.train_step([bad])["skipped"].item() == 1
    after = engine.state().tensors
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_lowers_the_loss(name: str) -> None:
    engine = make_engine(network(), _parts(name))
    losses = [float(engine.train_step([images(0)])["loss"]) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_who_can_be_left_out_on_the_device_and_who_needs_whole_tensors() -> None:
    fused = {
        n
        for n in OPTIMIZERS
        if takes_found_inf(make_optimizer(network(), OptimConfig.model_validate({"optimizer": n})))
    }
    assert fused == {"sgd", "adamw"}
    assert set(LAYER_WISE) == set(WHOLE_TENSOR_OPTIMIZERS) | set(ON_PIECES) == set(OPTIMIZERS) - fused


def test_a_layers_own_share_of_the_rate_is_kept() -> None:
    optimizer = make_optimizer(network(), OptimConfig())
    optimizer.param_groups[0]["lr_scale"] = 0.5
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
