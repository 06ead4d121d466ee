"""NUMBERS: how good and how fast, from the device to curves, files and words.

In: a step's device tensors (`means.RunningMeans`), ticks of a clock (`StepClock`). Out: numbers by tag (`TAGS` names
them all) on boards (`make_boards`: TensorBoard, JSON lines, console), a summary at the end, and the same numbers read
back over all ranks (`read_run`).

`means`, `memory` and `pictures` (PNG files beside the curves) import torch and are imported by their own name; reports
need none of them.
"""

from ii_dist.metrics.boards import BOARDS, Board, make_boards
from ii_dist.metrics.clock import ClockReading, StepClock, Stretch, Totals
from ii_dist.metrics.read import RankFigures, Row, RunMetrics, Start, read_rank_metrics, read_run
from ii_dist.metrics.summary import Summary, format_summary, read_summary, write_summary
from ii_dist.metrics.tags import TAGS, Tag, check_tags

__all__ = [
    "BOARDS",
    "TAGS",
    "Board",
    "ClockReading",
    "RankFigures",
    "Row",
    "RunMetrics",
    "Start",
    "StepClock",
    "Stretch",
    "Summary",
    "Tag",
    "Totals",
    "check_tags",
    "format_summary",
    "make_boards",
    "read_rank_metrics",
    "read_run",
    "read_summary",
    "write_summary",
]
