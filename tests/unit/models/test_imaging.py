"""Layout of the pseudo-image and the pooling that feeds it."""

import pytest
import torch

from ii_dist.models.imaging import channel_signals, fold_columns, fold_columns_shape


def test_four_channels_two_columns_written_out() -> None:
    u = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    v = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    expected = torch.tensor([[[[1.0, 2.0], [10.0, 20.0], [3.0, 4.0], [30.0, 40.0]]]])
    assert torch.equal(fold_columns(u, v, width=2), expected)


def test_eight_channels_four_columns_two_samples_written_out() -> None:
    u = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7], [70.0, 71, 72, 73, 74, 75, 76, 77]])
    expected = torch.tensor(
        [
            [[[0.0, 1, 2, 3], [-0.0, -1, -2, -3], [4, 5, 6, 7], [-4, -5, -6, -7]]],
            [[[70.0, 71, 72, 73], [-70, -71, -72, -73], [74, 75, 76, 77], [-74, -75, -76, -77]]],
        ]
    )
    assert torch.equal(fold_columns(u, -u, width=4), expected)


@pytest.mark.parametrize(("channels", "width"), [(64, 16), (64, 8), (24, 3), (256, 16), (12, 12)])
def test_fold_equals_the_authors_equation_by_loops(channels: int, width: int) -> None:
    u, v = torch.randn(2, channels), torch.randn(2, channels)
    # Theirs: (N, C/k, k, 2) with (residual, identity) innermost, last two axes swapped, then (2C/k, k).
    height = 2 * channels // width
    expected = torch.full((2, 1, height, width), torch.nan)
    for n in range(2):
        for channel in range(channels):
            group, column = divmod(channel, width)
            for flow, signals in enumerate((u, v)):
                flat = (group * 2 + flow) * width + column
                expected[n, 0, flat // width, flat % width] = signals[n, channel]
    assert torch.equal(fold_columns(u, v, width), expected)
    assert fold_columns_shape(channels, width) == (height, width)


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
