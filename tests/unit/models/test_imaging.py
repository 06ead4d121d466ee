"""Layout of the pseudo-images and the pooling that feeds them."""

import pytest
import torch

from ii_dist.config.networks import fold_shape
from ii_dist.models.imaging import channel_signals, fold_image, pair_image

U8 = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7], [70.0, 71, 72, 73, 74, 75, 76, 77]])


def test_pairs_of_four_channels_written_out() -> None:
    u = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expected = torch.tensor([[[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]]])
    assert torch.equal(pair_image(u, 10 * u), expected)


def test_four_channels_in_two_columns_written_out() -> None:
    u = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expected = torch.tensor([[[[1.0, 2.0], [10.0, 20.0], [3.0, 4.0], [30.0, 40.0]]]])
    assert torch.equal(fold_image(u, 10 * u, 2), expected)


def test_four_channels_in_four_groups_written_out() -> None:
    u = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expected = torch.tensor([[[[1.0], [10.0], [2.0], [20.0], [3.0], [30.0], [4.0], [40.0]]]])
    assert torch.equal(fold_image(u, 10 * u, 4, "groups"), expected)


def test_eight_channels_in_four_columns_two_samples_written_out() -> None:
    expected = torch.tensor(
        [
            [[[0.0, 1, 2, 3], [-0.0, -1, -2, -3], [4, 5, 6, 7], [-4, -5, -6, -7]]],
            [[[70.0, 71, 72, 73], [-70, -71, -72, -73], [74, 75, 76, 77], [-74, -75, -76, -77]]],
        ]
    )
    assert torch.equal(fold_image(U8, -U8, 4, "columns"), expected)


def test_eight_channels_in_four_groups_written_out() -> None:
    expected = torch.tensor([[[[0.0, 1], [-0.0, -1], [2, 3], [-2, -3], [4, 5], [-4, -5], [6, 7], [-6, -7]]]])
    assert torch.equal(fold_image(U8[:1], -U8[:1], 4, "groups"), expected)


def test_eight_channels_in_one_group_written_out() -> None:
    expected = torch.tensor([[[[0.0, 1, 2, 3, 4, 5, 6, 7], [-0.0, -1, -2, -3, -4, -5, -6, -7]]]])
    assert torch.equal(fold_image(U8[:1], -U8[:1], 1, "groups"), expected)


@pytest.mark.parametrize(
    ("channels", "k"), [(64, 16), (64, 8), (24, 3), (256, 16), (12, 12), (160, 10), (640, 10), (8, 1)]
)
def test_folds_equal_the_authors_equations_by_loops(channels: int, k: int) -> None:
    """Theirs: signals paired (residual, identity) innermost, then (N, C/k, k, 2), or (N, k, C/k, 2) for groups, the
    last two axes swapped, and flattened into rows."""
    u, v = torch.randn(2, channels), torch.randn(2, channels)
    for layout, runs, width in (("columns", channels // k, k), ("groups", k, channels // k)):
        expected = torch.full((2, 1, 2 * runs, width), torch.nan)
        for n in range(2):
            flat = []
            for run in range(runs):
                for signals in (u, v):
                    for place in range(width):
                        flat.append(signals[n, run * width + place].item())
            for i, value in enumerate(flat):
                expected[n, 0, i // width, i % width] = value
        assert torch.equal(fold_image(u, v, k, layout), expected)
        assert fold_shape(channels, k, layout) == (2 * runs, width)


@pytest.mark.parametrize("layout", ["columns", "groups"])
def test_gradients_go_back_to_their_signals(layout: str) -> None:
    u, v = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(lambda a, b: fold_image(a, b, 4, layout), (u, v))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_signals_are_means_and_their_gradient_is_spread_evenly(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    signals = channel_signals(x)
    for n in range(2):
        for c in range(3):
            by_hand = sum(x[n, c, i, j].item() for i in range(5) for j in range(7)) / 35
            assert signals[n, c].item() == pytest.approx(by_hand, rel=1e-12)
    grad = torch.randn(2, 3, dtype=torch.float64)
    (x_grad,) = torch.autograd.grad(signals, x, grad)
    torch.testing.assert_close(x_grad, (grad / 35)[:, :, None, None].expand(2, 3, 5, 7), rtol=1e-15, atol=0)
    assert torch.autograd.gradcheck(channel_signals, (x,))
    assert torch.autograd.gradgradcheck(channel_signals, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signals_of_half_precision_are_summed_in_float(dtype: torch.dtype) -> None:
    x = torch.full((1, 2, 112, 112), 60.0, dtype=dtype)  # the sum, 752640, is beyond float16
    assert torch.equal(channel_signals(x), torch.full((1, 2), 60.0, dtype=dtype))
    noisy = 1 + torch.rand(1, 8, 56, 56)
    exact = noisy.to(dtype).double().mean((2, 3))
    torch.testing.assert_close(channel_signals(noisy.to(dtype)).double(), exact, rtol=2**-8, atol=0)


def test_the_gradient_of_a_sum_with_a_signal_keeps_channels_last() -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    (x * channel_signals(x)[:, :, None, None]).sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
