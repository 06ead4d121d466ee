"""Parameters, exact, and multiply-adds of every network and gate that the reference tables have a number for.

The numbers were counted by an independent transcription of the authors' networks. A gate of the table that does not
exist yet is left out, so that these tests pick it up with its row in `GATES`.
"""

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ii_dist.config.errors import ConfigError
from ii_dist.models import GATES, MODELS
from ii_dist.models.table import count_macs, count_parameters

ALL_GATES = ("none", "se", "double_fc", "pair2x1", "pair1x1", "fold3x3")

# 1000 classes, reduction 16, fold of 16 columns, planes / 16 filters.
IMAGENET = {
    "ini_resnet18": (11_689_512, 11_776_552, 11_863_592, 11_777_032, 11_820_432, 11_807_152),
    "ini_resnet34": (21_797_672, 21_954_856, 22_112_040, 21_955_800, 22_034_156, 22_009_788),
    "ini_resnet50": (25_557_032, 28_071_976, 30_586_920, 28_072_920, 29_330_156, 28_991_244),
    "ini_resnet101": (44_549_160, 49_292_328, 54_035_496, 49_294_360, 51_665_436, 51_019_708),
    "ini_resnet152": (60_192_808, 66_770_984, 73_349_160, 66_773_976, 70_062_316, 69_162_252),
}
# Multiply-adds at 224x224: 10^9 of the plain network, then 10^6 more for each gate.
IMAGENET_MACS = {
    "ini_resnet18": (1.8141, 0.087, 0.174, 0.174, 0.218, 0.772),
    "ini_resnet34": (3.6638, 0.157, 0.314, 0.314, 0.393, 1.388),
    "ini_resnet50": (4.0892, 2.515, 5.030, 3.144, 4.401, 8.323),
    "ini_resnet101": (7.8014, 4.743, 9.486, 5.929, 8.301, 15.675),
    "ini_resnet152": (11.5136, 6.578, 13.156, 8.223, 11.512, 21.724),
}
# 10 classes.
SMALL = {
    "ini_preresnet164": (1_703_258, 1_896_794, 2_090_330, 1_897_298, 1_993_940, 1_956_644),
    "ini_wrn28_10": (36_479_226, 36_748_026, 37_016_826, 36_749_146, 36_883_266, 36_848_546),
    "ini_wrn22_10": (26_797_946, 26_999_546, 27_201_146, 27_000_386, 27_100_976, 27_074_936),
    "ini_wrn16_8": (10_961_402, 11_047_418, 11_133_434, 11_047_866, 11_090_762, None),
}
# Millions, as printed: trainable for 10 classes, everything that MXNet registers for 10 and for 100 classes.
MILLIONS = {
    ("ini_preresnet164", "none"): (1.703, 1.727, 1.751),
    ("ini_preresnet164", "se"): (1.897, 1.921, 1.9442),
    ("ini_preresnet164", "double_fc"): (2.090, 2.1146, 2.138),
    ("ini_preresnet164", "pair2x1"): (1.897, 1.922, 1.9449),
    ("ini_preresnet164", "pair1x1"): (1.994, 2.018, 2.0416),
    ("ini_preresnet164", "fold3x3"): (1.957, 1.981, 2.004),
    ("ini_preresnet110", "none"): (1.731, 1.739, 1.744),
    ("ini_preresnet110", "se"): (1.743, 1.7507, 1.757),
    ("ini_preresnet110", "pair1x1"): (1.749, 1.7574, 1.763),
    ("ini_wrn22_10", "none"): (26.798, 26.811, 26.869),
    ("ini_wrn28_10", "none"): (36.479, 36.497, 36.555),
    ("ini_wrn22_10", "se"): (27.000, 27.013, 27.071),
    ("ini_wrn28_10", "se"): (36.748, 36.766, 36.824),
    ("ini_wrn16_8", "pair1x1"): (11.091, 11.098, 11.144),
    ("ini_wrn22_10", "pair1x1"): (27.101, 27.115, 27.173),
    ("ini_wrn28_10", "double_fc"): (37.017, 37.035, 37.093),
    ("ini_wrn28_10", "pair2x1"): (36.749, 36.768, 36.825),
    ("ini_wrn28_10", "pair1x1"): (36.883, 36.902, 36.960),
    ("ini_wrn28_10", "fold3x3"): (36.849, 36.867, 36.925),
}
EXISTING = [gate for gate in ALL_GATES if gate in GATES]


def _build(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)  # type: ignore[no-any-return]


def _image(side: int) -> torch.Tensor:
    return torch.empty(1, 3, side, side, device="meta")


def _registered_by_mxnet(model: nn.Module) -> int:
    """Trainable parameters, running statistics, and the fixed gain and shift of the norm of the input."""
    statistics = sum(b.numel() for name, b in model.named_buffers() if "running_" in name)
    return count_parameters(model) + statistics + 2 * 3


def test_the_tables_name_every_gate() -> None:
    assert set(GATES) <= set(ALL_GATES)


@pytest.mark.parametrize("gate", EXISTING)
@pytest.mark.parametrize("name", [*IMAGENET, *SMALL])
def test_trainable_parameters_to_the_last_one(name: str, gate: str) -> None:
    counted = {**IMAGENET, **SMALL}[name][ALL_GATES.index(gate)]
    if counted is None:  # ten groups, as in the authors' code, do not divide 128 channels
        with pytest.raises(ConfigError, match=r"10.*128"):
            _build(name, gate=gate, fold_width=10)
    else:
        assert count_parameters(_build(name, gate=gate)) == counted


def _rounding_of(printed: float) -> float:
    """Half of the last digit that a table prints, three at least."""
    digits = max(3, len(repr(printed).partition(".")[2]))
    return 0.5 * 10.0**-digits + 1e-9


@pytest.mark.parametrize(("name", "gate"), [key for key in MILLIONS if key[1] in GATES])
def test_parameters_by_each_way_of_counting(name: str, gate: str) -> None:
    trainable, all10, all100 = MILLIONS[name, gate]
    model, wide = _build(name, gate=gate), _build(name, gate=gate, num_classes=100)
    assert count_parameters(model) / 1e6 == pytest.approx(trainable, abs=_rounding_of(trainable))
    assert _registered_by_mxnet(model) / 1e6 == pytest.approx(all10, abs=_rounding_of(all10))
    assert _registered_by_mxnet(wide) / 1e6 == pytest.approx(all100, abs=_rounding_of(all100))


@pytest.mark.parametrize("gate", EXISTING)
@pytest.mark.parametrize("name", IMAGENET_MACS)
def test_multiply_adds(name: str, gate: str) -> None:
    plain_g, *more_m = IMAGENET_MACS[name]
    plain = count_macs(_build(name, gate="none"), _image(224))
    assert plain / 1e9 == pytest.approx(plain_g, rel=1e-4)
    if gate != "none":
        extra = count_macs(_build(name, gate=gate), _image(224)) - plain
        assert extra / 1e6 == pytest.approx(more_m[ALL_GATES.index(gate) - 1], abs=0.0006)


@pytest.mark.parametrize("gate", [gate for gate in ("none", "se", "double_fc") if gate in GATES])
@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_agree_with_torchs_own_counter(name: str, gate: str) -> None:
    """A lens may be computed as one filter, so only the gates without one are as torch sees them."""
    model = _build(name, gate=gate).eval()
    side = model.default_cfg["input_size"][-1]  # type: ignore[index]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(_image(side))
    blurs = 0
    if name == "ini_resnetblur50":  # fixed filters of 3x3 are no layer of ours: after the stem, and in three blocks
        blurs = 9 * (64 * 56**2 + sum(64 * 2**i * (56 // 2**i) ** 2 for i in (1, 2, 3)))
    assert count_macs(model, _image(side)) == counter.get_total_flops() // 2 - blurs


def test_parameters_with_other_gate_options() -> None:
    options: tuple[dict[str, Any], ...] = (
        {"lens_filters": 64},
        {"gate_reduction": 32, "gate": "se"},
        {"gate_reduction": 32},
        {"fold_width": 64},
    )
    counts = [count_parameters(_build("ini_resnet50", **o)) for o in options]
    per_stage = ((3, 256), (4, 512), (6, 1024), (3, 2048))  # blocks, channels
    lens64 = sum(n * (((2 * c // 16 - 2) * 14 + c) * (c // 16) + 11 * 64) for n, c in per_stage)
    se32 = sum(n * 2 * c * (c // 32) for n, c in per_stage)
    wide = sum(
        n * (((2 * c // 64 - 2) * 62 + c) * (c // 16) + 11 * p)
        for (n, c), p in zip(per_stage, (4, 8, 16, 32), strict=True)
    )
    assert counts == [25_557_032 + lens64, 25_557_032 + se32, 27_275_436, 25_557_032 + wide]
