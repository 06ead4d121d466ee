"""The operations of `policies.Op` on uint8 images, each image with a value of its own.

In: images of one batch that get the same operation, N x 3 x H x W, and what `policies.operands` says, N x 6, float32 on
their device. Out: new images, uint8.

The pixels are those of torchvision's kernels for uint8 tensors (solarize_add: timm's), to the last bit or one level
aside where a product and a sum are rounded once there and twice here. Whatever is summed over an image is summed in
whole numbers, so that neither threads nor the other images of a batch change a bit, and nothing waits for the device.
On the CPU an image is worked on some rows at a time, for the reason that stands at `SERIAL_VALUES`.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from ii_dist.data.policies import GEOMETRIC, Op

# torch starts threads of its own, for each thread of ours, where an elementwise operation has more values than this,
# and with floor, round, aminmax and x[index] long before: these are not used here.
SERIAL_VALUES = 32768

Images = torch.Tensor  # uint8, N x 3 x H x W
Factor = torch.Tensor  # float32, N x 1 x 1 x 1


def apply(op: Op, images_NCHW: Images, operand_N6: torch.Tensor, fill_C: torch.Tensor) -> Images:
    """`images_NCHW` after `op`; the argument stays as it was. fill_C: what moves in from outside, 0 .. 255, float32."""
    if op in GEOMETRIC:
        return _moved(images_NCHW, operand_N6, fill_C)
    return _OPERATIONS[op](images_NCHW, operand_N6[:, 0, None, None, None])


def pieces(images: torch.Tensor, axis: int = -2) -> list[torch.Tensor]:
    """Views of some rows (`axis`) of the images each, small enough for one thread; on a GPU all rows at once."""
    if images.device.type != "cpu":
        return [images]
    rows = images.shape[axis]
    rows_at_once = max(1, SERIAL_VALUES * rows // max(1, images.numel()))
    return list(images.chunk(-(-rows // rows_at_once), axis))


def normalizing(mean: Sequence[float], std: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """What is taken from the pixels (0 .. 255) of each channel, and what the rest is multiplied by, 3 x 1 x 1 each."""
    mean_C = (torch.tensor(mean, dtype=torch.float64) * 255).float()
    scale_C = (1 / (torch.tensor(std, dtype=torch.float64) * 255)).float()
    return mean_C[:, None, None], scale_C[:, None, None]


def _pointwise(images_NCHW: Images, change: Callable[[torch.Tensor], torch.Tensor]) -> Images:
    """`change` applied to all pixels, by rows; what it returns is cut to whole numbers."""
    out_NCHW = torch.empty_like(images_NCHW)
    for out, part in zip(pieces(out_NCHW), pieces(images_NCHW), strict=True):
        out.copy_(change(part))
    return out_NCHW


def _grey(images_NCHW: Images) -> torch.Tensor:
    """Luminance, N x 1 x H x W, float32 whole numbers, cut: 0.2989 R + 0.587 G + 0.114 B without a rounding error."""
    r, g, b = images_NCHW.float().unbind(1)
    return r.mul_(2989).add_(g.mul_(5870)).add_(b.mul_(1140)).div_(10000).int().float()[:, None]


def _brightness(images_NCHW: Images, factor: Factor) -> Images:
    return _pointwise(images_NCHW, lambda part: (part * factor).clamp_(0, 255))


def _colour(images_NCHW: Images, factor: Factor) -> Images:
    return _pointwise(images_NCHW, lambda part: (part * factor).add_(_grey(part).mul_(1 - factor)).clamp_(0, 255))


def _contrast(images_NCHW: Images, factor: Factor) -> Images:
    pixels = images_NCHW.shape[-2] * images_NCHW.shape[-1]
    sums = [_grey(part).sum((1, 2, 3), keepdim=True, dtype=torch.float64) for part in pieces(images_NCHW)]
    grey = (torch.stack(sums).sum(0) / pixels).float() * (1 - factor)
    return _pointwise(images_NCHW, lambda part: (part * factor).add_(grey).clamp_(0, 255))


def _sharpness(images_NCHW: Images, factor: Factor) -> Images:
    """Blend with, or away from, the mean of 3 x 3 pixels in which the middle counts five times; the rim stays."""
    height, width = images_NCHW.shape[-2:]
    if min(height, width) < 3:
        return images_NCHW
    out_NCHW = torch.empty_like(images_NCHW)
    out_NCHW[..., 0, :], out_NCHW[..., -1, :] = images_NCHW[..., 0, :], images_NCHW[..., -1, :]
    first = 1
    for out in pieces(out_NCHW[..., 1:-1, :]):
        rows = images_NCHW[..., first - 1 : first + out.shape[-2] + 1, :].float()
        first += out.shape[-2]
        sums = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
        middle = rows[..., 1:-1, 1:-1]
        blurred = (sums[..., :-2] + sums[..., 1:-1]).add_(sums[..., 2:]).add_(4 * middle).div_(13)
        blurred = blurred.add_(0.5).int().float()  # a thirteenth is never a half
        out[..., 1:-1] = blurred.sub_(middle).mul_(1 - factor).add_(middle).clamp_(0, 255)
        out[..., 0], out[..., -1] = rows[..., 1:-1, 0], rows[..., 1:-1, -1]
    return out_NCHW


def _hue(images_NCHW: Images, turns: Factor) -> Images:
    return _pointwise(images_NCHW, lambda part: _turned(part.float().div_(255), turns).mul_(256 - 1e-3))


def _turned(rgb: torch.Tensor, turns: Factor) -> torch.Tensor:
    """Colours (0 .. 1) with the hue moved on the circle; value and saturation of HSV stay."""
    r, g, b = rgb[:, 0:1], rgb[:, 1:2], rgb[:, 2:3]
    low, high = torch.minimum(torch.minimum(r, g), b), torch.maximum(torch.maximum(r, g), b)
    span = high - low
    by = torch.where(span == 0, 1, span)
    # Where on the circle of six colours a pixel stands: at 0 red, at 2 green, at 4 blue.
    sixth = torch.where(high == r, (g - b) / by, torch.where(high == g, (b - r) / by + 2, (r - g) / by + 4))
    from_5_3_1 = torch.arange(5, 0, -2, device=rgb.device)[:, None, None]
    at = (sixth + turns * 6 + from_5_3_1).remainder_(6)
    return high - span * torch.minimum(at, 4 - at).clamp_(0, 1)


def _posterize(images_NCHW: Images, kept_bits: Factor) -> Images:
    mask = (256 - torch.exp2(8 - kept_bits)).to(torch.uint8)
    return _pointwise(images_NCHW, lambda part: part & mask)


def _solarize(images_NCHW: Images, threshold: Factor) -> Images:
    return _pointwise(images_NCHW, lambda part: torch.where(part >= threshold, 255 - part, part))


def _solarize_add(images_NCHW: Images, added: Factor) -> Images:
    return _pointwise(images_NCHW, lambda part: torch.where(part < 128, (part + added).clamp_(max=255), part.float()))


def _autocontrast(images_NCHW: Images, _: Factor) -> Images:
    """Each channel stretched to 0 .. 255; a channel of one value stays."""
    ends = [(part.amin((2, 3), keepdim=True), part.amax((2, 3), keepdim=True)) for part in pieces(images_NCHW)]
    low, high = torch.stack([low for low, _ in ends]).amin(0), torch.stack([high for _, high in ends]).amax(0)
    low, high = low.float(), high.float()
    flat = low == high
    low, span = torch.where(flat, 0, low), torch.where(flat, 255, high - low)
    return _pointwise(images_NCHW, lambda part: (part - low).mul_(255).div_(span))  # cut where no rounding errs


def _equalize(images_NCHW: Images, _: Factor) -> Images:
    """Each channel with as many pixels of one level as of another, as PIL does it; a channel of one value stays."""
    count, channels = images_NCHW.shape[:2]
    planes = count * channels
    histogram = torch.zeros(planes * 256, dtype=torch.int64, device=images_NCHW.device)
    first = 256 * torch.arange(planes, device=images_NCHW.device).view(count, channels, 1, 1)
    for part in pieces(images_NCHW):
        place = (part + first).flatten()
        histogram.scatter_add_(0, place, torch.ones_like(place))
    histogram = histogram.view(planes, 256)
    below = histogram.cumsum(1) - histogram  # pixels darker than each level
    brightest = torch.where(histogram > 0, below, 0).amax(1, keepdim=True)  # pixels darker than the brightest one
    step = brightest // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=table.device), table).to(torch.uint8).flatten()
    return _pointwise(images_NCHW, lambda part: table.index_select(0, (part + first).flatten()).view(part.shape))


def _invert(images_NCHW: Images, _: Factor) -> Images:
    return _pointwise(images_NCHW, torch.bitwise_not)


def _moved(images_NCHW: Images, operand_N6: torch.Tensor, fill_C: torch.Tensor) -> Images:
    """Every pixel taken from the place that `policies.operands` gives, linear between four pixels."""
    height, width = images_NCHW.shape[-2:]
    fill = fill_C[:, None, None]
    source_NCHW = torch.empty(images_NCHW.shape, dtype=torch.float32, device=images_NCHW.device)
    for source, part in zip(pieces(source_NCHW), pieces(images_NCHW), strict=True):
        torch.sub(part, fill, out=source)  # grid_sample puts zeros around
    a, b, c, d, e, f = operand_N6[:, :, None, None].unbind(1)
    x = torch.arange(width, dtype=torch.float32, device=images_NCHW.device)
    y = torch.arange(height, dtype=torch.float32, device=images_NCHW.device)[:, None]
    out_NCHW, first = torch.empty_like(images_NCHW), 0
    for out in pieces(out_NCHW):
        rows = y[first : first + out.shape[-2]]
        first += out.shape[-2]
        at_x, at_y = a * x + (b * rows + c), d * x + (e * rows + f)
        grid = torch.stack(((2 * at_x + 1) / width - 1, (2 * at_y + 1) / height - 1), dim=-1)
        taken = functional.grid_sample(source_NCHW, grid, padding_mode="zeros", align_corners=False)
        out.copy_(taken.add_(fill + 0.5).clamp_(0, 255))
    return out_NCHW


_OPERATIONS: dict[Op, Callable[[Images, Factor], Images]] = {
    Op.IDENTITY: lambda images_NCHW, _: images_NCHW,
    Op.BRIGHTNESS: _brightness,
    Op.COLOUR: _colour,
    Op.CONTRAST: _contrast,
    Op.SHARPNESS: _sharpness,
    Op.HUE: _hue,
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: _solarize,
    Op.SOLARIZE_ADD: _solarize_add,
    Op.AUTOCONTRAST: _autocontrast,
    Op.EQUALIZE: _equalize,
    Op.INVERT: _invert,
}
