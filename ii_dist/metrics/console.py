"""What a person sees while the run works: one tidy line a log event, kept on one line in a terminal.

In: steps and values of rank 0. Out: ``step 150/1,320  epoch 6.8  loss 0.412  top-1 93.1 %  1,234 images/s ...``. In a
terminal that is narrower than the line, what matters least is left out; log records go above the line.
"""

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TextIO

from ii_dist.metrics.tags import check_tags
from ii_dist.metrics.words import in_words_bytes, in_words_rate, in_words_s, in_words_share

_ERASE_LINE = "\r\x1b[K"

Manner = Literal["auto", "lines", "quiet"]
"""auto = the training line stays in place where `out` is a terminal. lines = every line stays. quiet = evaluations."""
Words = list[tuple[int, str]]
"""Parts of a line, each with how early it is left out where there is no room: 0 = never, larger = earlier."""


class ConsoleBoard:
    """Writes to `out`, None = stdout."""

    def __init__(
        self,
        *,
        total_steps: int,
        resumed_step: int,
        manner: Manner = "auto",
        out: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = sys.stdout if out is None else out
        self._quiet = manner == "quiet"
        self._live = manner == "auto" and self._out.isatty()
        self._total_steps = total_steps
        self._first_step = resumed_step
        self._now = now
        self._first_s = now()
        self._line = ""  # that stays in place, as it is on the screen; "" = none
        self._around_records = [_Act(self._erase), _Act(self._draw)] if self._live else []
        if self._live:
            logging.getLogger().handlers.insert(0, self._around_records[0])
            logging.getLogger().addHandler(self._around_records[1])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        check_tags(values)
        if any(tag.startswith("train/") for tag in values):
            if self._quiet:
                return
            words = [
                *_progress_words(step, self._total_steps, values),
                *_training_words(values),
                *self._left_words(step),
            ]
            self._put(words, stays=not self._live)
        elif "eval/top1" in values:
            self._put([*_progress_words(step, self._total_steps, values), *_evaluation_words(values)])
        elif "checkpoint/bytes" in values and not self._quiet:
            self._put([*_progress_words(step, self._total_steps, values), *_checkpoint_words(values)])

    def text(self, tag: str, markdown: str) -> None:
        """Nothing: a config is too long for the screen."""

    def pictures(self, step: int, pngs: Mapping[str, bytes]) -> None:
        """Nothing."""

    def close(self) -> None:
        for handler in self._around_records:
            logging.getLogger().removeHandler(handler)
        self._around_records = []
        if self._line:
            self._out.write("\n")
            self._line = ""
        self._out.flush()

    def _put(self, words: Words, stays: bool = True) -> None:
        self._erase()
        if stays:
            self._line = ""
            self._out.write("  ".join(word for _, word in words) + "\n")
            self._out.flush()
        else:
            self._line = fit(words, self._columns() - 1)
            self._draw()

    def _erase(self) -> None:
        if self._line:
            self._out.write(_ERASE_LINE)
            self._out.flush()

    def _draw(self) -> None:
        if self._line:
            self._out.write(self._line)
            self._out.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._out.fileno()).columns or 80
        except (OSError, ValueError):  # a stream without a descriptor
            return shutil.get_terminal_size().columns

    def _left_words(self, step: int) -> Words:
        """Time left at the pace of this attempt, pauses included."""
        done, left = step - self._first_step, self._total_steps - step
        if done <= 0 or left <= 0:
            return []
        return [(1, f"{in_words_s(max(1.0, left * (self._now() - self._first_s) / done))} left")]


class _Act(logging.Handler):
    """Does something at each record: before other handlers write it, or after."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act = act

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that has gone does not end what writes a record
            self._act()


def fit(words: Sequence[tuple[int, str]], columns: int) -> str:
    """One line of at most `columns` characters."""
    kept = list(words)
    while kept and len(line := "  ".join(word for _, word in kept)) > columns:
        least = max(kept, key=lambda word: word[0])
        if least[0] == 0:
            return line[:columns]
        kept.remove(least)
    return "  ".join(word for _, word in kept)


def _progress_words(step: int, total_steps: int, values: Mapping[str, float]) -> Words:
    total = f"{total_steps:,}"
    words = [(0, f"step {step:>{len(total)},}/{total}")]
    if "train/epoch" in values:
        words.append((5, f"epoch {values['train/epoch']:.2f}"))
    return words


def _training_words(values: Mapping[str, float]) -> Words:
    words = []
    if "train/loss" in values:
        words.append((2, f"loss {values['train/loss']:.3f}"))
    if "train/top1" in values:
        words.append((4, f"top-1 {values['train/top1']:5.1f} %"))
    if "throughput/images_per_s" in values:
        words.append((3, in_words_rate(values["throughput/images_per_s"])))
    if "time/data_wait_share" in values:
        words.append((6, f"data wait {in_words_share(values['time/data_wait_share'])}"))
    if values.get("train/skipped_updates"):
        words.append((1, f"{values['train/skipped_updates']:.0f} updates skipped (not finite)"))
    if values.get("data/substituted_images"):
        words.append((3, f"{values['data/substituted_images']:.0f} bad images substituted"))
    return words


def _evaluation_words(values: Mapping[str, float]) -> Words:
    words = [(0, f"evaluation: top-1 {values['eval/top1']:.2f} %")]
    if "eval/top5" in values:
        words.append((0, f"top-5 {values['eval/top5']:.2f} %"))
    if "eval/loss" in values:
        words.append((0, f"loss {values['eval/loss']:.3f}"))
    if "eval/images" in values and "eval/seconds" in values:
        words.append((0, f"{values['eval/images']:,.0f} images in {in_words_s(values['eval/seconds'])}"))
    if values.get("eval/left_out_images"):
        words.append((0, f"{values['eval/left_out_images']:.0f} bad images left out"))
    return words


def _checkpoint_words(values: Mapping[str, float]) -> Words:
    words = [(0, f"checkpoint: {in_words_bytes(values['checkpoint/bytes'])} committed")]
    if "checkpoint/seconds" in values:
        words.append((0, f"after {in_words_s(values['checkpoint/seconds'])} in the background"))
    return words
