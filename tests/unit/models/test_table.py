"""The table of networks: complete, equal to the built networks, and honest about what was published."""

import re
from functools import cache

import pytest
import timm
import torch

from ii_dist.models import GATES, MODELS
from ii_dist.models.table import PUBLISHED, SOURCES, ModelRow, count_macs, count_parameters, format_models, model_rows


@cache
def _rows() -> list[ModelRow]:
    return model_rows()


def test_a_row_for_every_network_and_gate() -> None:
    assert [(row.name, row.gate) for row in _rows()] == [(name, gate) for name in MODELS for gate in GATES]


def test_counted_without_memory() -> None:
    """No weight of any network is made: the largest alone would take half a gigabyte."""
    resident = torch.empty(1)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        model_rows(networks=["ini_wide_resnet101_2"])
    assert max((event.cpu_memory_usage for event in profile.function_events), default=0) < 2**20
    assert resident.device.type == "cpu"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "name", ["ini_resnet18", "ini_resnext50_32x4d", "ini_resnet20", "ini_preresnet164", "ini_wrn16_8"]
)
def test_a_row_is_what_the_built_network_has(name: str, gate: str) -> None:
    """A row adds up the gates of each stage; here the whole network is built with them."""
    row = next(row for row in _rows() if (row.name, row.gate) == (name, gate))
    with torch.device("meta"):
        model = timm.create_model(name, gate=gate)
        macs = count_macs(model, torch.empty(1, 3, row.image_size, row.image_size))
    assert (row.parameters, row.macs, row.classes) == (count_parameters(model), macs, model.num_classes)


def test_the_form_of_the_lens_and_its_fusing_change_no_count() -> None:
    with torch.device("meta"):
        counts = {
            count_macs(timm.create_model("ini_resnet18", lens=form), torch.empty(1, 3, 64, 64))
            for form in ("plain", "one_filter")
        }
    assert len(counts) == 1


def test_published_counts_lie_where_the_table_says() -> None:
    published = [row for row in _rows() if row.published_millions is not None]
    assert {(row.name, row.gate) for row in published} == {key for key in PUBLISHED if key[1] in GATES}
    for row in published:
        assert row.source in SOURCES
        assert row.published_millions == pytest.approx(row.parameters / 1e6, rel=0.03), row


def test_the_text_has_every_row_and_the_sources_it_uses() -> None:
    text = format_models(_rows())
    lines = text.splitlines()
    assert lines[0].split() == ["network", "gate", "parameters", "MACs", "image", "classes", "published"]
    assert len([line for line in lines if line.startswith("ini_")]) == len(_rows())
    (r50,) = [line for line in lines if re.match(r"ini_resnet50 +fold3x3 ", line)]
    assert r50.split() == ["ini_resnet50", "fold3x3", "28,991,244", "4.0975", "G", "224x224", "1000"]
    (plain,) = [line for line in lines if re.match(r"ini_wrn28_10 +none ", line)]
    assert plain.split()[-3:] == ["36.5", "M", "[1]"]
    assert any(line.startswith("[1] published: tables in the authors' public repository") for line in lines)
    assert any(line.startswith("[2] published: timm's results") for line in lines)


def test_the_columns_stand_below_their_heads() -> None:
    rows = [
        ModelRow("a", "se", 5, 2 * 10**9, 32, 10, 1.5, "timm"),
        ModelRow("longer", "fold3x3", 5_000_000, 1, 224, 1000),
    ]
    lines = format_models(rows).splitlines()
    assert lines[:3] == [
        "network  gate     parameters      MACs    image  classes  published",
        "a        se                5  2.0000 G    32x32       10  1.5 M [1]",
        "longer   fold3x3   5,000,000  0.0000 G  224x224     1000",
    ]
    assert [line[:3] for line in lines if line.startswith("[")] == ["[1]"]
    assert "authors" not in format_models(rows)
