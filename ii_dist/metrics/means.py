"""Sums on the device, means on the host: what the steps since the last line came to.

In: one mapping of 0-dim device tensors a step. Out: plain floats from `RunningMeans.read`, the only place that waits
for the device. `train_tags` and `eval_tags` name them as the table of tags does.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

TRAIN_SUMS = ("loss", "images", "top1", "top5", "grad_norm", "skipped")
"""What a training step hands over: loss = sum over its images, top1 and top5 = images that were right, grad_norm =
norm over all ranks, skipped = 1 for an update left out (on all ranks together), else 0."""
TRAIN_MAXIMA = ("skipped_in_row",)
EVAL_SUMS = ("loss", "images", "top1", "top5")

_MOST_KEPT_STEPS = 512
_OVER_IMAGES = {"loss": 1.0, "top1": 100.0, "top5": 100.0}  # name -> scale of its mean; accuracies are per cent


class _Sums(Protocol):
    """Adds up steps: the values of `names`, how many steps there were, and the maxima of `maxima`.

    A step with skipped > 0 counts as a step and a skipped update only: its loss is not a number that a mean survives.
    """

    def add(self, values: Mapping[str, Tensor]) -> None: ...

    def take(self, reduce: bool) -> list[float]:
        """Sums (over all ranks if asked), steps, maxima; starts again."""


class _OnDevice:
    """Tensors are only kept when they are added, and stacked by one kernel when they are read."""

    def __init__(self, names: Sequence[str], maxima: Sequence[str], device: torch.device) -> None:
        self._names, self._maxima, self._device = tuple(names), tuple(maxima), device
        left_out = [name not in ("skipped", "steps") for name in (*names, "steps")]
        self._left_out = torch.tensor(left_out, device=device)
        """Sums that a skipped step does not count in."""
        self._reset()

    def _reset(self) -> None:
        self._kept: list[Mapping[str, Tensor]] = []
        self._sums = torch.zeros(len(self._names) + 1, dtype=torch.float64, device=self._device)
        self._tops = torch.zeros(len(self._maxima), dtype=torch.float64, device=self._device)

    def add(self, values: Mapping[str, Tensor]) -> None:
        self._kept.append(values)
        if len(self._kept) >= _MOST_KEPT_STEPS:
            self._fold()

    def take(self, reduce: bool) -> list[float]:
        self._fold()
        if reduce and dist.is_initialized():
            dist.all_reduce(self._sums)
        numbers: list[float] = torch.cat((self._sums, self._tops)).tolist()  # the wait
        self._reset()
        return numbers

    @torch.no_grad()
    def _fold(self) -> None:
        """Add up the kept steps."""
        if not self._kept:
            return
        flat = torch.stack([values[name] for values in self._kept for name in (*self._names, *self._maxima)])
        rows = flat.to(torch.float64).view(len(self._kept), -1)
        self._kept = []
        count = len(self._names)
        sums = torch.cat((rows[:, :count], torch.ones_like(rows[:, :1])), dim=1)
        if "skipped" in self._names:
            skipped = rows[:, self._names.index("skipped"), None] > 0
            sums = torch.where(skipped & self._left_out, 0.0, sums)
        self._sums += sums.sum(0)
        if self._maxima:
            self._tops = torch.maximum(self._tops, rows[:, count:].amax(0))


class _OnHost:
    """On a CPU nobody has to wait for a tensor, and a number costs less than an operation on tensors."""

    def __init__(self, names: Sequence[str], maxima: Sequence[str]) -> None:
        self._names, self._maxima = tuple(names), tuple(maxima)
        self._skips = "skipped" in names
        self._reset()

    def _reset(self) -> None:
        self._steps = 0.0
        self._sums, self._tops = dict.fromkeys(self._names, 0.0), dict.fromkeys(self._maxima, 0.0)

    def add(self, values: Mapping[str, Tensor]) -> None:
        self._steps += 1
        for name in self._maxima:
            self._tops[name] = max(self._tops[name], values[name].item())
        if self._skips and (skipped := values["skipped"].item()) > 0:
            self._sums["skipped"] += skipped
            return
        for name in self._names:
            self._sums[name] += values[name].item()

    def take(self, reduce: bool) -> list[float]:
        sums = [*self._sums.values(), self._steps]
        if reduce and dist.is_initialized():
            over_ranks = torch.tensor(sums, dtype=torch.float64)
            dist.all_reduce(over_ranks)
            sums = over_ranks.tolist()
        numbers = [*sums, *self._tops.values()]
        self._reset()
        return numbers


class RunningMeans:
    """Sums and maxima over steps, in float64. A step pays for no arithmetic on a GPU."""

    def __init__(
        self, device: torch.device | str, sums: Sequence[str] = TRAIN_SUMS, maxima: Sequence[str] = TRAIN_MAXIMA
    ) -> None:
        device = torch.device(device)
        self._names = (*sums, "steps", *maxima)
        self._maxima = tuple(maxima)
        self._sums: _Sums = _OnHost(sums, maxima) if device.type == "cpu" else _OnDevice(sums, maxima, device)
        self._skips = "skipped" in sums
        self._steps = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's 0-dim tensors (keys besides the sums and maxima are ignored). Waits for no device.

        The tensors must not change afterwards. float32 throughout is quickest: one dtype is stacked by one kernel.
        """
        self._steps += 1
        self._sums.add(values)

    def read(self, *, reduce: bool = False) -> dict[str, float]:
        """Wait for the device, return what was added since the last read, and start again.

        reduce=True adds up all ranks first (collective: one all-reduce). Means over no image are NaN. Maxima are those
        of this rank: what they count, the ranks decide together.
        """
        steps_here, self._steps = self._steps, 0
        numbers = self._sums.take(reduce)
        found = dict(zip(self._names, numbers, strict=True))
        ranks = found["steps"] / steps_here if steps_here else 1.0
        means = {name: found[name] for name in self._maxima}
        means |= {"steps": float(steps_here), "images": found["images"]}
        means |= {n: scale * _ratio(found[n], found["images"]) for n, scale in _OVER_IMAGES.items() if n in found}
        if self._skips:
            means["skipped"] = found["skipped"] / ranks
        if "grad_norm" in found:
            means["grad_norm"] = _ratio(found["grad_norm"], found["steps"] - found.get("skipped", 0.0))
        return means


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def train_tags(means: Mapping[str, float]) -> dict[str, float]:
    """The means of training steps under their tags."""
    tags = {f"train/{name}": means[name] for name in ("loss", "top1", "top5", "grad_norm") if name in means}
    if "skipped" in means:
        tags["train/skipped_updates"] = means["skipped"]
    return tags


def eval_tags(means: Mapping[str, float], seconds: float) -> dict[str, float]:
    """The means of an evaluation that took `seconds`, under their tags."""
    return {f"eval/{name}": means[name] for name in ("loss", "top1", "top5", "images")} | {"eval/seconds": seconds}
