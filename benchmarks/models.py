"""What Inner-Imaging costs: the lens against its plain form, and ResNet-50 with gates against timm's networks.

    python -m benchmarks.models [--quick] [--out FILE]

Method, made for machines whose cores are shared: process CPU time, one thread, float32, all candidates in turn, nobody
always first, medians of the turns' ratios. One candidate runs twice a turn: the ratio of these twins is the noise to
read the others by. A training step is forward, loss, backward and SGD, channels_last, as the trainer runs it. Peak
memory of a lens is what torch's allocator held at most during one forward and backward pass, beyond what was there.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ii_dist.models import fuse_lenses
from ii_dist.models.lens import Lens

# Stage of ResNet-50 -> image of the folded gate (height, width) and filters of its lens.
LENSES = {1: ((32, 16), 4), 2: ((64, 16), 8), 3: ((128, 16), 16), 4: ((256, 16), 32)}
LENS_BATCH = 32
CLASSES, SIDE, BATCH = 100, 128, 8
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


def lens_step(form: str, filters: int, image_N1HW: Tensor) -> Block:
    """Forward and backward pass of one lens."""
    torch.manual_seed(0)
    lens = Lens(filters, 3, form)
    image_N1HW = image_N1HW.clone().requires_grad_()
    grad_Nhw = torch.randn_like(lens(image_N1HW))

    def step() -> None:
        lens.zero_grad()
        image_N1HW.grad = None
        lens(image_N1HW).backward(grad_Nhw)

    return step


def peak_bytes(step: Block) -> int:
    """Largest sum of allocations during one call, beyond what was there before."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    held = peak = 0
    for size in sorted(_allocations(results.experimental_event_tree())):
        held += size[1]
        peak = max(peak, held)
    return peak


def _allocations(events: list[Any]) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation; freed ones are negative."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def measure_lenses(turns: int, repeats: int) -> dict[str, dict[str, float]]:
    rows = {}
    for stage, ((height, width), filters) in LENSES.items():
        image_N1HW = torch.randn(LENS_BATCH, 1, height, width)
        forms = {"plain": "plain", "plain twin": "plain", "one": "one_filter"}
        steps = {name: lens_step(form, filters, image_N1HW) for name, form in forms.items()}
        found = in_turn(steps, turns, repeats)
        image_bytes = image_N1HW.numel() * image_N1HW.element_size()
        rows[f"stage {stage}: {height}x{width}, {filters} filters"] = {
            "plain_ms": 1e3 * statistics.median(found["plain"]),
            "one_ms": 1e3 * statistics.median(found["one"]),
            "speedup": ratio(found, "plain", "one"),
            "noise": ratio(found, "plain", "plain twin"),
            "plain_peak_images": peak_bytes(steps["plain"]) / image_bytes,
            "one_peak_images": peak_bytes(steps["one"]) / image_bytes,
        }
    return rows


# Whole networks ------------------------------------------------------------------------------------------------------


def build(name: str) -> nn.Module:
    import timm  # only after ii_dist.models, which makes it importable beside a CPU build of torch

    architecture, options = NETWORKS[name]
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(architecture, num_classes=CLASSES, **options)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def training_step(model: nn.Module, images_NCHW: Tensor) -> Block:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)
    labels_N = torch.arange(len(images_NCHW)) % CLASSES

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
    turns = 3 if quick else 9
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
        "peak memory, plain / one filter |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["lens"].items():
        goal = ">= 2" if name.startswith(("stage 3", "stage 4")) else "-"
        lines.append(
            f"| {name} | {row['plain_ms']:.2f} ms | {row['one_ms']:.2f} ms | {row['speedup']:.2f} | "
            f"{row['noise']:.2f} | {goal} | {row['plain_peak_images']:.0f} / {row['one_peak_images']:.0f} images |"
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
