"""How many numbers a network keeps, counted on paper: no torch.

In: the model slice of a config, classes. Out: weights and running statistics, exactly as the networks of
`ii_dist.models` have them, and from there the size of a checkpoint.
"""

from dataclasses import dataclass

from ii_dist.config import ModelConfig, OptimConfig, RunConfig
from ii_dist.config.networks import NETWORKS, Shape, fold_shape

_BYTES = 4
"""Checkpoints hold 32-bit numbers, whatever a step computes in."""


@dataclass(slots=True)
class Numbers:
    """Counts of single numbers."""

    weights: int = 0
    statistics: int = 0
    """Running means and variances."""

    def convolution(self, inputs: int, outputs: int, taps: int, groups: int = 1) -> None:
        self.weights += inputs // groups * outputs * taps

    def norm(self, channels: int, affine: bool = True) -> None:
        self.weights += 2 * channels * affine
        self.statistics += 2 * channels


def checkpoint_bytes(cfg: RunConfig, classes: int) -> int:
    """Size of one step on disk: weights, the optimizer's averages, the moving average. Headers are left out."""
    network = count_numbers(cfg.model, classes)
    copies = 1 + (1 if cfg.engine.ema_half_life_epochs else 0)
    return _BYTES * (copies * (network.weights + network.statistics) + _averages(cfg.optim) * network.weights)


def count_numbers(cfg: ModelConfig, classes: int) -> Numbers:
    """All numbers of the network that `cfg` names."""
    shape, numbers = NETWORKS[cfg.network], Numbers()
    width = _stem(shape, numbers)
    for stage, (planes, blocks) in enumerate(zip(shape.planes, shape.layers, strict=True)):
        for block in range(blocks):
            projected = (block == 0 and stage > 0) or width != planes * shape.expansion
            _block(shape, numbers, width, planes, projected)
            width = planes * shape.expansion
            _gate(cfg, shape, numbers, width, planes)
    if shape.pre_activation:
        numbers.norm(width)
    numbers.weights += width * classes + classes
    return numbers


def _averages(cfg: OptimConfig) -> int:
    """Numbers that the optimizer keeps for each weight. Of muon: the matrices', which are nearly all."""
    if cfg.optimizer in ("adamw", "lamb"):
        return 2
    return 1 if cfg.momentum else 0


def _stem(shape: Shape, numbers: Numbers) -> int:
    """Returns the channels that enter the first stage."""
    if shape.pre_activation:
        width = 16
        numbers.norm(3, affine=False)
        numbers.convolution(3, width, 9)
        if shape.norm_after_stem:
            numbers.norm(width)
        return width
    width = shape.planes[0] if shape.small_images else 64
    if shape.small_images:
        numbers.convolution(3, width, 9)
    elif shape.deep_stem:
        for inputs, outputs in ((3, 32), (32, 32), (32, 64)):
            numbers.convolution(inputs, outputs, 9)
        numbers.norm(32)
        numbers.norm(32)
    else:
        numbers.convolution(3, width, 49)
    numbers.norm(width)
    return width


def _block(shape: Shape, numbers: Numbers, inputs: int, planes: int, projected: bool) -> None:
    outputs = planes * shape.expansion
    inner = planes * shape.base_width // 64 * shape.cardinality if shape.block == "bottleneck" else planes
    layers: tuple[tuple[int, int, int, int], ...]
    if shape.block == "bottleneck":
        layers = ((inputs, inner, 1, 1), (inner, inner, 9, shape.cardinality), (inner, outputs, 1, 1))
    else:
        layers = ((inputs, inner, 9, 1), (inner, outputs, 9, 1))
    for layer_inputs, layer_outputs, taps, groups in layers:
        numbers.convolution(layer_inputs, layer_outputs, taps, groups)
        numbers.norm(layer_inputs if shape.pre_activation else layer_outputs)
    if projected:
        numbers.convolution(inputs, outputs, 1)
        if not shape.pre_activation:
            numbers.norm(outputs)


def _gate(cfg: ModelConfig, shape: Shape, numbers: Numbers, channels: int, planes: int) -> None:
    if cfg.gate == "none":
        return
    hidden = channels // (cfg.gate_reduction or shape.gate_reduction)
    filters = cfg.lens_filters or max(1, planes // 16)
    signals, taps, excited = channels, 0, hidden
    if cfg.gate == "double_fc":
        signals, excited = 2 * channels, 2 * hidden
    elif cfg.gate == "pair1x1":
        signals, taps = 2 * channels, 1
    elif cfg.gate == "pair2x1":
        taps = 2
    elif cfg.gate == "fold3x3":
        layout = cfg.fold_layout or shape.fold_layout
        height, width = fold_shape(channels, cfg.fold_width or shape.fold_width, layout)
        lost = cfg.lens_kernel - 1
        signals, taps = (height - lost) * (width - lost), cfg.lens_kernel**2
    numbers.weights += signals * hidden + excited * channels
    if taps:
        numbers.convolution(1, filters, taps)
        numbers.norm(filters)
