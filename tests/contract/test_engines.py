"""Every engine does what plain torch does, and its state goes out and in again without a trace."""

import copy
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ii_dist.config import (
    CheckpointError,
    ClusterError,
    DataFacts,
    EngineConfig,
    OptimConfig,
    Plan,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
    make_plan,
)
from ii_dist.engine import ENGINES, Engine, EngineParts, EngineState
from ii_dist.engine import make_engine as make_engine_of_kind
from ii_dist.models.compat import ensure_torchvision

ensure_torchvision()  # timm's optimizers cannot be imported without

CLASSES = 7
ROWS: dict[str, dict[str, object]] = {
    "ddp": {"kind": "ddp"},
    "canonical": {"kind": "canonical"},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
    **{f"zero{s}-offload": {"kind": "deepspeed", "zero_stage": s, "offload_optimizer": True} for s in (1, 2, 3)},
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
MakeEngine = Callable[[nn.Module, EngineParts], Engine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    """Engines that are closed after the test; whatever DeepSpeed might compile would land in a folder that we see."""
    before = dict(os.environ)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "compiled")
    engines: list[Engine] = []

    def make(model: nn.Module, made_from: EngineParts) -> Engine:
        engines.append(make_engine_of_kind(model, made_from))
        return engines[-1]

    yield make
    while engines:
        engines.pop().close()
    os.environ.clear()
    os.environ.update(before)  # DeepSpeed is told some things by environment variables
    assert not (tmp_path / "compiled").exists()


def test_every_kind_has_rows() -> None:
    assert {row["kind"] for row in ROWS.values()} == set(ENGINES)


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
    row = {"device": "cpu", **(engine or {})}
    canonical = row["kind"] == "canonical" if "kind" in row else False
    cfg = RunConfig(
        name="x",
        engine=EngineConfig.model_validate(row | ({"kind": "ddp"} if canonical else {})),
        runtime=RuntimeConfig(canonical_shards=accumulate if canonical else 0),
        optim=OptimConfig.model_validate({"lr": 0.2, "lr_reference_batch": 0, "warmup_epochs": 1, **optim}),
        train=TrainConfig(global_batch=12, max_images_per_rank=12 // accumulate, epochs=5),
    )
    plan: Plan = make_plan(cfg, 1, DataFacts(48, 8, CLASSES))
    return EngineParts(cfg.engine, cfg.optim, plan, torch.device("cpu"), seed=3, image_size=8)


def plain_torch(
    model: nn.Module, steps: int, accumulate: int = 1, clip: float = 0.0, mean_statistics: bool = False
) -> list[float]:
    """The same training written out: SGD by the formula, warm-up and cosine by the formula.

    mean_statistics: micro-batches move the running statistics from one place, and the mean of where they get to counts.
    """
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
        before, reached = {n: b.clone() for n, b in model.named_buffers()}, []
        for x, y in zip(batch.images_NCHW.chunk(accumulate), batch.labels_N.chunk(accumulate), strict=True):
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1, reduction="sum")
            (loss / 12).backward()
            loss_sum += loss.item()
            if mean_statistics:
                reached.append({n: b.clone() for n, b in model.named_buffers()})
                model.load_state_dict(before, strict=False)
        if mean_statistics:
            means = {n: torch.stack([each[n] for each in reached]).float().mean(0).to(b) for n, b in before.items()}
            model.load_state_dict(means, strict=False)
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


@every_row
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.0), (2, 0.5)])
def test_trains_like_plain_torch(make_engine: MakeEngine, row: dict[str, object], accumulate: int, clip: float) -> None:
    reference = network()
    engine = make_engine(copy.deepcopy(reference), parts(accumulate=accumulate, clip_norm=clip, engine=row))
    mine = [float(engine.train_step(micro(images(step), accumulate))["loss"]) for step in range(9)]
    canonical = row["kind"] == "canonical"
    assert mine == pytest.approx(plain_torch(reference, 9, accumulate, clip, canonical), rel=2e-5)
    state = engine.state().whole()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(state[f"model.{name}"], tensor, rtol=1e-4, atol=1e-5, check_stride=False)


@every_row
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_mixed_images_are_trained_on_the_shares_of_both_labels(
    make_engine: MakeEngine, row: dict[str, object], loss: str
) -> None:
    """The same step written out, with soft targets."""
    made_from = parts(accumulate=2, engine=row, loss=loss)
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


@every_row
@pytest.mark.parametrize("engine_keys", [{}, {"ema_half_life_epochs": 0.5}, {"channels_last": False}])
def test_state_goes_over_bit_for_bit(
    make_engine: MakeEngine, row: dict[str, object], engine_keys: dict[str, object]
) -> None:
    made_from = parts(engine={**row, **engine_keys})
    through = make_engine(network(), made_from)
    for step in range(3):
        through.train_step([images(step)])
    saved = EngineState(through.state().whole(), dict(through.state().scalars))
    fresh = make_engine(network(seed=99), made_from)
    fresh.load_state(saved)
    assert fresh.step == 3
    for step in range(3, 8):
        one, two = through.train_step([images(step)]), fresh.train_step([images(step)])
        assert all(torch.equal(one[key], two[key]) for key in one)
    first, second = through.state().whole(), fresh.state().whole()
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer.") for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert through.state().scalars == fresh.state().scalars


@every_row
def test_a_non_finite_step_leaves_no_trace_but_its_count(make_engine: MakeEngine, row: dict[str, object]) -> None:
    engine = make_engine(network(), parts(engine=row))
    engine.train_step([images(0)])
    before = {n: t for n, t in engine.state().whole().items() if "num_batches" not in n}
    bad = images(1)
    bad.images_NCHW[0, 0, 0, 0] = float("nan")
    for count in (1, 2):
        sums = engine.train_step([bad])
        assert sums["skipped"].item() == 1
        assert sums["skipped_in_row"].item() == count
    after = engine.state().whole()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert engine.step == 3
    good = engine.train_step([images(2)])
    assert good["skipped"].item() == good["skipped_in_row"].item() == 0
    assert all(torch.isfinite(t).all() for t in engine.state().whole().values())


@every_row
def test_evaluation_counts_weights_and_changes_nothing(make_engine: MakeEngine, row: dict[str, object]) -> None:
    engine = make_engine(network(), parts(engine=row))
    engine.train_step([images(0)])
    before = engine.state().whole()
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
    assert all(torch.equal(t, before[n]) for n, t in engine.state().whole().items())


@every_row
def test_average_follows_its_half_life(make_engine: MakeEngine, row: dict[str, object]) -> None:
    engine = make_engine(network(), parts(engine={**row, "ema_half_life_epochs": 0.5}))
    decay = 0.5 ** (1 / 2)  # four steps an epoch, half an epoch to half the weight
    names = ("4.weight", "1.running_var")
    expected = {name: network().state_dict()[name].clone() for name in names}
    for step in range(4):
        engine.train_step([images(step)])
        now = engine.state().whole()
        expected = {n: decay * average + (1 - decay) * now[f"model.{n}"] for n, average in expected.items()}
    for name in names:
        torch.testing.assert_close(now[f"ema.{name}"], expected[name])


@every_row
def test_the_average_is_evaluated_and_training_goes_on(make_engine: MakeEngine, row: dict[str, object]) -> None:
    made_from = parts(engine={**row, "ema_half_life_epochs": 0.5})
    engine, undisturbed = make_engine(network(), made_from), make_engine(network(), made_from)
    for step in range(5):
        one, two = engine.train_step([images(step)]), undisturbed.train_step([images(step)])
        assert torch.equal(one["loss"], two["loss"])
        engine.begin_eval()
        mine = [engine.eval_step(images(9))["loss"].item() for _ in range(2)]
        model = network()
        saved = engine.state().whole()
        model.load_state_dict({n.removeprefix("ema."): t for n, t in saved.items() if n.startswith("ema.")})
        with torch.no_grad():
            logits = model.eval()(images(9).images_NCHW)
        expected = F.cross_entropy(logits, images(9).labels_N, reduction="sum").item()
        assert mine == pytest.approx([expected, expected], rel=1e-6)
        assert all(torch.equal(t, saved[n]) for n, t in undisturbed.state().whole().items())
        engine.begin_eval()
        engine.eval_step(images(9))  # the next step begins right after an evaluation


def test_deepspeed_missing_is_one_line(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ClusterError, match=r"DeepSpeed is not installed; pip install deepspeed==\S+$"):
        make_engine(network(), parts(engine={"kind": "deepspeed"}))


def test_deepspeed_is_quiet(make_engine: MakeEngine, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stage in range(4):
            engine = make_engine(network(), parts(engine={"kind": "deepspeed", "zero_stage": stage}))
            engine.train_step([images(0)])
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("DeepSpeed").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_optimizers_are_those_of_ddp(make_engine: MakeEngine, name: str, stage: int) -> None:
    """The same names with the same values: what one engine saved, another goes on from."""
    optim: dict[str, object] = {"optimizer": name, "lr": 0.01, "weight_decay": 0.1}
    ddp = make_engine(network(), parts(**optim))
    zero = make_engine(network(), parts(engine={"kind": "deepspeed", "zero_stage": stage}, **optim))
    assert ddp.state().whole().keys() == zero.state().whole().keys()
    for step in range(4):
        one, two = ddp.train_step([images(step)]), zero.train_step([images(step)])
        assert one["loss"].item() == pytest.approx(two["loss"].item(), rel=1e-6)
    state = ddp.state().whole()
    assert all(torch.allclose(tensor, state[n], atol=1e-5) for n, tensor in zero.state().whole().items())
    zero.load_state(EngineState(state, ddp.state().scalars))
    assert all(torch.equal(tensor, state[n]) for n, tensor in zero.state().whole().items())
    one, two = ddp.train_step([images(5)]), zero.train_step([images(5)])
    assert one["loss"].item() == pytest.approx(two["loss"].item(), rel=1e-6)
    if name in ("adamw", "lamb"):
        assert state["optimizer.4.weight.step"].item() == 4
        odd = state | {"optimizer.4.weight.step": torch.tensor(3.0)}
        if stage:
            with pytest.raises(CheckpointError, match=r"step is not the same for all parameters"):
                zero.load_state(EngineState(odd, ddp.state().scalars))


@every_row
def test_a_state_of_another_network_is_refused_in_one_line(make_engine: MakeEngine, row: dict[str, object]) -> None:
    engine = make_engine(network(), parts(engine=row))
    tensors, scalars = engine.state().whole(), engine.state().scalars
    less = EngineState({n: t for n, t in tensors.items() if n != "model.4.bias"}, scalars)
    other = EngineState(tensors | {"model.4.bias": torch.zeros(3)}, scalars)
    more = EngineState(tensors | {"model.5.bias": torch.zeros(3)}, scalars)
    for wrong, part in ((less, "no tensor model.4.bias"), (other, "model.4.bias has shape"), (more, "model.5.bias")):
        with pytest.raises(CheckpointError, match=rf"checkpoint of another model: .*{part}") as caught:
            engine.load_state(wrong)
        assert "\n" not in str(caught.value)


@every_row
def test_images_of_the_computed_type_are_what_the_first_layer_would_make_of_them(
    make_engine: MakeEngine, row: dict[str, object]
) -> None:
    engines = [make_engine(network(), parts(engine={**row, "precision": "bf16"})) for _ in range(2)]
    for step in range(2):
        exact = images(step)
        rounded = Images(exact.images_NCHW.bfloat16(), exact.labels_N, exact.weight_N)
        one, two = engines[0].train_step([exact]), engines[1].train_step([rounded])
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert engines[0].eval_step(exact)["loss"] == engines[1].eval_step(rounded)["loss"]


@every_row
def test_bf16_autocast_keeps_the_weights_in_float32(make_engine: MakeEngine, row: dict[str, object]) -> None:
    engine = make_engine(network(), parts(engine={**row, "precision": "bf16"}))
    exact = make_engine(network(), parts(engine=row))
    for step in range(3):
        low, high = engine.train_step([images(step)])["loss"].item(), exact.train_step([images(step)])["loss"].item()
        assert low == pytest.approx(high, rel=0.05)
        assert low != high
    assert {t.dtype for t in engine.state().whole().values() if t.is_floating_point()} == {torch.float32}
