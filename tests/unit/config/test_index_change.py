"""The words for a data set that changed: true, one line, and about what really changed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ii_dist.config import IndexHeader, describe_change, index_facts, read_index_header
from ii_dist.data import Row, write_index

CLASSES = ("ant", "bee", "cow")


def row(number: int, label: int) -> Row:
    digest = number.to_bytes(1, "little") * 32
    return Row(f"{CLASSES[label]}/{number}.jpg", label, 10 + number, 20, 100 + number, digest)


ROWS = [row(1, 0), row(2, 0), row(3, 1), row(4, 1), row(5, 2)]


@pytest.fixture
def header(tmp_path: Path) -> Callable[..., IndexHeader]:
    def made(rows: list[Row], classes: tuple[str, ...] = CLASSES, shards: tuple[str, ...] = ()) -> IndexHeader:
        write_index(tmp_path / "train.index", rows, classes, shards=shards)
        return read_index_header(tmp_path / "train.index")

    return made


def in_shard(rows: list[Row]) -> list[Row]:
    return [replace(r, shard=0, offset=512 * number) for number, r in enumerate(rows)]


CHANGES = {
    "removed": (ROWS[1:], "5 images then, 4 now (1 removed); another number of images in class ant (2 then, 1 now)"),
    "added": (
        [*ROWS, row(6, 2)],
        "5 images then, 6 now (1 added); another number of images in class cow (1 then, 2 now)",
    ),
    "replaced": ([*ROWS[:2], row(7, 1), *ROWS[3:]], "images changed in class bee"),
    "removed and changed": (
        [ROWS[0], ROWS[1], row(9, 1), ROWS[3]],
        "5 images then, 4 now (1 removed); another number of images in class cow (1 then, 0 now); "
        "images changed in class bee",
    ),
    "labels": ([replace(ROWS[0], label=1), *ROWS[1:]], "the same images, but labels changed: class ant, bee"),
    "order": (ROWS[::-1], "the same images in another order"),
    "paths": ([replace(r, path=r.path.replace(".jpg", ".JPG")) for r in ROWS], "the same images at other paths"),
    "sizes": ([replace(r, width=1) for r in ROWS], "other widths or heights of the same images"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_kind_of_change_is_named(header: Callable[..., IndexHeader], name: str) -> None:
    rows, words = CHANGES[name]
    old, new = header(ROWS), header(rows)
    assert old.sha256 != new.sha256
    assert describe_change(index_facts(old), index_facts(new)) == words


def test_changed_classes_are_named(header: Callable[..., IndexHeader]) -> None:
    old = index_facts(header(ROWS))
    fewer = index_facts(header(ROWS[:4], CLASSES[:2]))
    assert describe_change(old, fewer) == "3 classes then, 2 now, without cow; 5 images then, 4 now (1 removed)"
    other = index_facts(header([*ROWS[:4], replace(ROWS[4], path="dog/5.jpg")], ("ant", "bee", "dog")))
    assert describe_change(old, other).startswith("3 classes then, 3 now, without cow, with the new dog")
    turned = index_facts(header([replace(r, label=2 - r.label) for r in ROWS], CLASSES[::-1]))
    assert describe_change(old, turned) == "the 3 classes are in another order"


def test_images_moved_into_shards_are_the_same_images(header: Callable[..., IndexHeader]) -> None:
    old, new = header(ROWS), header(in_shard(ROWS), shards=("a.tar",))
    assert describe_change(index_facts(old), index_facts(new)) == "the same images at other places in shards"


def test_two_swapped_labels_in_one_pair_of_classes_are_seen(header: Callable[..., IndexHeader]) -> None:
    """As many images a class as before, all of them there before: only the sums by class tell."""
    swapped = [replace(ROWS[0], label=1), ROWS[1], replace(ROWS[2], label=0), *ROWS[3:]]
    words = describe_change(index_facts(header(ROWS)), index_facts(header(swapped)))
    assert words == "the same images, but labels changed: class ant, bee"


def test_many_classes_are_counted_not_listed(header: Callable[..., IndexHeader]) -> None:
    names = tuple(f"c{i:03d}" for i in range(100))
    rows = [Row(f"{i}.jpg", i, 1, 1, 1, bytes([i]) * 32) for i in range(100)]
    changed = [replace(r, sha256=bytes([r.label + 100]) * 32) for r in rows]
    words = describe_change(index_facts(header(rows, names)), index_facts(header(changed, names)))
    assert words == "images changed in class c000, c001, c002 and 97 more"


def test_facts_survive_json_and_an_index_of_an_earlier_program_is_compared_by_what_it_says(
    header: Callable[..., IndexHeader],
) -> None:
    old, new = header(ROWS), index_facts(header(ROWS[1:]))
    assert json.loads(json.dumps(index_facts(old))) == index_facts(old)
    earlier = index_facts(replace(old, summary=""))
    assert describe_change(earlier, new) == "5 images then, 4 now (1 removed)"
    assert describe_change(earlier, index_facts(header(ROWS[::-1]))) == "the difference is not recorded"


@pytest.mark.parametrize("facts", [{}, {"images": "many", "classes": 3}, {"images": 5, "classes": [], "by_class": 7}])
def test_damaged_memory_of_a_run_folder_is_no_crash(
    header: Callable[..., IndexHeader], facts: dict[str, object]
) -> None:
    assert "\n" not in describe_change(facts, index_facts(header(ROWS)))
