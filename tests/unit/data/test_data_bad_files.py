"""Files that cannot be read or decoded: what takes their place, on any number of ranks, after any seek."""

import hashlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ii_dist.config import DataConfig, DataError
from ii_dist.data import (
    Batch,
    BatchSource,
    Index,
    Position,
    build_index,
    make_eval_source,
    make_train_source,
    write_index,
)
from ii_dist.data.bad_files import BadFiles, Counts
from ii_dist.data.counter import key
from ii_dist.data.index import check_files
from ii_dist.data.positions import Rows
from ii_dist.data.quarantine import BadFile
from ii_dist.data.substitute import ALWAYS_ALLOWED, Picks, allowed, candidate
from ii_dist.runtime import World
from tests.images import make_image_folder, plan_of, run_config

CLASSES, PER_CLASS, VAL_PER_CLASS = 3, 16, 6
IMAGES, GLOBAL_BATCH = CLASSES * PER_CLASS, 12  # four steps an epoch, none dropped
SEED, EPOCHS = 5, 3
READERS = ("dali", "torch")
ROOT = Path(__file__).parents[3]

GARBAGE = (b"<html>not found</html>", b"\xff\xd8\xff\xe0garbage", b"", b"\x89PNG\r\n\x1a\nno chunks", b"just words\n")
BAD_ROWS = (3, 4, 9, 17, 18, 30, 31, 44)  # of both kinds of neighbours: in one batch, in one class
BAD_VAL_ROWS = (0, 7, 17)  # the last one is also what an uneven evaluation is padded with


def spoil(path: Path, number: int) -> None:
    """Other bytes, as many: what a bad disk or a proxy's error page leaves behind."""
    path.write_bytes(GARBAGE[number % len(GARBAGE)].ljust(path.stat().st_size, b"\0"))


def data_set(root: Path, bad: bool) -> Path:
    for split, count, rows in (("train", PER_CLASS, BAD_ROWS), ("val", VAL_PER_CLASS, BAD_VAL_ROWS)):
        folder = make_image_folder(root / split, CLASSES, count, (60, 44), seed=count)
        found, classes = build_index(folder)
        write_index(root / f"{split}.index", found, classes, root=split)
        for number, row in enumerate(rows if bad else ()):
            spoil(folder / found[row].path, number)
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("good"), bad=False)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("bad"), bad=True)


def config(root: Path, source: str, **changes: object) -> DataConfig:
    fields = {"image_size": 24, "eval_resize": 28, "eval_image_size": 24, "threads_per_rank": 1, "read_retries": 0}
    return DataConfig.model_validate({"source": source, "root": str(root), **fields, **changes})


def worlds(size: int) -> list[World]:
    return [World(rank=r, world_size=size, local_rank=r, local_world_size=size) for r in range(size)]


def train_sources(cfg: DataConfig, world_size: int = 1, images: int = IMAGES) -> list[BatchSource]:
    plan = plan_of(run_config(cfg, GLOBAL_BATCH), world_size, images, CLASSES * VAL_PER_CLASS, CLASSES)
    return [make_train_source(cfg, plan, world, SEED, "cpu", False) for world in worlds(world_size)]


def joined(batches: list[Batch]) -> Batch:
    names = ("images_NCHW", "labels_N", "weight_N", "index_N")
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in names))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("images_NCHW", "labels_N", "weight_N", "index_N"))


def steps(sources: list[BatchSource], count: int) -> list[Batch]:
    iterators = [iter(source) for source in sources]
    found = [joined([next(iterator) for iterator in iterators]) for _ in range(count)]
    for source in sources:
        source.close()
    return found


def by_rule(epoch: int, row: int) -> int:
    """The row that stands where `row` is asked for: the rule, written down once more."""
    turn, found = 0, row
    while found in BAD_ROWS:
        turn += 1
        found = key(0x73756273746974, SEED, epoch, row, turn) % IMAGES
    return found


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def intact(reader: str, good: Path) -> list[Batch]:
    return steps(train_sources(config(good, reader)), 4 * EPOCHS)


@pytest.fixture(scope="module")
def expected(intact: list[Batch]) -> list[Batch]:
    """The same steps by the rule: rows looked up, pixels from the intact data set's own epoch."""
    found = []
    for step, batch in enumerate(intact):
        epoch = joined(intact[step // 4 * 4 : step // 4 * 4 + 4])
        place = {int(row): i for i, row in enumerate(epoch.index_N)}
        at = [place[by_rule(step // 4, int(row))] for row in batch.index_N]
        found.append(Batch(epoch.images_NCHW[at], epoch.labels_N[at], epoch.weight_N[at], epoch.index_N[at]))
    return found


def test_the_data_set_has_what_is_to_be_tested(intact: list[Batch]) -> None:
    in_batch = [sum(int(row) in BAD_ROWS for row in batch.index_N) for batch in intact]
    assert max(in_batch) >= 3
    chains = [key(0x73756273746974, SEED, epoch, row, 1) % IMAGES for epoch in range(EPOCHS) for row in BAD_ROWS]
    assert any(row in BAD_ROWS for row in chains)  # a substitute that is bad itself


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bad_images_give_way_by_the_rule_on_any_number_of_ranks(
    bad: Path, reader: str, expected: list[Batch], world_size: int
) -> None:
    found = steps(train_sources(config(bad, reader), world_size), 4 * EPOCHS)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("change", [{"threads_per_rank": 3}, {"prefetch_batches": 1}, {"prefetch_batches": 5}])
def test_threads_and_prefetch_change_nothing(
    bad: Path, reader: str, expected: list[Batch], change: dict[str, int]
) -> None:
    found = steps(train_sources(config(bad, reader, **change)), 8)
    assert all(same(a, b) for a, b in zip(found, expected[:8], strict=True))


def test_policies_and_mixing_follow_the_substitutes(bad: Path, reader: str, expected: list[Batch]) -> None:
    augment = {"policy": "trivialaugment", "colour_jitter": [0.4, 0.4, 0.4, 0.1], "erase_probability": 0.5}
    augment |= {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}
    cfg = config(bad, reader, augment=augment)
    alone, shared = (steps(train_sources(cfg, world_size), 4) for world_size in (1, 2))
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert all(torch.equal(a.index_N, b.index_N) for a, b in zip(alone, expected[:4], strict=True))
    assert not torch.equal(alone[0].images_NCHW, expected[0].images_NCHW)


def test_a_resumed_run_sees_the_same_images(bad: Path, reader: str, expected: list[Batch]) -> None:
    sources = train_sources(config(bad, reader), 2)
    iterators = [iter(source) for source in sources]
    for step in (5, 1, 10):
        for source in sources:
            source.seek(Position(step // 4, step % 4 * GLOBAL_BATCH))
        for each in (expected[step], expected[step + 1]):
            assert same(joined([next(iterator) for iterator in iterators]), each)
    for source in sources:
        source.close()


def test_what_was_replaced_is_counted_and_named_once(
    bad: Path, reader: str, intact: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    sources = train_sources(config(bad, reader), 2)
    iterators = [iter(source) for source in sources]
    new: list[BadFile] = []
    for step, batch in enumerate(intact[:8]):
        for iterator in iterators:
            next(iterator)
        counts = [source.bad_files.take() for source in sources]
        asked = sum(int(row) in BAD_ROWS for row in batch.index_N)
        assert sum(count.replaced[step // 4] for count in counts) == asked
        new += [entry for count in counts for entry in count.new]
    for source in sources:
        source.close()
    index = Index.open(bad / "train.index")
    assert {entry.row for entry in new} == set(BAD_ROWS)
    for entry in new:
        content = Path(index.place(entry.row or 0)[0]).read_bytes()
        assert (entry.split, entry.path) == ("train", index.name(entry.row or 0))
        assert entry.sha256 == hashlib.sha256(content).hexdigest()
        assert entry.reason.startswith("cannot be decoded (")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for row in BAD_ROWS:
        assert (
            1 <= sum(index.place(row)[0] in text for text in said) <= 2
        )  # once for each rank; here both are one process
    assert not any("\n" in text for text in said)


def test_batches_that_nobody_took_count_nothing(bad: Path, reader: str, intact: list[Batch]) -> None:
    (source,) = train_sources(config(bad, reader, prefetch_batches=4))
    batches = iter(source)
    next(batches)
    source.seek(Position(0, GLOBAL_BATCH))
    for _ in range(3):
        next(batches)
    assert source.bad_files.take().replaced == {0: len(BAD_ROWS)}
    source.close()


def test_a_batch_that_is_made_again_does_not_count_for_its_first_making(good: Path) -> None:
    """A disk may have failed the first time only."""
    index = Index.open(good / "train.index")
    picks = Picks(Rows(0, np.array([3, 4]), np.ones(2, np.float32)), SEED, IMAGES, True, index.name)
    picks.refuse(0, "cannot be read (Input/output error)")
    record = BadFiles()
    record.note(7, picks, index)
    record.forget()
    record.handed_out(7)
    assert record.take() == Counts()
    record.note(7, picks, index)
    record.handed_out(7)
    assert record.take().replaced == {0: 1}


def eval_steps(cfg: DataConfig, world_size: int) -> tuple[Batch, int, list[BadFile]]:
    plan = plan_of(run_config(cfg, GLOBAL_BATCH), world_size, IMAGES, CLASSES * VAL_PER_CLASS, CLASSES)
    sources = [make_eval_source(cfg, plan, world, SEED, "cpu", False, 4) for world in worlds(world_size)]
    found = joined([batch for source in sources for batch in source])
    counts = [source.bad_files.take() for source in sources]
    for source in sources:
        source.close()
    return found, sum(count.replaced.total() for count in counts), [entry for count in counts for entry in count.new]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bad_evaluation_images_weigh_nothing_and_have_no_substitute(
    good: Path, bad: Path, reader: str, world_size: int
) -> None:
    (found, left_out, new), (whole, none, _) = (eval_steps(config(root, reader), world_size) for root in (bad, good))
    assert torch.equal(found.index_N, whole.index_N)
    assert torch.equal(found.labels_N, whole.labels_N)
    is_bad = torch.tensor([int(row) in BAD_VAL_ROWS for row in found.index_N])
    assert torch.equal(found.weight_N, whole.weight_N * ~is_bad)
    assert torch.equal(found.images_NCHW[~is_bad], whole.images_NCHW[~is_bad])
    assert found.images_NCHW.isfinite().all()
    assert (left_out, none) == (len(BAD_VAL_ROWS), 0)
    assert {entry.row for entry in new} == set(BAD_VAL_ROWS)
    assert {entry.split for entry in new} == {"val"}


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that end in the middle of their pixels: whether one decodes may depend on the window."""
    root = tmp_path_factory.mktemp("cut")
    for split in ("train", "val"):
        folder = make_image_folder(root / split, CLASSES, PER_CLASS, (120, 90), seed=3)
        for path in sorted(folder.rglob("*.jpg"))[::3]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
        rows, classes = build_index(folder)
        write_index(root / f"{split}.index", rows, classes, root=split)
    return root


def test_truncated_files_are_the_same_images_on_any_number_of_ranks(cut_short: Path, reader: str) -> None:
    cfg = config(cut_short, reader, prefetch_batches=3)
    runs = []
    for world_size in (1, 2, 4):
        plan = plan_of(run_config(cfg, GLOBAL_BATCH), world_size, IMAGES, IMAGES, CLASSES)
        sources = [make_train_source(cfg, plan, world, SEED, "cpu", False) for world in worlds(world_size)]
        runs.append(steps(sources, 8))
    for other in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], other, strict=True))
    asked = steps(train_sources(config(cut_short, "synthetic", synthetic_images=IMAGES, synthetic_classes=CLASSES)), 8)
    kept = [
        (int(a), int(b)) for x, y in zip(asked, runs[0], strict=True) for a, b in zip(x.index_N, y.index_N, strict=True)
    ]
    assert all(a == b for a, b in kept if a % 3)
    replaced = [a for a, b in kept if a % 3 == 0 and a != b]
    assert replaced
    if reader == "torch":  # which reads a whole file before it cuts
        assert len(replaced) == sum(a % 3 == 0 for a, _ in kept)


def test_the_rule_is_pure_and_spreads() -> None:
    assert [candidate(5, 0, 3, k, 1000) for k in (1, 2, 3)] == [candidate(5, 0, 3, k, 1000) for k in (1, 2, 3)]
    drawn = [candidate(s, e, row, k, 10) for s in (0, 1) for e in range(5) for row in range(20) for k in (1, 2)]
    assert all(20 <= drawn.count(row) <= 60 for row in range(10))
    assert len({tuple(candidate(1, e, 7, k, 10**6) for k in (1, 2)) for e in range(50)}) == 50


@pytest.mark.parametrize(
    ("images", "share", "most"),
    [(1_281_167, 1e-3, 1281), (57, 1e-3, ALWAYS_ALLOWED), (57, 0.5, 28), (57, 0.0, 0), (1_281_167, 0.0, 0)],
)
def test_how_many_are_allowed(images: int, share: float, most: int) -> None:
    assert allowed(images, share) == most


def test_a_data_set_without_any_good_image_ends_in_one_line(tmp_path: Path, reader: str) -> None:
    folder = make_image_folder(tmp_path / "train", 1, 4)
    rows, classes = build_index(folder)
    for split in ("train", "val"):
        write_index(tmp_path / f"{split}.index", rows, classes, root="train")
    for number, row in enumerate(rows):
        spoil(folder / row.path, number)
    cfg = config(tmp_path, reader)
    plan = plan_of(run_config(cfg, 2), 1, 4, 4, 1)
    source = make_train_source(cfg, plan, World(), SEED, "cpu", False)
    for _ in range(2):  # and again: no later call may wait for ever, or begin anew
        with pytest.raises(DataError, match=r"nor any of 64 other images .*tools\.scan_dataset") as error:
            next(iter(source))
        assert "\n" not in str(error.value)
    source.close()


def test_a_decoder_that_refuses_everything_is_told_from_bad_files(tmp_path: Path) -> None:
    folder = make_image_folder(tmp_path / "train", 1, 12)
    rows, classes = build_index(folder)
    for split in ("train", "val"):
        write_index(tmp_path / f"{split}.index", rows, classes, root="train")
    for number, row in enumerate(rows):
        spoil(folder / row.path, number)
    cfg = config(tmp_path, "dali")
    source = make_train_source(cfg, plan_of(run_config(cfg, 12), 1, 12, 12, 1), World(), SEED, "cpu", False)
    for _ in range(2):
        with pytest.raises(DataError, match="refuses all 12 images of a batch"):
            next(iter(source))
    source.close()


def test_a_file_that_vanishes_gives_way_and_one_that_changed_ends_the_run(tmp_path: Path, reader: str) -> None:
    root = data_set(tmp_path, bad=False)
    index = Index.open(root / "train.index")
    gone, changed = (Path(index.place(row)[0]) for row in (5, 20))
    gone.unlink()
    (source,) = train_sources(config(root, reader, read_retries=1))
    assert 5 not in torch.cat([batch.index_N for batch in islice(source, 4)])
    counts = source.bad_files.take()
    assert (counts.replaced, counts.retries) == ({0: 1}, 1)
    (entry,) = counts.new
    assert (entry.row, entry.sha256, entry.reason) == (5, None, "cannot be read (No such file or directory)")
    source.close()
    changed.write_bytes(changed.read_bytes() + b"more")
    (source,) = train_sources(config(root, reader))
    for _ in range(2):
        with pytest.raises(DataError, match=r"has not the .* bytes that .*train\.index says"):
            list(islice(source, 4))
    source.close()


def test_missing_files_are_looked_for_before_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = data_set(tmp_path, bad=False)
    index = Index.open(root / "train.index")
    for row in range(ALWAYS_ALLOWED):
        Path(index.place(row)[0]).unlink()
    check_files(index, max_bad_share=1e-3)
    assert "3 of 48 files looked for are missing" in caplog.text
    with pytest.raises(DataError, match="does not exist"):
        check_files(index, max_bad_share=0)
    Path(index.place(40)[0]).unlink()
    with pytest.raises(DataError, match="4 of 48 files"):
        check_files(index, max_bad_share=1e-3)
