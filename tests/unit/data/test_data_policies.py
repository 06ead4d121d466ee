"""Drawn operations: pure, with the tables of torchvision and timm, and with the stated probabilities."""

import itertools
import math
import random

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from ii_dist.config import AugmentConfig, RunConfig, recipe_differences
from ii_dist.data.augment import NOISE_PLACES, erase_windows, noise_strip, train_windows
from ii_dist.data.exact_math import sin_cos
from ii_dist.data.policies import (
    AUTO_OPS,
    AUTO_PAIRS,
    ENHANCING,
    GEOMETRIC,
    JITTER_OPS,
    RAND_OPS,
    TRIVIAL_OPS,
    Op,
    auto_table,
    draw_operations,
    rand_values,
    trivial_table,
)
from ii_dist.models.compat import ensure_torchvision

ensure_torchvision()
from timm.data import auto_augment as timm_policies  # noqa: E402
from torchvision.transforms import autoaugment as tv_policies  # noqa: E402

IMAGES = 40_000
SIDE = 224
ALL = AugmentConfig(
    colour_jitter=(0.4, 0.3, 0.2, 0.1), policy="randaugment", policy_magnitude_std=0.5, erase_probability=0.25
)
TORCHVISION = {
    "Identity": Op.IDENTITY,
    "ShearX": Op.SHEAR_X,
    "ShearY": Op.SHEAR_Y,
    "TranslateX": Op.TRANSLATE_X,
    "TranslateY": Op.TRANSLATE_Y,
    "Rotate": Op.ROTATE,
    "Brightness": Op.BRIGHTNESS,
    "Color": Op.COLOUR,
    "Contrast": Op.CONTRAST,
    "Sharpness": Op.SHARPNESS,
    "Posterize": Op.POSTERIZE,
    "Solarize": Op.SOLARIZE,
    "AutoContrast": Op.AUTOCONTRAST,
    "Equalize": Op.EQUALIZE,
    "Invert": Op.INVERT,
}


def drawn(cfg: AugmentConfig, images: int = IMAGES) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    found = draw_operations(5, 2, np.arange(images), cfg, SIDE)
    return found.op_KN, found.value_KN


def check_counts(found: NDArray[np.int64], probability: NDArray[np.float64]) -> None:
    """Chi-square with fixed seeds: far beyond any percentile only if the probabilities are not these."""
    expected = probability * found.sum()
    assert not found[expected == 0].any()
    found, expected = found[expected > 0], expected[expected > 0]
    assert (np.square(found - expected) / expected).sum() < len(found) + 4 * math.sqrt(2 * len(found))


@pytest.mark.parametrize("policy", ["none", "randaugment", "trivialaugment", "autoaugment"])
def test_operations_depend_only_on_seed_epoch_and_row(policy: str) -> None:
    cfg = ALL.model_copy(update={"policy": policy})
    index = np.random.Generator(np.random.PCG64(0)).permutation(1000)[:64]
    batch, erased = draw_operations(3, 7, index, cfg, SIDE), erase_windows(3, 7, index, SIDE, cfg)
    for place in range(64):
        row = index[place : place + 1]
        alone = draw_operations(3, 7, row, cfg, SIDE)
        assert np.array_equal(alone.op_KN[:, 0], batch.op_KN[:, place])
        assert np.array_equal(alone.value_KN[:, 0], batch.value_KN[:, place])
        assert erase_windows(3, 7, row, SIDE, cfg).noise_N[0] == erased.noise_N[place]
    for seed, epoch in ((4, 7), (3, 8)):
        other = draw_operations(seed, epoch, index, cfg, SIDE)
        assert (other.value_KN != batch.value_KN).any(axis=0).mean() > 0.5
        assert (erase_windows(seed, epoch, index, SIDE, cfg).x_N != erased.x_N).any()


def test_a_policy_changes_no_window_and_no_flip() -> None:
    size = np.full(64, 300, np.int32)
    plain, rich = (train_windows(1, 2, np.arange(64), size, size, cfg) for cfg in (AugmentConfig(), ALL))
    assert all(np.array_equal(getattr(plain, name), getattr(rich, name)) for name in plain.__slots__)
    with_erasing = draw_operations(1, 2, np.arange(64), ALL.model_copy(update={"erase_probability": 0.0}), SIDE)
    assert np.array_equal(with_erasing.value_KN, draw_operations(1, 2, np.arange(64), ALL, SIDE).value_KN)


def test_the_draws_never_change_by_accident() -> None:
    found = draw_operations(7, 3, np.arange(3), ALL, SIDE)
    assert found.op_KN.tolist() == GOLDEN_OPS
    assert np.allclose(found.value_KN, GOLDEN_VALUES, rtol=0, atol=1e-5)
    erased = erase_windows(7, 3, np.arange(4), SIDE, AugmentConfig(erase_probability=1.0))
    assert np.stack([getattr(erased, name) for name in erased.__slots__]).T.tolist() == GOLDEN_RECTANGLES


@pytest.mark.parametrize(
    ("space", "table"),
    [
        (tv_policies.TrivialAugmentWide()._augmentation_space(31), trivial_table()),
        *((tv_policies.AutoAugment()._augmentation_space(10, (side, side)), auto_table(side)) for side in (32, 224)),
    ],
)
def test_magnitudes_are_torchvisions(space: dict, table: NDArray[np.float64]) -> None:  # type: ignore[type-arg]
    for name, (magnitudes, signed) in space.items():
        op, expected = TORCHVISION[name], magnitudes.double().numpy()
        if name.startswith("Translate"):
            expected = np.floor(expected + 1e-4)  # it cuts to whole pixels, and its float32 16 is a little less
        assert np.allclose(table[op], expected, rtol=1e-6, atol=1e-6), name
        assert signed == (op in GEOMETRIC + ENHANCING)
    ops = {TORCHVISION[name] for name in space}
    assert ops == set(TRIVIAL_OPS if len(table[0]) == 31 else AUTO_OPS) - (
        {Op.IDENTITY} if len(table[0]) == 10 else set()
    )


def test_trivialaugment_draws_every_operation_and_level_alike() -> None:
    op_KN, value_KN = drawn(AugmentConfig(policy="trivialaugment"))
    assert op_KN.shape == (1, IMAGES)
    check_counts(np.bincount(op_KN[0], minlength=len(Op)), np.isin(np.arange(len(Op)), TRIVIAL_OPS) / len(TRIVIAL_OPS))
    table = trivial_table()
    for op in (Op.ROTATE, Op.COLOUR, Op.SOLARIZE):
        values = value_KN[op_KN == op]
        magnitude = np.abs(values - 1 if op in ENHANCING else values)
        level = np.abs(magnitude[:, None] - table[op]).argmin(axis=1)
        assert np.allclose(magnitude, table[op][level])
        check_counts(np.bincount(level, minlength=31), np.full(31, 1 / 31))
    turned = value_KN[(op_KN == Op.ROTATE) & (value_KN != 0)]
    assert abs((turned > 0).mean() - 0.5) < 0.05


def test_autoaugment_is_torchvisions_for_imagenet() -> None:
    theirs = tv_policies.AutoAugment()._get_policies(tv_policies.AutoAugmentPolicy.IMAGENET)
    ours = [[(op, probability, level) for op, probability, level in pair] for pair in AUTO_PAIRS]
    assert ours == [[(TORCHVISION[name], p, level or 0) for name, p, level in pair] for pair in theirs]


def test_autoaugment_draws_pairs_alike_and_applies_them_as_often_as_stated() -> None:
    op_KN, value_KN = drawn(AugmentConfig(policy="autoaugment"))
    expected = np.zeros((len(Op), len(Op)))
    for (first, p, _), (second, q, _) in AUTO_PAIRS:
        for a, b in itertools.product((first, Op.IDENTITY), (second, Op.IDENTITY)):
            expected[a, b] += (p if a else 1 - p) * (q if b else 1 - q) / len(AUTO_PAIRS)
    found = np.bincount(op_KN[0].astype(int) * len(Op) + op_KN[1], minlength=len(Op) ** 2)
    check_counts(found, expected.flatten())
    kept = {int(bits) for bits in np.unique(value_KN[op_KN == Op.POSTERIZE])}
    assert kept == {4, 5, 6}  # levels 8; 7 and 6 (and 5): by torchvision's table
    assert set(np.round(np.abs(value_KN[op_KN == Op.ROTATE]), 3)) == {10.0, 26.667, 30.0}


@pytest.mark.parametrize("increasing", [False, True])
def test_randaugments_tables_are_timms(increasing: bool) -> None:
    """At every magnitude, for both signs: timm draws its sign from Python's generator."""
    names = timm_policies.rand_augment_choices("", increasing)
    known = {
        "TranslateXRel": Op.TRANSLATE_X,
        "TranslateYRel": Op.TRANSLATE_Y,
        "SolarizeAdd": Op.SOLARIZE_ADD,
        **TORCHVISION,
    }
    ops = {name: known[name.removesuffix("Increasing")] for name in names}
    assert set(ops.values()) == set(RAND_OPS)
    for magnitude, (name, op) in itertools.product((0.0, 1.0, 3.3, 7.0, 7.9, 10.0), ops.items()):
        if not (level_of := timm_policies.LEVEL_TO_ARG[name]):
            continue
        random.seed(1)
        theirs = {level_of(magnitude, {})[0] for _ in range(30)}
        share = np.array([magnitude / 10] * 2)
        ours = rand_values(share, np.array([-1.0, 1.0]), increasing, side=1)[op]
        assert sorted(set(np.round(ours, 9))) == sorted(set(np.round(list(theirs), 9))), (name, magnitude)


def test_randaugment_draws_as_timm_does() -> None:
    theirs = timm_policies.rand_augment_transform("rand-m7-mstd0.5-inc1", {})
    cfg = AugmentConfig(policy="randaugment", policy_magnitude=7.0, policy_magnitude_std=0.5)
    assert (theirs.num_layers, len(theirs.ops)) == (cfg.policy_ops, len(RAND_OPS))
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in theirs.ops} == {(cfg.policy_probability, 7, 0.5)}
    op_KN, value_KN = drawn(cfg)
    probability = np.isin(np.arange(len(Op)), RAND_OPS) * cfg.policy_probability / len(RAND_OPS)
    probability[Op.IDENTITY] = 1 - cfg.policy_probability
    found = np.bincount(op_KN[0].astype(int) * len(Op) + op_KN[1], minlength=len(Op) ** 2)
    check_counts(found, np.outer(probability, probability).flatten())  # the two are independent
    level = np.abs(value_KN[op_KN == Op.ROTATE]) / 3
    assert abs(level.mean() - 7) < 0.05
    assert abs(level.std() - 0.5) < 0.03
    assert abs((np.abs(level - 7) < 0.5).mean() - 0.683) < 0.03
    assert abs((np.abs(level - 7) < 1.0).mean() - 0.954) < 0.02
    assert abs((value_KN[op_KN == Op.ROTATE] > 0).mean() - 0.5) < 0.04


def test_randaugments_magnitude_is_cut_at_ten_or_drawn_evenly() -> None:
    wide = drawn(AugmentConfig(policy="randaugment", policy_magnitude=10.0, policy_magnitude_std=3.0))
    shears = np.abs(wide[1][wide[0] == Op.SHEAR_X])
    assert shears.max() == 0.3
    assert 0.4 < (shears == 0.3).mean() < 0.6
    even = drawn(AugmentConfig(policy="randaugment", policy_magnitude=6.0, policy_magnitude_std=math.inf))
    level = np.abs(even[1][even[0] == Op.SHEAR_X]) / 0.03
    check_counts(np.histogram(level, 12, (0, 6))[0], np.full(12, 1 / 12))


@pytest.mark.parametrize(("ops", "probability"), [(1, 1.0), (3, 0.0), (16, 0.5)])
def test_number_and_probability_of_operations(ops: int, probability: float) -> None:
    cfg = AugmentConfig(policy="randaugment", policy_ops=ops, policy_probability=probability)
    op_KN, _ = drawn(cfg, 2000)
    assert len(op_KN) == ops
    assert abs((op_KN != Op.IDENTITY).mean() - probability) < 0.02


def test_jitter_is_torchvisions() -> None:
    """Factors even in 1 - s .. 1 + s, cut at 0; hue even around 0; all 24 orders alike; a strength of 0 is off."""
    op_KN, value_KN = drawn(AugmentConfig(colour_jitter=(0.4, 1.5, 0.3, 0.1)))
    orders = (op_KN.astype(int) * np.array([[1], [32], [1024], [32768]])).sum(axis=0)
    assert len(np.unique(orders)) == 24
    check_counts(np.unique(orders, return_counts=True)[1], np.full(24, 1 / 24))
    for op, low, high in zip(JITTER_OPS, (0.6, 0.0, 0.7, -0.1), (1.4, 2.5, 1.3, 0.1), strict=True):
        check_counts(np.histogram(value_KN[op_KN == op], 20, (low, high))[0], np.full(20, 1 / 20))
        assert (op_KN == op).sum() == IMAGES
    some, _ = drawn(AugmentConfig(colour_jitter=(0.4, 0.0, 0.3, 0.0), colour_jitter_probability=0.25))
    assert set(np.unique(some)) == {Op.IDENTITY, Op.BRIGHTNESS, Op.COLOUR}
    assert abs((some == Op.COLOUR).any(axis=0).mean() - 0.25) < 0.01
    assert np.array_equal((some == Op.COLOUR).any(axis=0), (some == Op.BRIGHTNESS).any(axis=0))


def reference_rectangle(rng: np.random.Generator, cfg: AugmentConfig) -> tuple[int, int, int, int] | None:
    """RandomErasing as torchvision documents it, one image."""
    for _ in range(10):
        area = SIDE * SIDE * rng.uniform(*cfg.erase_scale)
        ratio = math.exp(rng.uniform(*np.log(cfg.erase_ratio)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w < SIDE and h < SIDE:
            return int(rng.integers(0, SIDE - w + 1)), int(rng.integers(0, SIDE - h + 1)), w, h
    return None


def test_erased_rectangles_are_distributed_as_torchvisions() -> None:
    cfg = AugmentConfig(erase_probability=0.4, erase_scale=(0.02, 0.6))
    erased = erase_windows(0, 0, np.arange(IMAGES), SIDE, cfg)
    ours = np.stack([erased.x_N, erased.y_N, erased.width_N, erased.height_N]).astype(float)
    assert (ours[0] + ours[2]).max() <= SIDE
    assert (ours[1] + ours[3]).max() <= SIDE
    assert abs((ours[2] > 0).mean() - 0.4) < 0.01
    assert not ours[:, ours[2] == 0].any()
    ours = ours[:, ours[2] > 0]
    rng = np.random.Generator(np.random.PCG64(9))
    found = [rectangle for _ in range(ours.shape[1]) if (rectangle := reference_rectangle(rng, cfg))]
    for mine, reference in zip(ours, np.array(found).T.astype(float), strict=True):
        values = np.unique(np.concatenate([mine, reference]))
        shares = [np.searchsorted(np.sort(each), values, "right") / len(each) for each in (mine, reference)]
        assert np.abs(shares[0] - shares[1]).max() < 1.63 * math.sqrt(2 / len(mine)) * 1.3
    assert erased.noise_N.min() >= 0
    assert NOISE_PLACES * 0.99 < erased.noise_N.max() < NOISE_PLACES


def test_an_image_too_small_to_erase_stays() -> None:
    erased = erase_windows(0, 0, np.arange(100), 1, AugmentConfig(erase_probability=1.0))
    assert not erased.width_N.any()


def test_noise_is_as_good_as_normal_and_pure() -> None:
    strip = noise_strip(3, 200_000)
    assert np.array_equal(noise_strip(3, 1000), strip[:1000])
    assert not np.array_equal(noise_strip(4, 1000), strip[:1000])
    assert abs(strip.mean()) < 0.01
    assert abs(strip.std() - 1) < 0.01
    for bound, share in ((0.5, 0.3829), (1.0, 0.6827), (2.0, 0.9545)):
        assert abs((np.abs(strip) < bound).mean() - share) < 0.006
    for apart in (1, 3, 224):
        assert abs(np.corrcoef(strip[:-apart], strip[apart:])[0, 1]) < 0.01


def test_the_machine_free_sine_agrees_with_libm() -> None:
    x = np.linspace(-math.pi, math.pi, 1001)
    sin, cos = sin_cos(x)
    assert np.abs(sin - np.sin(x)).max() < 1e-12
    assert np.abs(cos - np.cos(x)).max() < 1e-12


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"colour_jitter": [0.1, 0.1, 0.1, 0.6]}, "hue"),
        ({"colour_jitter": [0.1, 0.1, -0.1, 0.1]}, "greater than or equal to 0"),
        ({"policy": "randaug"}, "randaugment"),
        ({"policy_magnitude": 11.0}, "less than or equal to 10"),
        ({"policy_ops": 17}, "less than or equal to 16"),
        ({"erase_scale": [0.5, 0.2]}, "erase_scale"),
        ({"erase_ratio": [0.0, 2.0]}, "erase_ratio"),
    ],
)
def test_wrong_keys_are_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AugmentConfig.model_validate(keys)


@pytest.mark.parametrize(
    "key", [k for k in AugmentConfig.model_fields if k.split("_")[0] in ("colour", "policy", "erase")]
)
def test_a_changed_key_is_another_recipe(key: str) -> None:
    other = {
        "colour_jitter": [0.1, 0, 0, 0],
        "policy": "autoaugment",
        "policy_ops": 3,
        "policy_increasing": False,
        "policy_fill": "zero",
        "erase_scale": [0.1, 0.2],
        "erase_ratio": [0.5, 2.0],
        "erase_fill": "noise",
    }.get(key, 0.75)
    changed = RunConfig.model_validate({"name": "x", "data": {"augment": {key: other}}})
    (difference,) = recipe_differences(RunConfig(name="x"), changed)
    assert difference.startswith(f"data.augment.{key}:")


GOLDEN_OPS = [[6, 8, 8], [10, 7, 7], [8, 10, 10], [7, 6, 6], [3, 3, 0], [0, 2, 3]]
GOLDEN_VALUES = [
    [1.24929, 0.8566, 0.70271],
    [-0.05572, 0.82408, 1.13127],
    [1.02855, 0.03347, 0.06112],
    [1.06572, 0.78271, 0.8901],
    [87.48581, 94.00146, 0.0],
    [0.0, -0.25553, 90.26852],
]
GOLDEN_RECTANGLES = [
    [77, 3, 147, 66, 61983],
    [26, 63, 58, 41, 13902],
    [17, 129, 180, 84, 20426],
    [75, 31, 125, 80, 171],
]
