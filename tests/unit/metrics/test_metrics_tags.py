"""The table of tags."""

import pytest

from ii_dist.metrics import TAGS, check_tags

UNITS_BY_ENDING = {"_s": {"s", "images/s", "MB/s"}, "_share": {"share"}, "_gib": {"GiB"}, "top1": {"%"}, "top5": {"%"}}


def test_every_row_is_complete() -> None:
    for name, tag in TAGS.items():
        assert tag.name == name
        assert tag.says.endswith(".")
        group, _, rest = name.partition("/")
        assert group in {
            *("train", "eval", "throughput", "time", "ranks", "run", "data", "memory", "machine", "gpu", "checkpoint")
        }
        assert rest


@pytest.mark.parametrize("ending", UNITS_BY_ENDING)
def test_names_and_units_agree(ending: str) -> None:
    found = {tag.unit for name, tag in TAGS.items() if name.endswith(ending)}
    assert found
    assert found <= UNITS_BY_ENDING[ending]


def test_a_misspelt_tag_is_named() -> None:
    with pytest.raises(AssertionError, match=r"train/los$"):
        check_tags(["train/loss", "train/los"])
