"""The end of a run in one small file and a few lines.

In: a `Summary` made by rank 0. Out: ``summary.json`` in the run folder (it exists only complete), the same read back,
and the lines that a person reads last.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import RunFolder
from ii_dist.metrics.words import in_words_rate, in_words_s, in_words_share

_LEAST_SHARE = 0.02  # of a step; what is shorter is not worth a word
_IN_WORDS = {"data_wait": "waiting for data", "allreduce": "waiting for other ranks"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of a run's last attempt. Accuracies are per cent of the evaluation images, None before an evaluation."""

    steps: int
    total_steps: int
    epochs: float
    top1: float | None
    top5: float | None
    best_top1: float | None
    images_per_s: float
    """All ranks, steady: the cold start of the attempt left out."""
    cold_images_per_s: float
    data_wait_share: float
    seconds: float
    """Wall time of this attempt, from its start to its end."""
    world_size: int
    device: str
    newest_checkpoint: str | None
    """Name of the folder below checkpoints/."""
    phases_s: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds a step on rank 0 by phase, mean of the measured steps; without those that writing numbers took."""
    mfu_share: float | None = None
    roofline_share: float | None = None
    """Of the machine's peaks; None where they are not known. They and `bound` are younger than other fields."""
    bound: str = ""
    """What holds the network at the roofline: arithmetic or memory."""


def write_summary(folder: RunFolder, summary: Summary) -> None:
    """Write ``summary.json``: first under a hidden name, then renamed. Raises CheckpointError."""
    hidden = folder.root / f".{folder.summary.name}.partial"
    text = json.dumps(dataclasses.asdict(summary), indent=2) + "\n"
    try:
        with hidden.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(folder.summary)
    except OSError as error:
        raise CheckpointError(f"{folder.summary}: cannot be written ({error.strerror})") from None


def read_summary(folder: RunFolder) -> Summary | None:
    """The summary, or None where the run has none yet. Raises CheckpointError for a file that is not one."""
    try:
        values: Any = json.loads(folder.summary.read_text())
        return Summary(**values)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder.summary}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder.summary}: is not a summary of this version ({error})") from None


def format_summary(folder: RunFolder, summary: Summary) -> str:
    """Some lines for the end of a run, without a trailing newline."""
    done = "finished" if summary.steps >= summary.total_steps else "stopped"
    ranks = "1 rank" if summary.world_size == 1 else f"{summary.world_size} ranks"
    rows = [
        ("top-1", _accuracy(summary)),
        ("images/s", f"{in_words_rate(summary.images_per_s)} on {ranks} ({summary.device}), steady"),
        *_machine(summary),
        ("data wait", f"{in_words_share(summary.data_wait_share)} of the training time"),
        *([("a step", _phases(summary.phases_s))] if summary.phases_s else []),
        ("trained", f"{summary.steps:,} of {summary.total_steps:,} steps, {summary.epochs:.4g} epochs"),
        ("checkpoint", _checkpoint(folder, summary)),
        ("curves", f"tensorboard --logdir {folder.tensorboard}"),
    ]
    title = f"{folder.root.name}: {done} after {in_words_s(summary.seconds)}"
    return "\n".join([title, *(f"  {name:<11}{value}" for name, value in rows)])


def _machine(summary: Summary) -> list[tuple[str, str]]:
    if summary.mfu_share is None or summary.roofline_share is None:
        return []
    shares = f"MFU {in_words_share(summary.mfu_share)}, {in_words_share(summary.roofline_share)} of the roofline"
    return [("machine", f"{shares} ({summary.bound} bound)")]


def _accuracy(summary: Summary) -> str:
    if summary.top1 is None:
        return "not evaluated"
    parts = [f"{summary.top1:.2f} %"]
    if summary.top5 is not None:
        parts.append(f"top-5 {summary.top5:.2f} %")
    if summary.best_top1 is not None and summary.best_top1 > summary.top1:
        parts.append(f"best top-1 {summary.best_top1:.2f} %")
    return ", ".join(parts)


def _checkpoint(folder: RunFolder, summary: Summary) -> str:
    return str(folder.checkpoints / summary.newest_checkpoint) if summary.newest_checkpoint else "none"


def _phases(phases_s: dict[str, float]) -> str:
    """The phases that matter, longest first."""
    step_s = sum(phases_s.values())
    longest = sorted(phases_s.items(), key=lambda pair: -pair[1])
    words = [
        f"{_IN_WORDS.get(phase, phase)} {in_words_share(seconds / step_s)}"
        for phase, seconds in longest
        if seconds >= _LEAST_SHARE * step_s
    ]
    return f"{in_words_s(step_s)}: {', '.join(words)}"
