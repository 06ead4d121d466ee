"""The table of all networks and gates: parameters, multiply-adds, and what was published.

In: nothing. Out: `model_rows()` and, as text, `format_models(rows)`. Counted on modules without memory (meta device).
Multiply-adds are those of convolutions and linear layers for one image of the network's own size, which is how the
literature counts; a lens counts with all its filters, however it is computed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ii_dist.config.networks import GATE_NAMES, NETWORKS, Shape
from ii_dist.models.blocks import gate_of_block
from ii_dist.models.gates import GateChoice
from ii_dist.models.lens import Lens
from ii_dist.models.named import MODELS, gate_choice

AUTHORS = "authors"
TIMM = "timm"
SOURCES = {
    AUTHORS: "tables in the authors' public repository (scut-aitcm/Competitive-Inner-Imaging-SENet; arXiv 1807.08920), "
    "in millions. They include the norms' running statistics, and three of the ResNet-164 rows are for 100 classes, so "
    "they lie up to 3 % above ours. None was published for the folded lens.",
    TIMM: "timm's results/results-imagenet.csv, in millions: the plain networks.",
}
PUBLISHED: dict[tuple[str, str], tuple[float, str]] = {
    ("ini_resnet18", "none"): (11.69, TIMM),
    ("ini_resnet34", "none"): (21.80, TIMM),
    ("ini_resnet50", "none"): (25.56, TIMM),
    ("ini_resnet101", "none"): (44.55, TIMM),
    ("ini_resnet152", "none"): (60.19, TIMM),
    ("ini_preresnet110", "none"): (1.7, AUTHORS),
    ("ini_preresnet110", "se"): (1.75, AUTHORS),
    ("ini_preresnet110", "pair1x1"): (1.76, AUTHORS),
    ("ini_preresnet164", "none"): (1.7, AUTHORS),
    ("ini_preresnet164", "se"): (1.95, AUTHORS),
    ("ini_preresnet164", "double_fc"): (2.12, AUTHORS),
    ("ini_preresnet164", "pair2x1"): (1.95, AUTHORS),
    ("ini_preresnet164", "pair1x1"): (2.04, AUTHORS),
    ("ini_wrn16_8", "pair1x1"): (11.1, AUTHORS),
    ("ini_wrn22_10", "none"): (26.8, AUTHORS),
    ("ini_wrn22_10", "se"): (27.0, AUTHORS),
    ("ini_wrn22_10", "pair1x1"): (27.1, AUTHORS),
    ("ini_wrn28_10", "none"): (36.5, AUTHORS),
    ("ini_wrn28_10", "se"): (36.8, AUTHORS),
    ("ini_wrn28_10", "double_fc"): (37.0, AUTHORS),
    ("ini_wrn28_10", "pair2x1"): (36.8, AUTHORS),
    ("ini_wrn28_10", "pair1x1"): (36.9, AUTHORS),
}
"""(network, gate) -> millions of parameters, and where that stands."""


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One network with one gate. parameters: trainable; macs: multiply-adds for one image; image_size: its side."""

    name: str
    gate: str
    parameters: int
    macs: int
    image_size: int
    classes: int
    published_millions: float | None = None
    source: str = ""
    """Key of `SOURCES`; empty where nothing was published."""


def model_rows(networks: Sequence[str] = tuple(NETWORKS), gates: Sequence[str] = GATE_NAMES) -> list[ModelRow]:
    """A row for each network and gate, in the order of their tables. Takes some seconds."""
    rows = []
    for name in networks:
        with torch.device("meta"):
            plain = MODELS[name](gate="none")
        cfg: dict[str, Any] = plain.default_cfg  # type: ignore[assignment]
        channels, side, _ = cfg["input_size"]
        parameters, macs = (
            count_parameters(plain),
            count_macs(plain, torch.empty(1, channels, side, side, device="meta")),
        )
        for gate in gates:
            more_parameters, more_macs = _gates_of(NETWORKS[name], gate)
            total = (parameters + more_parameters, macs + more_macs)
            published = PUBLISHED.get((name, gate), (None, ""))
            rows.append(ModelRow(name, gate, *total, side, cfg["num_classes"], *published))
    return rows


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module, *inputs_N: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers in one evaluation of `model`, for a batch of one."""
    model.eval()
    with torch.no_grad(), _counting(model) as counts:
        model(*inputs_N)
    return sum(counts)


@contextmanager
def _counting(model: nn.Module) -> Iterator[list[int]]:
    counts: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        per_output: Tensor = module.weight  # type: ignore[assignment]
        counts.append(output.numel() * per_output[0].numel())

    def count_lens(module: Lens, inputs: Any, output: Tensor) -> None:
        counts.append(output.numel() * module.conv.weight.numel())

    lenses = [m for m in model.modules() if isinstance(m, Lens)]
    within = {id(m) for lens in lenses for m in lens.modules()}
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and id(m) not in within]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    hooks += [lens.register_forward_hook(count_lens) for lens in lenses]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _gates_of(shape: Shape, gate: str) -> tuple[int, int]:
    """Parameters and multiply-adds of all gates of a network: alike within a stage, whatever the size of its maps."""
    choice = gate_choice(shape, {"gate": gate})
    stages = zip(shape.layers, shape.out_channels, shape.planes, strict=True)
    costs = [(blocks, *_gate_cost(choice, channels, planes)) for blocks, channels, planes in stages]
    return sum(n * parameters for n, parameters, _ in costs), sum(n * macs for n, _, macs in costs)


@cache
def _gate_cost(choice: GateChoice, channels: int, planes: int) -> tuple[int, int]:
    with torch.device("meta"):
        gate = gate_of_block(choice, channels, planes)
        signals = torch.empty(1, channels, 1, 1)
    return (0, 0) if gate is None else (count_parameters(gate), count_macs(gate, signals, signals))


def format_models(rows: Sequence[ModelRow]) -> str:
    """The rows as a text table, with the sources of the published counts below it."""
    marks = {source: f"[{i}]" for i, source in enumerate((s for s in SOURCES if any(r.source == s for r in rows)), 1)}
    head = ("network", "gate", "parameters", "MACs", "image", "classes", "published")
    cells = [head, *(_cells(row, marks) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    pads = [str.ljust if title in {"network", "gate", "published"} else str.rjust for title in head]
    padded = [[pad(cell, w) for pad, cell, w in zip(pads, line, widths, strict=True)] for line in cells]
    lines = ["  ".join(line).rstrip() for line in padded]
    notes = [f"{mark} published: {SOURCES[source]}" for source, mark in marks.items()]
    legend = (
        "parameters: trainable. MACs: multiply-adds of convolutions and linear layers, one image of the size given."
    )
    return "\n".join([*lines, "", legend, *notes])


def _cells(row: ModelRow, marks: dict[str, str]) -> tuple[str, ...]:
    published = f"{row.published_millions} M {marks[row.source]}" if row.published_millions is not None else ""
    macs = f"{row.macs / 1e9:.4f} G"
    image = f"{row.image_size}x{row.image_size}"
    return row.name, row.gate, f"{row.parameters:,}", macs, image, str(row.classes), published
