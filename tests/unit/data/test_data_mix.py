"""Mixup and CutMix: distributed as in the papers, pure, and the same bits on every way of doing it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ii_dist.config import AugmentConfig
from ii_dist.data.counter import key, uniform
from ii_dist.data.exact_math import exp, log, power, quarter_cosine
from ii_dist.data.mix import Mixing, draw_mixing, partners_of, symmetric_beta
from ii_dist.data.mix_images import mix_batch, mix_pair

COUNT = 20_000
BOTH = AugmentConfig(mixup_alpha=0.2, cutmix_alpha=1.0)


def largest_gap(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Two-sample Kolmogorov-Smirnov distance of samples of the same length."""
    values = np.concatenate([mine, theirs])
    gap = np.searchsorted(np.sort(mine), values, "right") - np.searchsorted(np.sort(theirs), values, "right")
    return float(np.abs(gap).max() / len(mine))


AT_MOST = 1.63 * math.sqrt(2 / COUNT)  # 1 %


def test_machine_free_functions_agree_with_libm() -> None:
    x = np.linspace(-5, 5, 1001)
    assert np.allclose(exp(x), np.exp(x), rtol=1e-12, atol=0)
    for value in (0.01, 0.5, 0.75, 1.0, 4 / 3, 2.0, 50.0):
        assert math.isclose(log(value), math.log(value), rel_tol=1e-12, abs_tol=1e-12)
    share = np.concatenate([np.linspace(0, 1, 1001), [1 - 2.0**-53]])
    assert np.allclose(quarter_cosine(share), np.cos(share * math.pi / 2), rtol=0, atol=1e-13)
    base = np.concatenate([np.linspace(1e-6, 1, 1001), 2.0 ** -np.arange(54.0), [math.sqrt(0.5), 1 - 2.0**-53]])
    for exponent in (0.0, 0.5, 1.0, 1.25, 5.0, 18.0):
        assert np.allclose(power(base, exponent), base**exponent, rtol=2e-12, atol=1e-300), exponent
    assert power(np.array([1e-300, 0.5, 1.0]), 1e12).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 3.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha: float) -> None:
    counter = np.arange(COUNT, dtype=np.uint64)
    mine = symmetric_beta(alpha, *(uniform(key(4, stream), counter) for stream in (1, 2, 3)))
    theirs = np.random.Generator(np.random.PCG64(8)).beta(alpha, alpha, COUNT)
    assert min(mine.min(), 1 - mine.max()) >= 0
    # Rounded: shares that differ from 0 or 1 by less than a float can tell are no others.
    assert largest_gap(mine.round(9), theirs.round(9)) < AT_MOST
    assert mine.mean() == pytest.approx(0.5, abs=0.01)
    assert mine.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_the_corners_of_the_draws_give_shares_too() -> None:
    corners = np.array([0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
    for alpha in (1e-12, 0.05, 1.0, 1e6):
        shares = symmetric_beta(alpha, *(axis.reshape(-1) for axis in np.meshgrid(corners, corners, corners)))
        assert np.isfinite(shares).all()
        assert ((shares >= 0) & (shares <= 1)).all()


def test_cutmix_boxes_are_the_papers() -> None:
    """Boxes and areas drawn once more, one by one, with numpy's own generator."""
    side, rng = 32, np.random.Generator(np.random.PCG64(5))
    mixing = draw_mixing(1, 0, np.arange(COUNT), side, AugmentConfig(cutmix_alpha=1.0))
    theirs = []
    for _ in range(COUNT):
        length = int(side * math.sqrt(1 - rng.beta(1, 1)))
        x, y = int(rng.integers(side)), int(rng.integers(side))
        left, top = max(0, x - length // 2), max(0, y - length // 2)
        right, bottom = min(side, x - length // 2 + length), min(side, y - length // 2 + length)
        theirs.append((left, top, right, bottom, 1 - (right - left) * (bottom - top) / side**2))
    mine = np.concatenate([mixing.box_N4, mixing.label_share_N[:, None]], axis=1).astype(np.float64)
    for column, reference in zip(mine.T, np.array(theirs).T, strict=True):
        assert largest_gap(column, reference) < AT_MOST * 1.3  # with room for ties
    assert (mixing.own_N == 1).all()
    seen_N = (mixing.box_N4[:, 2:] - mixing.box_N4[:, :2]).prod(1)
    assert (mixing.label_share_N == (1 - seen_N / side**2).astype(np.float32)).all()


@pytest.mark.parametrize(
    ("cfg", "mixup", "cutmix"),
    [
        (AugmentConfig(mixup_alpha=1.0), 1.0, 0.0),
        (AugmentConfig(cutmix_alpha=1.0), 0.0, 1.0),
        (AugmentConfig(mixup_alpha=1.0, cutmix_alpha=1.0, mix_switch_probability=0.3), 0.7, 0.3),
        (AugmentConfig(mixup_alpha=1.0, cutmix_alpha=1.0, mix_probability=0.4), 0.2, 0.2),
        (AugmentConfig(mixup_alpha=1.0, mix_probability=0.25), 0.25, 0.0),
    ],
)
def test_probabilities_are_kept(cfg: AugmentConfig, mixup: float, cutmix: float) -> None:
    mixing = draw_mixing(2, 1, np.arange(COUNT), 640, cfg)
    empty = (mixing.box_N4[:, 2] == mixing.box_N4[:, 0]) | (mixing.box_N4[:, 3] == mixing.box_N4[:, 1])
    assert (mixing.own_N < 1).mean() == pytest.approx(mixup, abs=0.012)
    assert (~empty).mean() == pytest.approx(cutmix, abs=0.012)
    alone = empty & (mixing.own_N == 1)
    assert (mixing.label_share_N[alone] == 1).all()
    assert not ((mixing.own_N < 1) & ~empty).any()


def test_a_draw_depends_on_seed_epoch_and_row_alone() -> None:
    rows = np.random.Generator(np.random.PCG64(3)).permutation(500)
    whole = draw_mixing(3, 7, rows, 64, BOTH)
    for place in (0, 111, 499):
        one = draw_mixing(3, 7, rows[place : place + 1], 64, BOTH)
        assert one.own_N[0] == whole.own_N[place]
        assert (one.box_N4[0] == whole.box_N4[place]).all()
        assert one.label_share_N[0] == whole.label_share_N[place]
    for other in (draw_mixing(4, 7, rows, 64, BOTH), draw_mixing(3, 8, rows, 64, BOTH)):
        assert (other.label_share_N != whole.label_share_N).mean() > 0.7
    assert partners_of(np.array([5, 6, 7, 8])).tolist() == [6, 5, 8, 7]


def test_draws_never_change_by_accident() -> None:
    found = draw_mixing(7, 3, np.arange(4, 9), 224, BOTH)
    assert found.own_N.view(np.uint32).tolist() == GOLDEN_OWN
    assert found.box_N4.tolist() == GOLDEN_BOXES


GOLDEN_OWN = [1065353216, 1064870440, 998789496, 1065353216, 1065320638]  # the bits of float32 numbers
GOLDEN_BOXES = [[40, 66, 107, 133], [172, 223, 172, 223], [148, 119, 148, 119], [0, 69, 214, 224], [110, 147, 110, 147]]


def by_hand(images_NHWC: NDArray[np.float32], mixing: Mixing) -> NDArray[np.float64]:
    """The definitions, pixel by pixel."""
    mixed = images_NHWC.astype(np.float64)
    for i in range(len(mixed)):
        own, partner = images_NHWC[i].astype(np.float64), images_NHWC[i ^ 1].astype(np.float64)
        left, top, right, bottom = mixing.box_N4[i]
        for y in range(own.shape[0]):
            for x in range(own.shape[1]):
                inside = left <= x < right and top <= y < bottom
                share = float(mixing.own_N[i])
                mixed[i, y, x] = partner[y, x] if inside else share * own[y, x] + (1 - share) * partner[y, x]
    return mixed


@given(seed=st.integers(0, 99), probability=st.sampled_from([0.5, 1.0]), pairs=st.integers(1, 4))
def test_pairs_in_threads_and_whole_batches_give_the_same_bits(seed: int, probability: float, pairs: int) -> None:
    cfg = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=0.8, mix_probability=probability)
    side = 9
    mixing = draw_mixing(seed, 0, np.arange(2 * pairs) + seed, side, cfg)
    images = np.random.Generator(np.random.PCG64(seed)).normal(size=(2 * pairs, side, side, 3)).astype(np.float32)
    last, planar = images.copy(), np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    for pair in range(pairs):
        mix_pair(last, mixing, pair, channels_last=True)
        mix_pair(planar, mixing, pair, channels_last=False)
    assert np.abs(last - by_hand(images, mixing)).max() < 1e-6
    assert last.tobytes() == np.ascontiguousarray(planar.transpose(0, 2, 3, 1)).tobytes()
    for memory_format in (torch.channels_last, torch.contiguous_format):
        given_NCHW = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        found = mix_batch(given_NCHW, torch.from_numpy(mixing.own_N), torch.from_numpy(mixing.box_N4))
        assert found.is_contiguous(memory_format=memory_format)
        assert found.permute(0, 2, 3, 1).contiguous().numpy().tobytes() == last.tobytes()
