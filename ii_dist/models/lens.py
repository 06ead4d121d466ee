"""The lens: convolution without padding over a pseudo-image, norm, mean over filters, with no activation between.

In: image_N1HW. Out: view_Nhw. What comes out is linear in the image once the norm's statistics are known, so the m
filters are one: with P = kh * kw taps, mean and covariance of the P-vectors of all patches give mean and variance of
every filter's output (w.mu and w'Sw), hence the norm, hence one filter and one shift. `Lens` computes it so, with P x P
statistics instead of m maps, forward and backward; its parameters and running statistics are those of the plain form,
which is kept (`form="plain"`). `fuse` makes the evaluation form permanent: one convolution.

    patches_PL    all patches of a batch of images, one row a tap (L = N * h * w)
    _PatchLens    the training form, with its gradients written out
    _traced       the same in autograd's own operators: for compilers, and for statistics over ranks
"""

import contextlib
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ii_dist.config.networks import LENS_FORMS


class Lens(nn.Module):
    """`filters` filters of `kernel_size` taps, seen as one.

    form: "one_filter", or "plain" for convolution, norm and mean one after the other: the same numbers, slower.
    positive: start with weights above 0 (see `ii_dist.models.gates`, the dead gate).
    Forward hooks on `conv` and `norm` are called in the plain form only. After
    `nn.SyncBatchNorm.convert_sync_batchnorm(network)` the statistics are those of all ranks, on any device. The
    one-filter form has first gradients; for gradients of gradients take the plain form.
    """

    def __init__(
        self, filters: int, kernel_size: int | tuple[int, int], form: str = "one_filter", positive: bool = False
    ) -> None:
        super().__init__()
        assert form in LENS_FORMS, form
        self.form = form
        self.conv = nn.Conv2d(1, filters, kernel_size, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(filters)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")  # as the authors' convolutions
        if positive:
            with torch.no_grad():
                self.conv.weight.abs_()

    def forward(self, image_N1HW: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.Identity):  # fused
            view_Nhw: Tensor = self.conv(image_N1HW)[:, 0]
        elif self.form == "plain":
            view_Nhw = norm(self.conv(image_N1HW)).mean(1)
        elif norm.training or norm.running_mean is None:
            with _full_precision(image_N1HW):
                view_Nhw = self._view_of_batch(_wide(image_N1HW[:, 0])).to(image_N1HW.dtype)
        else:
            weight_11kk, bias_1 = self.one_filter()
            view_Nhw = F.conv2d(image_N1HW, weight_11kk.to(image_N1HW), bias_1.to(image_N1HW))[:, 0]
        return view_Nhw

    def one_filter(self) -> tuple[Tensor, Tensor]:
        """Weight_11kk and bias_1 of the convolution that the lens is in evaluation, float32 or wider."""
        norm: Any = self.norm
        weight_mP = _wide(self.conv.weight.flatten(1))
        scale_m = _wide(norm.weight) * torch.rsqrt(_wide(norm.running_var) + norm.eps) / len(weight_mP)
        bias = _wide(norm.bias).mean() - scale_m @ _wide(norm.running_mean)
        return (scale_m @ weight_mP).view(1, 1, *self.conv.kernel_size), bias[None]

    @torch.no_grad()
    def fuse(self) -> Self:
        """Become one convolution for good: `conv` with one filter and a bias, `norm` an identity.

        The state dict is then conv.weight_11kk and conv.bias_1; there are no statistics left to train. Does nothing the
        second time.
        """
        if isinstance(self.norm, nn.Identity):
            return self
        old, (weight_11kk, bias_1) = self.conv.weight, self.one_filter()
        self.conv = nn.Conv2d(1, 1, self.conv.kernel_size, device=old.device, dtype=old.dtype)  # type: ignore[arg-type]
        self.conv.weight.copy_(weight_11kk)
        self.conv.bias.copy_(bias_1)  # type: ignore[union-attr]
        self.conv.requires_grad_(old.requires_grad)
        self.norm = nn.Identity()
        return self.train(self.training)

    def _view_of_batch(self, image_NHW: Tensor) -> Tensor:
        norm: Any = self.norm
        group = _ranks_of(norm)
        weight_mkk, gain_m, shift_m = (_wide(p) for p in (self.conv.weight[:, 0], norm.weight, norm.bias))
        patches = _patch_count(image_NHW, weight_mkk)
        if patches == 1 and group is None:
            raise ValueError(f"a lens that trains needs more than 1 patch for its statistics, got {image_NHW.shape}")
        if group is not None or torch.compiler.is_compiling():
            view_Nhw, mean_m, var_m, count = _traced(image_NHW, weight_mkk, gain_m, shift_m, norm.eps, group)
        else:
            count = patches
            view_Nhw, mean_m, var_m = _PatchLens.apply(  # type: ignore[no-untyped-call]
                image_NHW, weight_mkk, gain_m, shift_m, norm.eps
            )
        if norm.training and norm.track_running_stats:
            _track(norm, mean_m, var_m, count)
        return view_Nhw

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the network to its device, dtype and memory format.

        With one input channel the weight is channels_last and plain at once; only its strides choose the kernel. Kept
        plain, the convolution takes a third of the time on CPU. Gradient and momentum then get the same strides.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight = self.conv.weight
        weight.data = weight.data.flatten(1).view(weight.shape)
        return self


def fuse_lenses(model: nn.Module) -> int:
    """Make every lens of `model` one convolution, for evaluation and export, in place; returns how many there are."""
    lenses = [module for module in model.modules() if isinstance(module, Lens)]
    for lens in lenses:
        lens.fuse()
    return len(lenses)


# One filter, training form -------------------------------------------------------------------------------------------


def patches_PL(image_NHW: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Every patch of every image, one row a tap: P = kh * kw rows, L = N * (H - kh + 1) * (W - kw + 1) columns."""
    (kh, kw), (_, height, width) = kernel_size, image_NHW.shape
    h, w = height - kh + 1, width - kw + 1
    return torch.stack([image_NHW[:, a : a + h, b : b + w] for a in range(kh) for b in range(kw)]).view(kh * kw, -1)


class _PatchLens(torch.autograd.Function):
    """view_Nhw of the one filter, and mean_m and var_m (biased) of the m filters' outputs, without gradient.

    Kept for the backward pass: the images and some numbers a filter. Patches are centred before they are multiplied.
    """

    @staticmethod
    def forward(
        ctx: Any, image_NHW: Tensor, weight_mkk: Tensor, gain_m: Tensor, shift_m: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_mP, kernel = weight_mkk.flatten(1), (weight_mkk.shape[1], weight_mkk.shape[2])
        filters = len(weight_mP)
        x_PL = patches_PL(image_NHW, kernel)
        mean_P = x_PL.mean(1)
        x_PL -= mean_P[:, None]
        toward_mP = (weight_mP @ (x_PL @ x_PL.T)).div_(x_PL.shape[1])  # w' S
        var_m = (toward_mP * weight_mP).sum(1)
        inverse_m = torch.rsqrt(var_m + eps)
        scale_m = gain_m * inverse_m / filters
        filter_P = scale_m @ weight_mP
        view_L = torch.addmv(shift_m.mean(), x_PL.T, filter_P)
        mean_m = weight_mP @ mean_P
        ctx.save_for_backward(image_NHW, mean_P, weight_mP, toward_mP, gain_m, inverse_m, scale_m, filter_P)
        ctx.kernel = kernel
        ctx.mark_non_differentiable(mean_m, var_m)
        return view_L.view(_view_shape(image_NHW, kernel)), mean_m, var_m

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_Nhw: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with _full_precision(grad_Nhw):
            return _patch_lens_gradients(grad_Nhw.reshape(-1), ctx.kernel, ctx.needs_input_grad[0], *ctx.saved_tensors)


def _patch_lens_gradients(
    grad_L: Tensor, kernel: tuple[int, int], for_image: bool, image_NHW: Tensor, mean_P: Tensor, *numbers: Tensor
) -> tuple[Tensor | None, ...]:
    weight_mP, toward_mP, gain_m, inverse_m, scale_m, filter_P = numbers
    filters, count, total = len(weight_mP), len(grad_L), grad_L.sum()
    x_PL = patches_PL(image_NHW, kernel)
    x_PL -= mean_P[:, None]
    grad_filter_P = x_PL @ grad_L
    grad_scale_m = weight_mP @ grad_filter_P
    grad_gain_m = grad_scale_m * inverse_m / filters
    grad_var_m = grad_gain_m * gain_m * inverse_m.square() * -0.5
    grad_weight_mP = torch.addr(toward_mP * (2 * grad_var_m)[:, None], scale_m, grad_filter_P)
    grad_image = None
    if for_image:
        # 2/L dL/dS x + filter (grad - its mean): the mean goes because x is centred.
        twice_grad_cov_PP = (weight_mP * grad_var_m[:, None]).T @ weight_mP * (2 / count)
        grad_x_PL = twice_grad_cov_PP @ x_PL
        grad_x_PL.addr_(filter_P, grad_L - total / count)
        grad_image = _add_patches(grad_x_PL, image_NHW, kernel)
    grad_shift_m = (total / filters).expand(filters)
    return grad_image, grad_weight_mP.view(filters, *kernel), grad_gain_m, grad_shift_m, None


def _add_patches(x_PL: Tensor, image_NHW: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The transpose of `patches_PL`: each patch added where it came from."""
    _, h, w = _view_shape(image_NHW, kernel)
    sum_NHW = torch.zeros_like(image_NHW, memory_format=torch.contiguous_format)
    for tap, part_Nhw in enumerate(x_PL.view(-1, len(image_NHW), h, w)):
        a, b = divmod(tap, kernel[1])
        sum_NHW[:, a : a + h, b : b + w] += part_Nhw
    return sum_NHW


def _traced(
    image_NHW: Tensor,
    weight_mkk: Tensor,
    gain_m: Tensor,
    shift_m: Tensor,
    eps: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """`_PatchLens` by autograd, over the patches of all ranks of `group`; the last result is their number."""
    weight_mP, kernel = weight_mkk.flatten(1), (weight_mkk.shape[1], weight_mkk.shape[2])
    x_PL = patches_PL(image_NHW, kernel)
    mean_P = x_PL.mean(1)
    x_PL = x_PL - mean_P[:, None]
    here_m = weight_mP @ mean_P
    mean_m, var_m = here_m, ((weight_mP @ (x_PL @ x_PL.T) / x_PL.shape[1]) * weight_mP).sum(1)
    count: Any = x_PL.shape[1]
    if group is not None:
        mean_m, var_m, count = _over_ranks(mean_m, var_m, count, group)
    scale_m = gain_m * torch.rsqrt(var_m + eps) / len(weight_mP)
    view_L = (scale_m @ weight_mP) @ x_PL + (shift_m.mean() + scale_m @ (here_m - mean_m))
    return view_L.view(_view_shape(image_NHW, kernel)), mean_m.detach(), var_m.detach(), count


# Statistics ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _track(norm: Any, mean_m: Tensor, var_m: Tensor, count: Any) -> None:
    """Move running statistics as torch's batch norm does: the variance it keeps is the unbiased one."""
    norm.num_batches_tracked.add_(1)
    share = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.item()
    norm.running_mean.lerp_(mean_m.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_((var_m * (count / (count - 1))).to(norm.running_var.dtype), share)


def _ranks_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that share a norm's statistics; None for this process alone."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group: dist.ProcessGroup | None = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _over_ranks(mean_m: Tensor, var_m: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of all ranks' values, from each rank's own; ranks may have different numbers."""
    row = torch.cat([mean_m.new_full((1,), count), mean_m, var_m])
    rows_RF: Tensor = _GatherRows.apply(row, group)  # type: ignore[no-untyped-call]
    count_R1, means_Rm, vars_Rm = torch.split(rows_RF, [1, len(mean_m), len(var_m)], dim=1)
    total = count_R1.sum()
    share_R1 = count_R1 / total
    mean = (share_R1 * means_Rm).sum(0)
    var = (share_R1 * (vars_Rm + (means_Rm - mean).square())).sum(0)
    return mean, var, total.detach()


class _GatherRows(torch.autograd.Function):
    """Every rank's row, on every rank; backward: the sum of all ranks' gradients of this rank's row."""

    @staticmethod
    def forward(ctx: Any, row_F: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        rows = [torch.empty_like(row_F) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, row_F.contiguous(), group=group)
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None]:
        grad_RF = grad_RF.contiguous()
        dist.all_reduce(grad_RF, group=ctx.group)
        return grad_RF[dist.get_rank(ctx.group)], None


# Shapes and dtypes ---------------------------------------------------------------------------------------------------


def _view_shape(image_NHW: Tensor, kernel: tuple[int, int]) -> tuple[int, int, int]:
    batch, height, width = image_NHW.shape
    return batch, height - kernel[0] + 1, width - kernel[1] + 1


def _patch_count(image_NHW: Tensor, weight_mkk: Tensor) -> int:
    batch, h, w = _view_shape(image_NHW, (weight_mkk.shape[1], weight_mkk.shape[2]))
    return batch * h * w


def _wide(x: Tensor) -> Tensor:
    """float32 for half precision: statistics of so few numbers cost nothing."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast inside; most often there is none, and entering a context costs more than asking.

    (A compiler traces the backward pass with the autocast of the forward pass, whatever stands here.)
    """
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
