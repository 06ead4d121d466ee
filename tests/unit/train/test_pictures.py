"""Which pictures a run shows, and that looking changes nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ii_dist.config import DataFacts, Plan, RunConfig, make_plan
from ii_dist.data import Batch
from ii_dist.engine import EngineParts, make_engine
from ii_dist.models import create_model
from ii_dist.train.evaluate import evaluate
from ii_dist.train.pictures import Pictures, pixels

SIDE, CLASSES, SIZE = 16, 4, 6


class Recorder:
    """A board that keeps the pictures it gets."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Mapping[str, bytes]]] = []

    def pictures(self, step: int, pngs: Mapping[str, bytes]) -> None:
        self.seen.append((step, pngs))


def config(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "x",
        "data": {"source": "synthetic", "synthetic_images": 24, "synthetic_classes": CLASSES, "image_size": SIDE},
        "model": {"network": "ini_resnet20", "zero_init_last": False},
        "engine": {"device": "cpu"},
        "optim": {"warmup_epochs": 0},
        "train": {"epochs": 10, "global_batch": 12, "eval_every_epochs": 1, "eval_batch_per_rank": SIZE},
        "metrics": {"inner_images_every_epochs": 4},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        tree[part] = tree[part] | {name: value}
    return RunConfig.model_validate(tree)


def plan_of(cfg: RunConfig, eval_images: int = 3 * SIZE) -> Plan:
    return make_plan(cfg, 1, DataFacts(24, eval_images, CLASSES))


def batch(seed: int = 0, **more: Any) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return Batch(
        images_NCHW=torch.randn(SIZE, 3, SIDE, SIDE, generator=draw).contiguous(memory_format=torch.channels_last),
        labels_N=torch.arange(SIZE) % CLASSES,
        weight_N=torch.ones(SIZE),
        index_N=torch.arange(SIZE),
        **more,
    )


def due_steps(cfg: RunConfig, rank: int = 0) -> list[int]:
    plan = plan_of(cfg)
    shown = Pictures(cfg, plan, Recorder(), rank)  # type: ignore[arg-type]
    steps = range(plan.eval_every_steps, plan.total_steps + 1, plan.eval_every_steps)
    return [step // plan.steps_per_epoch for step in steps if shown.inner_images_are_due(step)]


def test_inner_images_come_now_and_then_and_at_the_end() -> None:
    assert due_steps(config()) == [4, 8, 10]
    assert due_steps(config(metrics__inner_images_every_epochs=0)) == []
    assert due_steps(config(metrics__inner_images_every_epochs=0.25)) == list(range(1, 11))
    assert due_steps(config(train__eval_every_epochs=3)) == [6, 9]  # 12 would be the next
    assert due_steps(config(metrics__boards=["jsonl"])) == []
    assert due_steps(config(engine__compile=True)) == []
    assert due_steps(config(), rank=1) == []


def test_the_first_batch_is_shown_once_as_it_was_before_it_was_normalized(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[np.ndarray, list[str]]] = []

    def draw(images_NHWC: np.ndarray, captions: list[str]) -> bytes:
        drawn.append((images_NHWC, captions))
        return b"png"

    monkeypatch.setattr("ii_dist.train.pictures.batch_png", draw)
    cfg, board = config(metrics__batch_images=3), Recorder()
    shown = Pictures(cfg, plan_of(cfg), board, 0)  # type: ignore[arg-type]
    assert shown.batch_is_due
    before = np.random.default_rng(0).integers(0, 256, (SIZE, SIDE, SIDE, 3), dtype=np.uint8)
    normal = (torch.from_numpy(before) / 255 - torch.tensor(cfg.data.mean)) / torch.tensor(cfg.data.std)
    mixed = {"partner_labels_N": torch.tensor([1, 2, 3, 0, 1, 2])}
    mixed["label_share_N"] = torch.tensor([1.0, 0.625, 0.5, 1, 1, 1])
    one = Batch(normal.permute(0, 3, 1, 2), torch.arange(SIZE) % CLASSES, torch.ones(SIZE), torch.arange(SIZE), **mixed)
    shown.batch(one, 7)
    assert not shown.batch_is_due
    assert board.seen == [(7, {"images/first_batch": b"png"})]
    ((images_NHWC, captions),) = drawn
    assert np.array_equal(images_NHWC, before[:3])
    assert captions == ["class 0", "62% class 1, class 2", "50% class 2, class 3"]
    half = pixels(normal.permute(0, 3, 1, 2).to(torch.bfloat16), cfg.data)
    assert np.abs(half.astype(int) - before).max() <= 3


@pytest.mark.parametrize("gate", ["fold3x3", "se", "none"])
def test_watching_an_evaluation_changes_nothing_and_shows_each_stage(gate: str, tmp_path: Path) -> None:
    cfg, board = config(model__gate=gate), Recorder()
    plan, device = plan_of(cfg), torch.device("cpu")
    torch.manual_seed(0)
    engine = make_engine(create_model(cfg.model, CLASSES), EngineParts(cfg.engine, cfg.optim, plan, device))
    batches = [batch(seed) for seed in range(plan.eval_steps)]
    shown = Pictures(cfg, plan, board, 0)  # type: ignore[arg-type]
    shown._plan = plan_of(config(train__epochs=1))  # its last step is due
    monitor = engine.evaluated()
    hooks_before = sum(len(module._forward_hooks) for module in monitor.modules())
    plain = evaluate(engine, batches, device, lambda: False)
    for step in (0, 2):
        engine._step = step  # type: ignore[attr-defined]
        assert evaluate(engine, shown.watch(engine, batches), device, lambda: False) == plain
    assert evaluate(engine, shown.watch(engine, batches), device, lambda: True) is None  # given up: nothing is drawn
    assert sum(len(module._forward_hooks) for module in monitor.modules()) == hooks_before
    if gate == "none":
        assert board.seen == []
        return
    ((step, pngs),) = board.seen
    assert step == 2
    assert list(pngs) == ["inner_images/layer1.2", "inner_images/layer2.2", "inner_images/layer3.2"]
    assert len({len(png) for png in pngs.values()}) == 3


def test_images_that_are_watched_come_from_all_over_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []

    def draw(images_NHWC: np.ndarray, title: str, image: Any, view: Any, scale_NC: np.ndarray) -> bytes:
        drawn.append(images_NHWC)
        assert len(image) == len(view) == len(scale_NC) == len(images_NHWC)
        return b"png"

    monkeypatch.setattr("ii_dist.train.pictures.gate_png", draw)
    cfg = config(train__epochs=1)
    plan, device = plan_of(cfg, 9 * SIZE), torch.device("cpu")
    engine = make_engine(create_model(cfg.model, CLASSES), EngineParts(cfg.engine, cfg.optim, plan, device))
    engine._step = plan.total_steps  # type: ignore[attr-defined]
    batches = [batch(seed) for seed in range(plan.eval_steps)]
    shown = Pictures(cfg, plan, Recorder(), 0)  # type: ignore[arg-type]
    evaluate(engine, shown.watch(engine, batches), device, lambda: False)
    expected = [pixels(batches[number].images_NCHW[:1], cfg.data) for number in (0, 2, 4, 6)]
    assert np.array_equal(drawn[0], np.concatenate(expected))
