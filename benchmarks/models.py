"""What Inner-Imaging costs: the lens against its plain form, and ResNet-50 with gates against timm's networks.

    python -m benchmarks.models [--quick] [--out FILE]

Method, made for machines whose cores are shared: process CPU time, one thread, float32, all candidates in turn, nobody
always first, medians of the turns' ratios. One candidate runs twice a turn: the ratio of these twins is the noise to
read the others by. A training step is forward, loss, backward and SGD, channels_last, as the trainer runs it. Memory
of a lens: tensors that one pass makes, in sizes of the batch of images, kept for the backward pass and at most.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ii_dist.models import fuse_lenses
from ii_dist.models.lens import Lens

# Stage of ResNet-50 -> image of the folded gate (height, width) and filters of its lens.
LENSES = {1: ((32, 16), 4), 2: ((64, 16), 8), 3: ((128, 16), 16), 4: ((256, 16), 32)}
FORMS = {"plain": "plain", "twin": "plain", "one": "one_filter"}
LENS_BATCH = 32
CLASSES, SIDE, BATCH = 1000, 224, 8
SE, PLAIN = "timm seresnet50", "timm resnet50"
FOLD, FOLD_PLAIN_LENS = "ini_resnet50 fold3x3", "ini_resnet50 fold3x3, plain lens"
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("resnet50", {}),
    SE: ("seresnet50", {}),
    f"{SE}, twin": ("seresnet50", {}),
    FOLD: ("ini_resnet50", {"gate": "fold3x3"}),
    FOLD_PLAIN_LENS: ("ini_resnet50", {"gate": "fold3x3", "lens": "plain"}),
}

Block = Callable[[], object]


def in_turn(candidates: Mapping[str, Block], turns: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of one call of each candidate, for each turn."""
    for call in candidates.values():
        call()
    names = list(candidates)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            begin_s = time.process_time()
            for _ in range(repeats):
                candidates[name]()
            found[name].append((time.process_time() - begin_s) / repeats)
    return found


def ratio(found: Mapping[str, list[float]], slower: str, faster: str) -> float:
    """How many times as fast `faster` is: the median over turns."""
    return statistics.median(s / f for s, f in zip(found[slower], found[faster], strict=True))


# The lens ------------------------------------------------------------------------------------------------------------


def lens_step(lens: Lens, image_N1HW: Tensor) -> Block:
    """Forward and backward pass of one lens."""
    image_N1HW = image_N1HW.clone().requires_grad_()
    grad_Nhw = torch.randn_like(lens(image_N1HW))

    def step() -> None:
        lens.zero_grad()
        image_N1HW.grad = None
        lens(image_N1HW).backward(grad_Nhw)

    return step


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that operators made and that are still there: now, and at most so far."""

    def __init__(self, not_counted: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._others = {x.untyped_storage()._cdata for x in not_counted}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._others:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        self.peak_bytes = max(self.peak_bytes, self.bytes())
        return out

    def bytes(self) -> int:
        self._made = {key: held for key, held in self._made.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
        return sum(size for _, size in self._made.values())


def memory(lens: Lens, image_N1HW: Tensor) -> tuple[float, float]:
    """What is kept for the backward pass, and what is there at most in both, in sizes of the batch of images.

    Not counted: the images, and the lens's output.
    """
    image_N1HW = image_N1HW.clone().requires_grad_()
    image_bytes = image_N1HW.numel() * image_N1HW.element_size()
    with Held([image_N1HW, *lens.parameters(), *lens.buffers()]) as held:
        view_Nhw = lens(image_N1HW)
        kept = held.bytes() - view_Nhw.numel() * view_Nhw.element_size()
        view_Nhw.sum().backward()
    return kept / image_bytes, held.peak_bytes / image_bytes


def measure_lenses(turns: int, repeats: int) -> dict[str, dict[str, float]]:
    rows = {}
    for stage, ((height, width), filters) in LENSES.items():
        image_N1HW = torch.randn(LENS_BATCH, 1, height, width)
        lenses = {name: Lens(filters, 3, form) for name, form in FORMS.items()}
        found = in_turn({name: lens_step(lens, image_N1HW) for name, lens in lenses.items()}, turns, repeats)
        row = {"speedup": ratio(found, "plain", "one"), "noise": ratio(found, "plain", "twin")}
        for name in ("plain", "one"):
            row[f"{name}_ms"] = 1e3 * statistics.median(found[name])
            row[f"{name}_kept"], row[f"{name}_peak"] = memory(lenses[name], image_N1HW)
        rows[f"stage {stage}: {height}x{width}, {filters} filters"] = row
    return rows


# Whole networks ------------------------------------------------------------------------------------------------------


def build(name: str) -> nn.Module:
    import timm  # only after ii_dist.models, which makes it importable beside a CPU build of torch

    architecture, options = NETWORKS[name]
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(architecture, num_classes=CLASSES, **options)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def training_step(model: nn.Module, images_NCHW: Tensor, classes: int = CLASSES) -> Block:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)
    labels_N = torch.arange(len(images_NCHW)) % classes

    def step() -> None:
        loss = F.cross_entropy(model(images_NCHW), labels_N, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def evaluation(model: nn.Module, images_NCHW: Tensor) -> Block:
    model.eval()

    @torch.inference_mode()
    def step() -> Any:
        return model(images_NCHW)

    return step


def measure_networks(turns: int) -> dict[str, dict[str, list[float]]]:
    images_NCHW = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    models = {name: build(name) for name in NETWORKS}
    train = in_turn({name: training_step(model, images_NCHW) for name, model in models.items()}, turns, repeats=1)
    models["fused"] = copy.deepcopy(models[FOLD])
    fuse_lenses(models["fused"].eval())
    del models[FOLD_PLAIN_LENS]
    evaluations = {name: evaluation(model, images_NCHW) for name, model in models.items()}
    return {"train": train, "eval": in_turn(evaluations, 2 * turns, repeats=1)}


def run_benchmark(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    turns = 3 if quick else 7
    networks = measure_networks(turns)
    train, evaluations = networks["train"], networks["eval"]
    return {
        "lens": measure_lenses(turns, repeats=3 if quick else 10),
        "train": {
            "fold_over_se": ratio(train, SE, FOLD),
            "fold_over_plain": ratio(train, PLAIN, FOLD),
            "se_over_plain": ratio(train, PLAIN, SE),
            "one_filter_over_plain_lens": ratio(train, FOLD_PLAIN_LENS, FOLD),
            "noise": ratio(train, SE, f"{SE}, twin"),
        },
        "eval": {
            "fused_over_se": ratio(evaluations, SE, "fused"),
            "fused_over_not_fused": ratio(evaluations, FOLD, "fused"),
            "fused_over_plain": ratio(evaluations, PLAIN, "fused"),
            "noise": ratio(evaluations, SE, f"{SE}, twin"),
        },
        "images_per_cpu_s": {
            kind: {name: BATCH / statistics.median(values) for name, values in found.items()}
            for kind, found in networks.items()
        },
    }


def to_markdown(found: dict[str, Any]) -> str:
    lines = [
        f"| lens, forward and backward, batch {LENS_BATCH} | plain | one filter | times as fast | A/A noise | goal | "
        "kept, plain / one filter | at most, plain / one filter |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["lens"].items():
        goal = ">= 2" if name.startswith(("stage 3", "stage 4")) else "-"
        lines.append(
            f"| {name} | {row['plain_ms']:.2f} ms | {row['one_ms']:.2f} ms | {row['speedup']:.2f} | "
            f"{row['noise']:.2f} | {goal} | {row['plain_kept']:.2f} / {row['one_kept']:.2f} | "
            f"{row['plain_peak']:.1f} / {row['one_peak']:.1f} |"
        )
    train, evaluations = found["train"], found["eval"]
    rows = [
        (f"{FOLD} / {SE}, training step", train["fold_over_se"], train["noise"], ">= 0.95"),
        (f"{FOLD} / {PLAIN}, training step", train["fold_over_plain"], train["noise"], ">= 0.85"),
        (f"{SE} / {PLAIN}, training step", train["se_over_plain"], train["noise"], "-"),
        ("one-filter / plain lens, the same step", train["one_filter_over_plain_lens"], train["noise"], "-"),
        (f"{FOLD}, fused / {SE}, evaluation", evaluations["fused_over_se"], evaluations["noise"], ">= 0.98"),
        (f"{FOLD}, fused / {PLAIN}, evaluation", evaluations["fused_over_plain"], evaluations["noise"], "-"),
        ("fused / not fused, evaluation", evaluations["fused_over_not_fused"], evaluations["noise"], "-"),
    ]
    lines += ["", f"| images a CPU second, {SIDE} px, batch {BATCH} | ratio | A/A noise | goal |"]
    lines += ["| --- | --- | --- | --- |"]
    lines += [f"| {name} | {value:.3f} | {noise:.3f} | {goal} |" for name, value, noise, goal in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    found = run_benchmark(args.quick)
    print(to_markdown(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
