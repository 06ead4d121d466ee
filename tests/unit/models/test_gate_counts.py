"""Trainable parameters of every gate, exactly as counted for the paper's definition (networks: `test_counts.py`)."""

import pytest
import timm
import torch

from ii_dist.models.gates import GATES, make_gate

# (planes, channels) -> se, double_fc, pair2x1, pair1x1, fold3x3; reduction 16, 16 columns, planes / 16 filters.
GATE_PARAMETERS = {
    (64, 64): (512, 1_024, 528, 780, 636),
    (128, 128): (2_048, 4_096, 2_080, 3_096, 2_680),
    (256, 256): (8_192, 16_384, 8_256, 12_336, 10_992),
    (512, 512): (32_768, 65_536, 32_896, 49_248, 44_512),
    (64, 256): (8_192, 16_384, 8_208, 12_300, 10_860),
    (128, 512): (32_768, 65_536, 32_800, 49_176, 44_248),
    (256, 1024): (131_072, 262_144, 131_136, 196_656, 178_608),
    (512, 2048): (524_288, 1_048_576, 524_416, 786_528, 717_664),
}
NAMES = ("se", "double_fc", "pair2x1", "pair1x1", "fold3x3")


def _count(module: torch.nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad) if module else 0


def test_the_tables_name_every_gate() -> None:
    assert sorted(("none", *NAMES)) == sorted(GATES)


@pytest.mark.parametrize(("planes", "channels"), GATE_PARAMETERS)
@pytest.mark.parametrize("column", range(len(NAMES)), ids=NAMES)
def test_parameters_of_one_gate(planes: int, channels: int, column: int) -> None:
    for form in ("one_filter", "plain"):
        with torch.device("meta"):
            gate = make_gate(NAMES[column], channels, planes, lens=form)
        assert _count(gate) == GATE_PARAMETERS[planes, channels][column]
    assert make_gate("none", channels, planes) is None


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"gate_reduction": 32}, 27_275_436),
        ({"lens_filters": 64}, None),
        ({"fold_layout": "groups", "fold_width": 8}, None),
        ({"lens_kernel": 5}, None),
    ],
)
def test_parameters_of_resnet50_with_other_options(options: dict[str, object], parameters: int | None) -> None:
    with torch.device("meta"):
        model = timm.create_model("ini_resnet50", gate="fold3x3", **options)
    expected = 25_557_032
    kernel = int(str(options.get("lens_kernel", 3)))
    for blocks, channels, planes in ((3, 256, 64), (4, 512, 128), (6, 1024, 256), (3, 2048, 512)):
        hidden = channels // int(str(options.get("gate_reduction", 16)))
        filters = int(str(options.get("lens_filters", planes // 16)))
        height, width = (16, channels // 8) if "fold_layout" in options else (2 * channels // 16, 16)
        view = (height - kernel + 1) * (width - kernel + 1)
        expected += blocks * ((view + channels) * hidden + filters * (kernel**2 + 2))
    assert _count(model) == expected
    assert parameters in (None, expected)
