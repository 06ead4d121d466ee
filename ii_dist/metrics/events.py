"""TensorBoard event files of other trainers, read into our tags, so that a run can be compared with a peer's.

In: a folder with ``*tfevents*`` files, at any depth, perhaps cut off by a kill. Out: `ForeignRun`: the same rows as of
a run of ours, which of their tags became which of ours, and the tags that nobody knows.

`RULES` says which names are known; to add one: one line there. What no rule knows is given by hand: ``theirs=ours``.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ii_dist.config.errors import CheckpointError, ClusterError, ConfigError
from ii_dist.metrics.columns import Start
from ii_dist.metrics.read import RankFigures, Row, RunMetrics
from ii_dist.metrics.tags import TAGS

logger = logging.getLogger(__name__)

_STAGE_TRAIN, _STAGE_EVAL = r"(?:train(?:ing)?)", r"(?:eval|val(?:idation)?|test)"
_TOP1 = r"(?:(?:Multiclass)?Accuracy|acc(?:uracy)?(?:[@_/-]?(?:top[-_]?)?1)?|(?:top|prec)[@-]?1)"
_TOP5 = r"(?:acc(?:uracy)?[@_/-]?(?:top[-_]?)?5|(?:top|prec)[@-]?5)"
PERCENT = 0.0
"""As a scale: per cent, or shares of 1 if no value is larger."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Tags that match the whole of `pattern` (in any case) become `tag`, times `scale`. Earlier rules go first."""

    pattern: str
    tag: str
    scale: float
    who: str


RULES = (
    Rule(r"throughput/samples_per_sec", "throughput/images_per_s", 1, "Composer"),
    Rule(r"throughput/device/samples_per_sec", "throughput/images_per_s_rank", 1, "Composer"),
    Rule(r"train\|samples_per_sec", "throughput/images_per_s", 1, "Lightning"),
    Rule(r"train\|device/samples_per_sec", "throughput/images_per_s_rank", 1, "Lightning"),
    Rule(r"(?:train/)?train_samples_per_second", "throughput/images_per_s", 1, "Transformers"),
    Rule(
        rf"(?:{_STAGE_TRAIN}[/._])?(?:throughput/)?(?:images?|imgs?|samples?)(?:[_/]|_?per_?)s(?:ec(?:onds?)?)?",
        "throughput/images_per_s",
        1,
        "timm, torchvision and others",
    ),
    Rule(r"train\.(?:total|compute)_ips", "throughput/images_per_s", 1, "DeepLearningExamples"),
    Rule(r"time_metrics/end_to_end\(s\)", "time/step_s", 1, "torchtitan"),
    Rule(rf"(?:{_STAGE_TRAIN}/)?(?:time|batch_time|step_time|iter_time)", "time/step_s", 1, "mmengine, DeiT"),
    Rule(r"time_metrics/data_loading\(%\)", "time/data_wait_share", 0.01, "torchtitan"),
    Rule(r"time_metrics/data_loading\(s\)", "time/data_wait_s", 1, "torchtitan"),
    Rule(rf"(?:{_STAGE_TRAIN}/)?data_time", "time/data_wait_s", 1, "mmengine, DeiT"),
    Rule(r"loss_metrics/global_avg_loss", "train/loss", 1, "torchtitan"),
    Rule(r"loss/train/total", "train/loss", 1, "Composer"),
    Rule(r"metrics/eval/CrossEntropy", "eval/loss", 1, "Composer"),
    Rule(rf"metrics/train/{_TOP1}", "train/top1", PERCENT, "Composer"),
    Rule(rf"metrics/eval/{_TOP1}", "eval/top1", PERCENT, "Composer"),
    Rule(r"accuracy/top1", "eval/top1", PERCENT, "mmengine"),
    Rule(r"accuracy/top5", "eval/top5", PERCENT, "mmengine"),
    Rule(rf"{_STAGE_EVAL}[/._|](?:epoch_)?loss(?:_epoch)?", "eval/loss", 1, "timm, Lightning, DeiT"),
    Rule(rf"loss[/_]{_STAGE_EVAL}", "eval/loss", 1, "many"),
    Rule(rf"{_STAGE_EVAL}[/._|]{_TOP1}(?:_epoch)?", "eval/top1", PERCENT, "timm, Lightning, DeiT"),
    Rule(rf"{_STAGE_EVAL}[/._|]{_TOP5}(?:_epoch)?", "eval/top5", PERCENT, "timm, Lightning, DeiT"),
    Rule(rf"{_TOP1}[/_]{_STAGE_EVAL}", "eval/top1", PERCENT, "many"),
    Rule(rf"{_STAGE_TRAIN}[/._|]{_TOP1}(?:_step|_epoch)?", "train/top1", PERCENT, "Lightning, DeiT"),
    Rule(rf"(?:{_STAGE_TRAIN}[/._|](?:epoch_)?)?loss(?:_step|_epoch)?", "train/loss", 1, "mmengine, timm, Lightning"),
    Rule(rf"loss[/_]{_STAGE_TRAIN}|Train/Samples/train_loss", "train/loss", 1, "DeepSpeed and others"),
    Rule(
        rf"(?:(?:{_STAGE_TRAIN}|optim|Train/Samples)/)?(?:lr|learning_rate)(?:/pg_?0)?",
        "train/learning_rate",
        1,
        "mmengine, timm, DeepSpeed",
    ),
    Rule(r"lr-\w+(?:/(?:group|pg)[01])?", "train/learning_rate", 1, "Composer, Lightning"),
    Rule(rf"(?:{_STAGE_TRAIN}/)?grad_norm|l2_norm/grad/global", "train/grad_norm", 1, "mmengine, torchtitan, Composer"),
    Rule(rf"(?:(?:{_STAGE_TRAIN}(?:er)?|time)/)?epoch", "train/epoch", 1, "Lightning, Composer"),
    Rule(r"memory/max_active\(GiB\)", "memory/device_gib", 1, "torchtitan"),
    Rule(r"memory", "memory/device_gib", 1 / 1024, "mmengine (MiB)"),
)


@dataclass(frozen=True, slots=True)
class ForeignRun:
    """A peer's numbers under our tags."""

    metrics: RunMetrics
    mapped: dict[str, str]
    """Ours by theirs, in the order of their first appearance."""
    unknown: list[str]


Points = dict[int, tuple[float, float]]
"""Unix time and value by step."""


def has_events(folder: Path) -> bool:
    """Whether there are event files below `folder`."""
    return next(folder.rglob("*tfevents*"), None) is not None


def read_events(folder: Path, by_hand: Mapping[str, str] | None = None, global_batch: int = 0) -> ForeignRun:
    """Everything scalar below `folder`. by_hand: their tag to ours; global_batch: images a step, for images/s where
    only the time of a step is told, 0 = not known.

    Raises CheckpointError where there are no event files, ConfigError for a tag of ours that does not exist,
    ClusterError without TensorBoard.
    """
    by_hand = by_hand or {}
    for theirs, ours in by_hand.items():
        if ours not in TAGS and ours != "time/data_wait_s":
            raise ConfigError(f"--map {theirs}={ours}: {ours!r} is not a tag of ours; they stand in metrics/tags.py")
    series, starts = _read_series(folder)
    mapped: dict[str, str] = {}
    chosen: dict[str, tuple[int, str, float]] = {}  # our tag: order of the rule, their tag, scale
    for theirs in series:
        order, ours, scale = _rule_of(theirs, by_hand)
        if ours and (ours not in chosen or order < chosen[ours][0]):
            chosen[ours] = (order, theirs, scale)
    rows: dict[int, Row] = {}
    for ours, (_, theirs, scale) in chosen.items():
        mapped[theirs] = ours
        _add(rows, ours, series[theirs], scale)
    _derive(rows, global_batch)
    ordered = [rows[step] for step in sorted(rows)]
    figures = RankFigures(0, last_step=ordered[-1].step if ordered else 0)
    unknown = [theirs for theirs in series if theirs not in mapped]
    return ForeignRun(RunMetrics(ordered, starts, [figures]), mapped, unknown)


def _rule_of(theirs: str, by_hand: Mapping[str, str]) -> tuple[int, str, float]:
    """Order of the rule that knows a tag (below 0: by hand, or ours), our tag and the scale; no tag for none. A tag in
    a folder of its own, such as val/epoch_loss, is looked up with the folder first."""
    for name in dict.fromkeys((theirs.replace("//", "/"), theirs.rpartition("//")[2])):
        if name in by_hand:
            ours = by_hand[name]
            return -2, ours, PERCENT if ours in TAGS and TAGS[ours].unit == "%" else 1.0
        if name in TAGS:
            return -1, name, 1.0
        for order, rule in enumerate(RULES):
            if re.fullmatch(rule.pattern, name, re.IGNORECASE):
                return order, rule.tag, rule.scale
    return 0, "", 1.0


def _add(rows: dict[int, Row], ours: str, points: Points, scale: float) -> None:
    if scale == PERCENT:
        scale = 100.0 if all(value <= 1 for _, value in points.values() if math.isfinite(value)) else 1.0
    for step, (time_s, value) in points.items():
        row = rows.setdefault(step, Row(step, time_s))
        row.time_s = min(row.time_s, time_s)
        row.values[ours] = value * scale


def _derive(rows: Mapping[int, Row], global_batch: int) -> None:
    """What follows from other numbers of the same step."""
    for row in rows.values():
        values = row.values
        step_s, wait_s = values.get("time/step_s", 0.0), values.get("time/data_wait_s")
        if step_s > 0 and wait_s is not None:
            values.setdefault("time/data_wait_share", wait_s / step_s)
        if step_s > 0 and global_batch:
            values.setdefault("throughput/images_per_s", global_batch / step_s)


def _read_series(folder: Path) -> tuple[dict[str, Points], list[Start]]:
    """Values by tag; a file in a subfolder puts the folder before its tags, with //. And when each file began."""
    files = sorted(folder.rglob("*tfevents*"), key=lambda path: (path.parent, path.name))
    if not files:
        raise CheckpointError(f"{folder}: neither a run folder nor one with TensorBoard event files")
    series: dict[str, Points] = {}
    starts: list[Start] = []
    for file in files:
        inside = file.parent.relative_to(folder).as_posix()
        began = False
        for time_s, step, tag, value in _scalars(file):
            if not began and inside in (".", "tb"):
                starts.append(Start(max(0, step - 1), time_s, 0, 1, "?"))
            began = True
            points = series.setdefault(tag if inside in (".", "tb") else f"{inside}//{tag}", {})
            if points and step < next(reversed(points)):
                # An attempt that went back: what it makes again replaces what was there.
                for later in [old for old in points if old >= step]:
                    del points[later]
            points.pop(step, None)
            points[step] = (time_s, value)
    return series, starts


def _scalars(file: Path) -> Iterator[tuple[float, int, str, float]]:
    """Unix time, step, tag, value; up to the first record that is cut off or damaged."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto import event_pb2
        from tensorboard.util import tensor_util
    except ImportError as error:
        raise ClusterError(
            f"{file}: event files need TensorBoard ({error}); python -m pip install tensorboard==2.21.0"
        ) from None
    event: Any
    for record in RawEventFileLoader(str(file)).Load():
        event = event_pb2.Event.FromString(record)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield event.wall_time, event.step, value.tag, value.simple_value
            elif value.HasField("tensor") and value.metadata.plugin_data.plugin_name in ("", "scalars"):
                array = tensor_util.make_ndarray(value.tensor)
                if array.size == 1 and array.dtype.kind in "fiu":
                    yield event.wall_time, event.step, value.tag, float(array.item())
