"""What a person sees while the run works: one tidy line a log event, kept on one line in a terminal.

In: steps and values of rank 0. Out: ``step 150/1,320  epoch 6.8  loss 0.412  top-1 93.1 %  1,234 images/s ...``.
"""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from ii_dist.metrics.tags import check_tags
from ii_dist.metrics.words import in_words_bytes, in_words_rate, in_words_s, in_words_share

_ERASE_LINE = "\r\x1b[K"


class ConsoleBoard:
    """Writes to `out`. In a terminal the training line stays in place; in a file every line stays."""

    def __init__(
        self,
        *,
        total_steps: int,
        resumed_step: int,
        out: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = sys.stdout if out is None else out
        self._live = self._out.isatty()
        self._total_steps = total_steps
        self._first_step = resumed_step
        self._now = now
        self._first_s = now()
        self._unfinished = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        check_tags(values)
        if any(tag.startswith("train/") for tag in values):
            words = [
                *_progress_words(step, self._total_steps, values),
                *_training_words(values),
                *self._left_words(step),
            ]
            self._put("  ".join(words), stays=not self._live)
        elif "eval/top1" in values:
            self._put("  ".join([*_progress_words(step, self._total_steps, values), *_evaluation_words(values)]))
        elif "checkpoint/bytes" in values:
            self._put("  ".join([*_progress_words(step, self._total_steps, values), *_checkpoint_words(values)]))

    def text(self, tag: str, text: str) -> None:
        """Nothing: a config is too long for the screen."""

    def close(self) -> None:
        if self._unfinished:
            self._out.write("\n")
            self._unfinished = False
        self._out.flush()

    def _put(self, line: str, stays: bool = True) -> None:
        before = _ERASE_LINE if self._unfinished else ""
        if not stays:
            line = line[: shutil.get_terminal_size().columns - 1]
        self._out.write(before + line + ("\n" if stays else ""))
        self._out.flush()
        self._unfinished = not stays

    def _left_words(self, step: int) -> list[str]:
        """Time left at the pace of this attempt, pauses included."""
        done, left = step - self._first_step, self._total_steps - step
        if done <= 0 or left <= 0:
            return []
        return [f"{in_words_s(max(1.0, left * (self._now() - self._first_s) / done))} left"]


def _progress_words(step: int, total_steps: int, values: Mapping[str, float]) -> list[str]:
    total = f"{total_steps:,}"
    words = [f"step {step:>{len(total)},}/{total}"]
    if "train/epoch" in values:
        words.append(f"epoch {values['train/epoch']:.2f}")
    return words


def _training_words(values: Mapping[str, float]) -> list[str]:
    words = []
    if "train/loss" in values:
        words.append(f"loss {values['train/loss']:.3f}")
    if "train/top1" in values:
        words.append(f"top-1 {values['train/top1']:5.1f} %")
    if "throughput/images_per_s" in values:
        words.append(in_words_rate(values["throughput/images_per_s"]))
    if "time/data_wait_share" in values:
        words.append(f"data wait {in_words_share(values['time/data_wait_share'])}")
    if values.get("train/skipped_updates"):
        words.append(f"{values['train/skipped_updates']:.0f} updates skipped (not finite)")
    if values.get("data/substituted_images"):
        words.append(f"{values['data/substituted_images']:.0f} bad images substituted")
    return words


def _evaluation_words(values: Mapping[str, float]) -> list[str]:
    words = [f"evaluation: top-1 {values['eval/top1']:.2f} %"]
    if "eval/top5" in values:
        words.append(f"top-5 {values['eval/top5']:.2f} %")
    if "eval/loss" in values:
        words.append(f"loss {values['eval/loss']:.3f}")
    if "eval/images" in values and "eval/seconds" in values:
        words.append(f"{values['eval/images']:,.0f} images in {in_words_s(values['eval/seconds'])}")
    if values.get("eval/left_out_images"):
        words.append(f"{values['eval/left_out_images']:.0f} bad images left out")
    return words


def _checkpoint_words(values: Mapping[str, float]) -> list[str]:
    words = [f"checkpoint: {in_words_bytes(values['checkpoint/bytes'])} committed"]
    if "checkpoint/seconds" in values:
        words.append(f"after {in_words_s(values['checkpoint/seconds'])} in the background")
    return words
