"""Every engine does what plain torch does, and its state goes out and in again without a trace."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ii_dist.config import (
    CheckpointError,
    DataFacts,
    EngineConfig,
    OptimConfig,
    Plan,
    RunConfig,
    TrainConfig,
    make_plan,
)
from ii_dist.engine import ENGINES, EngineParts, EngineState, make_engine

CLASSES = 7


@dataclass(frozen=True)
class Images:
    images_NCHW: torch.Tensor
    labels_N: torch.Tensor
    weight_N: torch.Tensor
    partner_labels_N: torch.Tensor | None = None
    label_share_N: torch.Tensor | None = None


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES)
    )


def images(seed: int, count: int = 12) -> Images:
    g = torch.Generator().manual_seed(seed)
    return Images(
        torch.randn(count, 3, 8, 8, generator=g), torch.randint(CLASSES, (count,), generator=g), torch.ones(count)
    )


def parts(*, accumulate: int = 1, engine: dict[str, object] | None = None, **optim: object) -> EngineParts:
    cfg = RunConfig(
        name="x",
        engine=EngineConfig.model_validate({"device": "cpu", **(engine or {})}),
        optim=OptimConfig.model_validate({"lr": 0.2, "lr_reference_batch": 0, "warmup_epochs": 1, **optim}),
        train=TrainConfig(global_batch=12, max_images_per_rank=12 // accumulate, epochs=5),
    )
    plan: Plan = make_plan(cfg, 1, DataFacts(48, 8, CLASSES))
    return EngineParts(cfg.engine, cfg.optim, plan, torch.device("cpu"), seed=3, image_size=8)


def plain_torch(model: nn.Module, steps: int, accumulate: int = 1, clip: float = 0.0) -> list[float]:
    """The same training written out: SGD by the formula, warm-up and cosine by the formula."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    velocity = {p: torch.zeros_like(p) for p in model.parameters()}
    losses = []
    for step in range(steps):
        warm, total = 4, 20
        if step < warm:
            rate = 0.2 * (step + 1) / (warm + 1)
        else:
            rate = 0.2 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warm) / (total - 1 - warm))).item())
        batch = images(step)
        model.zero_grad()
        loss_sum = 0.0
        for x, y in zip(batch.images_NCHW.chunk(accumulate), batch.labels_N.chunk(accumulate), strict=True):
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1, reduction="sum")
            (loss / 12).backward()
            loss_sum += loss.item()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        with torch.no_grad():
            for p in [*decayed, *others]:
                assert p.grad is not None
                gradient = p.grad + (1e-4 * p if p.ndim > 1 else 0.0)
                velocity[p] = 0.9 * velocity[p] + gradient
                p -= rate * (gradient + 0.9 * velocity[p])
        losses.append(loss_sum)
    return losses


def micro(batch: Images, accumulate: int) -> list[Images]:
    chunks = (t.chunk(accumulate) for t in (batch.images_NCHW, batch.labels_N, batch.weight_N))
    return [Images(*three) for three in zip(*chunks, strict=True)]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.0), (2, 0.5)])
def test_trains_like_plain_torch(kind: str, accumulate: int, clip: float) -> None:
    reference = network()
    engine = make_engine(copy.deepcopy(reference), parts(accumulate=accumulate, clip_norm=clip, engine={"kind": kind}))
    mine = [float(engine.train_step(micro(images(step), accumulate))["loss"]) for step in range(9)]
    assert mine == pytest.approx(plain_torch(reference, 9, accumulate, clip), rel=2e-5)
    state = engine.state().tensors
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(state[f"model.{name}"], tensor, rtol=1e-4, atol=1e-5, check_stride=False)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_mixed_images_are_trained_on_the_shares_of_both_labels(kind: str, loss: str) -> None:
    """The same step written out, with soft targets."""
    made_from = parts(accumulate=2, engine={"kind": kind}, loss=loss)
    engine, reference = make_engine(network(), made_from), network()
    share_N = torch.tensor([1.0, 0.7, 0.2, 0.5, 0.9, 0.45]).repeat(2)
    batch = images(0)
    with torch.no_grad():  # what the network says at first: accuracy then tells which of the two labels was asked
        partner_N = torch.cat([network()(half) for half in batch.images_NCHW.chunk(2)]).argmax(1)
    two = [
        Images(batch.images_NCHW[h], batch.labels_N[h], batch.weight_N[h], partner_N[h], share_N[h])
        for h in (slice(0, 6), slice(6, 12))
    ]
    sums = engine.train_step(two)
    hot = F.one_hot(batch.labels_N, CLASSES) * share_N[:, None] + F.one_hot(partner_N, CLASSES) * (1 - share_N[:, None])
    target_NC = 0.9 * hot + 0.1 / CLASSES
    losses, found = [], []
    for h in (slice(0, 6), slice(6, 12)):
        logits_NC = reference(batch.images_NCHW[h])
        found.append(logits_NC)
        each = F.cross_entropy if loss == "cross_entropy" else F.binary_cross_entropy_with_logits
        losses.append(each(logits_NC, target_NC[h]) * 6)
        (losses[-1] / 12).backward()
    assert sums["loss"].item() == pytest.approx(sum(losses).item(), rel=1e-5)  # type: ignore[union-attr]
    main_N = torch.where(share_N >= 0.5, batch.labels_N, partner_N)
    assert sums["top1"].item() == (torch.cat(found).argmax(1) == main_N).sum().item()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]))
    assert sums["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("engine_keys", [{}, {"ema_half_life_epochs": 0.5}, {"channels_last": False}])
def test_state_goes_over_bit_for_bit(kind: str, engine_keys: dict[str, object]) -> None:
    made_from = parts(engine={"kind": kind, **engine_keys})
    through = make_engine(network(), made_from)
    for step in range(3):
        through.train_step([images(step)])
    saved = EngineState({n: t.clone() for n, t in through.state().tensors.items()}, dict(through.state().scalars))
    fresh = make_engine(network(seed=99), made_from)
    fresh.load_state(saved)
    assert fresh.step == 3
    for step in range(3, 8):
        one, two = through.train_step([images(step)]), fresh.train_step([images(step)])
        assert all(torch.equal(one[key], two[key]) for key in one)
    first, second = through.state(), fresh.state()
    assert first.tensors.keys() == second.tensors.keys()
    assert any(name.startswith("optimizer.") for name in first.tensors)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    assert first.scalars == second.scalars


@pytest.mark.parametrize("kind", ENGINES)
def test_a_non_finite_step_leaves_no_trace_but_its_count(kind: str) -> None:
    engine = make_engine(network(), parts(engine={"kind": kind}))
    engine.train_step([images(0)])
    before = {n: t.clone() for n, t in engine.state().tensors.items() if "num_batches" not in n}
    bad = images(1)
    bad.images_NCHW[0, 0, 0, 0] = float("nan")
    for count in (1, 2):
        sums = engine.train_step([bad])
        assert sums["skipped"].item() == 1
        assert sums["skipped_in_row"].item() == count
    after = engine.state().tensors
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert engine.step == 3
    good = engine.train_step([images(2)])
    assert good["skipped"].item() == good["skipped_in_row"].item() == 0
    assert all(torch.isfinite(t).all() for t in engine.state().tensors.values())


@pytest.mark.parametrize("kind", ENGINES)
def test_evaluation_counts_weights_and_changes_nothing(kind: str) -> None:
    engine = make_engine(network(), parts(engine={"kind": kind}))
    engine.train_step([images(0)])
    before = {n: t.clone() for n, t in engine.state().tensors.items()}
    batch = images(5)
    weighted = Images(batch.images_NCHW, batch.labels_N, torch.tensor([1.0] * 8 + [0.0] * 4))
    engine.begin_eval()
    sums = engine.eval_step(weighted)
    model = network()
    model.load_state_dict({n.removeprefix("model."): t for n, t in before.items() if n.startswith("model.")})
    with torch.no_grad():
        logits = model.eval()(batch.images_NCHW[:8])
    assert sums["images"].item() == 8
    assert sums["top1"].item() == (logits.argmax(1) == batch.labels_N[:8]).sum().item()
    ranks = (logits > logits.gather(1, batch.labels_N[:8, None])).sum(1)
    assert sums["top5"].item() == (ranks < 5).sum().item()
    assert sums["loss"].item() == pytest.approx(F.cross_entropy(logits, batch.labels_N[:8], reduction="sum").item())
    assert all(torch.equal(t, before[n]) for n, t in engine.state().tensors.items())


@pytest.mark.parametrize("kind", ENGINES)
def test_average_follows_its_half_life(kind: str) -> None:
    engine = make_engine(network(), parts(engine={"kind": kind, "ema_half_life_epochs": 0.5}))
    decay = 0.5 ** (1 / 2)  # four steps an epoch, half an epoch to half the weight
    expected = network().state_dict()["4.weight"].clone()
    for step in range(4):
        engine.train_step([images(step)])
        expected = decay * expected + (1 - decay) * engine.state().tensors["model.4.weight"]
    torch.testing.assert_close(engine.state().tensors["ema.4.weight"], expected)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_state_of_another_network_is_refused_in_one_line(kind: str) -> None:
    engine = make_engine(network(), parts(engine={"kind": kind}))
    state = engine.state()
    less = EngineState({n: t for n, t in state.tensors.items() if n != "model.4.bias"}, state.scalars)
    other = EngineState(state.tensors | {"model.4.bias": torch.zeros(3)}, state.scalars)
    more = EngineState(state.tensors | {"model.5.bias": torch.zeros(3)}, state.scalars)
    for wrong, part in ((less, "no tensor model.4.bias"), (other, "model.4.bias has shape"), (more, "model.5.bias")):
        with pytest.raises(CheckpointError, match=rf"checkpoint of another model: .*{part}") as caught:
            engine.load_state(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ENGINES)
def test_images_of_the_computed_type_are_what_the_first_layer_would_make_of_them(kind: str) -> None:
    engines = [make_engine(network(), parts(engine={"kind": kind, "precision": "bf16"})) for _ in range(2)]
    for step in range(2):
        exact = images(step)
        rounded = Images(exact.images_NCHW.bfloat16(), exact.labels_N, exact.weight_N)
        one, two = engines[0].train_step([exact]), engines[1].train_step([rounded])
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert engines[0].eval_step(exact)["loss"] == engines[1].eval_step(rounded)["loss"]


@pytest.mark.parametrize("kind", ENGINES)
def test_bf16_autocast_keeps_the_weights_in_float32(kind: str) -> None:
    engine = make_engine(network(), parts(engine={"kind": kind, "precision": "bf16"}))
    exact = make_engine(network(), parts(engine={"kind": kind}))
    for step in range(3):
        low, high = engine.train_step([images(step)])["loss"].item(), exact.train_step([images(step)])["loss"].item()
        assert low == pytest.approx(high, rel=0.05)
        assert low != high
    assert {t.dtype for t in engine.state().tensors.values() if t.is_floating_point()} == {torch.float32}
