"""The sources' contract with everything on that knows a batch or an epoch: Mixup, CutMix, sizes that grow, types."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ii_dist.config import DataConfig
from ii_dist.data import SOURCES, Batch, BatchSource, Position, make_eval_source, make_train_source
from ii_dist.data.mix import draw_mixing
from ii_dist.runtime import World
from tests.images import make_data_set, plan_of, run_config

CLASSES, PER_CLASS, VAL_PER_CLASS = 3, 35, 4
TRAIN_IMAGES, EVAL_IMAGES = CLASSES * PER_CLASS, CLASSES * VAL_PER_CLASS
GLOBAL_BATCH, EPOCHS = 48, 5  # 105 images: 2 steps an epoch, 9 images dropped
SEED = 11
SIDES = [16, 16, 24, 32, 32]
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_probability": 0.9, "mix_off_epochs": 1}
NAMES = ("images_NCHW", "labels_N", "weight_N", "index_N", "partner_labels_N", "label_share_N")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("set"), CLASSES, PER_CLASS, VAL_PER_CLASS, (60, 44))


def config(root: Path, source: str, **changes: object) -> DataConfig:
    fields = {
        "source": source,
        "root": str(root),
        "size_schedule": [[1, 16], [3, 32]],
        "size_multiple": 8,
        "eval_resize": 28,
        "eval_image_size": 24,
        "threads_per_rank": 1,
        "augment": MIX,
        "synthetic_images": TRAIN_IMAGES,
        "synthetic_classes": CLASSES,
    }
    return DataConfig.model_validate(fields | changes)


@pytest.fixture(params=sorted(SOURCES))
def cfg(request: pytest.FixtureRequest, root: Path) -> DataConfig:
    return config(root, request.param)


class Ranks:
    """The sources of all ranks of one world."""

    def __init__(self, cfg: DataConfig, world_size: int, limit: int = 0, channels_last: bool = False) -> None:
        run = run_config(cfg.model_copy(update={"image_dtype": "auto"}), GLOBAL_BATCH, limit)
        run = run.model_copy(update={"train": run.train.model_copy(update={"epochs": float(EPOCHS)})})
        self.plan = plan_of(run, world_size, TRAIN_IMAGES, EVAL_IMAGES, CLASSES)
        worlds = [
            World(rank=r, world_size=world_size, local_rank=r, local_world_size=world_size) for r in range(world_size)
        ]
        self.sources: list[BatchSource] = [
            make_train_source(cfg, self.plan, world, SEED, "cpu", channels_last) for world in worlds
        ]

    def steps(self, count: int) -> list[Batch]:
        iterators = [iter(source) for source in self.sources]
        turns = self.plan.accumulate_steps
        return [joined([next(it) for _ in range(turns) for it in iterators]) for _ in range(count)]

    def seek(self, position: Position) -> None:
        for source in self.sources:
            source.seek(position)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for source in self.sources:
            source.close()


def joined(batches: list[Batch]) -> Batch:
    columns = ([getattr(batch, name) for batch in batches] for name in NAMES)
    return Batch(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in NAMES]
    return all(y is None if x is None else torch.equal(x, y) for x, y in pairs)


@pytest.fixture
def expected(cfg: DataConfig) -> Iterator[list[Batch]]:
    """The whole run on one rank."""
    with Ranks(cfg, 1) as ranks:
        yield ranks.steps(2 * EPOCHS)


@pytest.mark.parametrize(("world_size", "limit"), [(1, 6), (2, 0), (3, 0), (4, 4), (8, 0), (8, 3)])
def test_mixed_steps_are_the_same_on_any_number_of_ranks(
    cfg: DataConfig, expected: list[Batch], world_size: int, limit: int
) -> None:
    with Ranks(cfg, world_size, limit) as ranks:
        assert ranks.plan.micro_batch % 2 == 0
        assert all(same(a, b) for a, b in zip(ranks.steps(2 * EPOCHS), expected, strict=True))


@pytest.mark.parametrize(("world_size", "change"), [(1, {"prefetch_batches": 5}), (3, {"threads_per_rank": 3})])
def test_a_seek_before_a_border_of_sizes_goes_on_with_the_right_ones(
    cfg: DataConfig, expected: list[Batch], world_size: int, change: dict[str, int]
) -> None:
    with Ranks(cfg.model_copy(update=change), world_size) as ranks:
        ranks.steps(1)
        for number in (3, 5, 2, 7):  # batches of the epoch after it are prefetched meanwhile
            ranks.seek(Position(number // 2, number % 2 * GLOBAL_BATCH))
            assert all(same(a, b) for a, b in zip(ranks.steps(3), expected[number:], strict=False))


def test_sides_follow_the_epoch(expected: list[Batch]) -> None:
    assert [tuple(batch.images_NCHW.shape[1:]) for batch in expected] == [(3, s, s) for s in SIDES for _ in range(2)]


def test_images_and_labels_are_mixed_from_those_of_the_unmixed_source(cfg: DataConfig, expected: list[Batch]) -> None:
    plain = cfg.model_copy(update={"augment": cfg.augment.model_copy(update={"mix_probability": 0.0})})
    with Ranks(plain, 1) as ranks:
        assert not ranks.plan.micro_batch % 2
        unmixed = ranks.steps(2 * EPOCHS)
    for step, (batch, own) in enumerate(zip(expected, unmixed, strict=True)):
        assert own.partner_labels_N is own.label_share_N is None
        assert torch.equal(batch.labels_N, own.labels_N)
        assert torch.equal(batch.index_N, own.index_N)
        if step // 2 == EPOCHS - 1:  # mix_off_epochs
            assert batch.partner_labels_N is batch.label_share_N is None
            assert torch.equal(batch.images_NCHW, own.images_NCHW)
            continue
        assert batch.partner_labels_N is not None
        assert batch.label_share_N is not None
        assert (batch.partner_labels_N.dtype, batch.label_share_N.dtype) == (torch.int64, torch.float32)
        partner = torch.arange(GLOBAL_BATCH) ^ 1
        assert torch.equal(batch.partner_labels_N, own.labels_N[partner])
        assert_images_follow_labels(batch, own.images_NCHW, own.images_NCHW[partner], step // 2)


def assert_images_follow_labels(batch: Batch, own_NCHW: torch.Tensor, other_NCHW: torch.Tensor, epoch: int) -> None:
    """Each image is what its share says: a blend, or pixels of the one and of the other by their number."""
    assert batch.label_share_N is not None
    kinds = set()
    for image, own, other, share in zip(
        batch.images_NCHW, own_NCHW, other_NCHW, batch.label_share_N.tolist(), strict=True
    ):
        blend = share * own + (1 - share) * other
        of_own, of_other = (image == own).all(0), (image == other).all(0)
        if (image - blend).abs().max() < 1e-5:
            kinds.add("alone" if share == 1 else "mixup")
        else:
            kinds.add("cutmix")
            assert bool((of_own | of_other).all())
            assert (~of_other).float().mean() <= share + 1e-6 <= of_own.float().mean() + 2e-6
    assert kinds == {"alone", "mixup", "cutmix"}


def test_pairs_change_from_epoch_to_epoch(expected: list[Batch]) -> None:
    pairs = [
        {
            frozenset(pair)
            for batch in expected[2 * epoch : 2 * epoch + 2]
            for pair in batch.index_N.view(-1, 2).tolist()
        }
        for epoch in range(4)
    ]
    assert all(len(a & b) <= 3 for i, a in enumerate(pairs) for b in pairs[:i])  # of 48, 0.5 by chance


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_another_type_is_the_finished_image_rounded_once(
    cfg: DataConfig, expected: list[Batch], name: str, channels_last: bool
) -> None:
    with Ranks(cfg.model_copy(update={"image_dtype": name}), 2, channels_last=channels_last) as ranks:
        # Batches of one rank: joining would hide the strides.
        one = next(iter(ranks.sources[0])).images_NCHW
        ranks.seek(Position(0, 0))
        steps = ranks.steps(6)
    assert one.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for batch, exact in zip(steps, expected, strict=False):
        assert batch.images_NCHW.dtype == getattr(torch, name)
        assert torch.equal(batch.images_NCHW, exact.images_NCHW.to(getattr(torch, name)))
        assert torch.equal(batch.label_share_N, exact.label_share_N)  # type: ignore[arg-type]


def test_evaluation_never_mixes_and_keeps_its_size(cfg: DataConfig) -> None:
    with Ranks(cfg, 1) as ranks:
        source = make_eval_source(cfg, ranks.plan, World(), SEED, "cpu", False, 5)
        batches = list(source)
        source.close()
    assert all(batch.partner_labels_N is batch.label_share_N is None for batch in batches)
    assert {tuple(batch.images_NCHW.shape) for batch in batches} == {(5, 3, 24, 24)}


def test_readers_of_files_mix_alike(root: Path) -> None:
    found = []
    for source in ("dali", "torch"):
        with Ranks(config(root, source), 1) as ranks:
            found.append(ranks.steps(5))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.label_share_N, b.label_share_N)  # type: ignore[arg-type]
        assert torch.equal(a.partner_labels_N, b.partner_labels_N)  # type: ignore[arg-type]
        gap = (a.images_NCHW - b.images_NCHW).abs() * 0.226 * 255  # about, in steps of a pixel
        assert gap.mean() < 0.05
        assert gap.max() < 2.2


def test_the_graph_for_a_gpu_takes_its_sizes_from_outside(root: Path) -> None:
    """The operators that run on a GPU, on the CPU: one pipeline through every size, mixed as a GPU mixes."""
    from ii_dist.data.ahead import Chunks
    from ii_dist.data.dali import _Pipe
    from ii_dist.data.mix_images import mix_batch

    with Ranks(config(root, "dali"), 1) as ranks:
        request = ranks.sources[0]._producer._request  # type: ignore[attr-defined]
        batches = ranks.steps(2 * EPOCHS)
    reading = Chunks(1)
    pipe, built = _Pipe(request, 0, reading, decode_only=False), set()
    for number, batch in enumerate(batches):
        fed, output = pipe.run()
        built.add(id(pipe._pipeline))
        images_NCHW = torch.from_numpy(np.array(output.as_tensor()))
        assert images_NCHW.shape == batch.images_NCHW.shape
        assert (fed.mixing is None) == (number // 2 == EPOCHS - 1)
        if fed.mixing is not None:
            mixing = fed.mixing
            images_NCHW = mix_batch(images_NCHW, torch.from_numpy(mixing.own_N), torch.from_numpy(mixing.box_N4))
            rows, side = batch.index_N.numpy(), SIDES[number // 2]
            again = draw_mixing(SEED, number // 2, rows, side, request.cfg.augment)
            assert (mixing.box_N4 == again.box_N4).all()
        assert ((images_NCHW - batch.images_NCHW).abs() * 0.226 * 255).mean() < 0.5
    assert len(built) == 1
    pipe.close()
    reading.close()


def test_one_rank_hands_out_pairs_of_neighbours_and_no_more(cfg: DataConfig) -> None:
    """A partner is in the same micro-batch, so that no rank needs another one's images."""
    with Ranks(cfg, 4, 4) as ranks:
        for batch in islice(ranks.sources[2], 6):
            assert batch.partner_labels_N is not None
            assert torch.equal(batch.partner_labels_N, batch.labels_N[torch.arange(4) ^ 1])
