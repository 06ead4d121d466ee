"""The table of tags."""

import re
from pathlib import Path

import pytest

from ii_dist.config import ConfigError
from ii_dist.metrics import TAGS, check_tags
from tools.list_tags import main, with_table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"

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


def test_the_page_on_metrics_has_the_table_of_today() -> None:
    page = PAGE.read_text()
    assert with_table(page, "page") == page, "python -m tools.list_tags --into docs/metrics.md"
    assert re.findall(r"^\| `(\w+/\w+)` \|", page, re.MULTILINE) == list(TAGS)


def test_a_table_is_replaced_where_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n| tag | unit | ranks | says |\n| old | row |\n\nafter\n")
    assert main(["--into", str(page)]) == 0
    assert page.read_text().startswith("before\n\n| tag |")
    assert page.read_text().endswith("|\n\nafter\n")
    assert "old" not in page.read_text()
    assert main([]) == 0
    assert capsys.readouterr().out.strip() in page.read_text()
    with pytest.raises(ConfigError, match="no line"):
        with_table("nothing here", "page")
