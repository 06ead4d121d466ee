"""Which gates a config lets a network have: what cannot be folded is refused before torch is imported."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from ii_dist.config.networks import GATE_NAMES, NETWORKS, fold_shape, fold_widths
from ii_dist.config.schema import ModelConfig


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("gate", GATE_NAMES)
def test_every_network_has_every_gate_by_default(network: str, gate: str) -> None:
    ModelConfig(network=network, gate=gate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"network": "ini_resnet20", "fold_layout": "groups"},
            "fold_width 8: ini_resnet20 has stages of 16, 32, 64 channels; possible groups are 2, 4",
        ),
        (
            {"network": "ini_wrn28_10", "fold_width": 64, "fold_layout": "groups"},
            "fold_width 64: ini_wrn28_10 has stages of 160, 320, 640 channels; possible groups are "
            "2, 4, 5, 8, 10, 16, 20, 32, 40",
        ),
        (
            {"network": "ini_resnet20", "lens_kernel": 5},
            "fold_width 8: ini_resnet20 has stages of 16, 32, 64 channels and a lens of 5x5; possible widths are none",
        ),
        (
            {"network": "ini_resnet50", "fold_width": 10},
            "fold_width 10: ini_resnet50 has stages of 256, 512, 1024, 2048 channels; possible widths are 4, 8, 16",
        ),
    ],
)
def test_what_cannot_be_folded_says_what_could(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        ModelConfig(gate="fold3x3", **options)
    ModelConfig(gate="pair2x1", **options)  # only a folded gate asks


@pytest.mark.parametrize("kernel", [0, -1])
def test_a_lens_has_taps(kernel: int) -> None:
    with pytest.raises(ValidationError):
        ModelConfig(lens_kernel=kernel)


def test_sides_and_widths_written_out() -> None:
    assert fold_shape(256, 16, "columns") == (32, 16)
    assert fold_shape(160, 10, "groups") == (20, 16)
    assert fold_widths([32], "columns", 3) == [4, 8, 16]
    assert fold_widths([32], "groups", 3) == [2, 4, 8]
    assert fold_widths([32], "groups", 1) == [1, 2, 4, 8, 16, 32]
    assert fold_widths([32, 48], "columns", 6) == [8]
