"""NUMBERS: how good and how fast, from the device to curves, files and words.

In: a step's device tensors (`means.RunningMeans`), ticks of a clock (`StepClock`). Out: numbers by tag (`TAGS` names
them all) on boards (`make_boards`: TensorBoard, JSON lines, console), a summary at the end, and the same numbers read
back over all ranks (`read_run`).

    clock, phases   how long steps last, and what they are made of, on some of them
    means           sums on the device (imports torch, as do machine and memory: import them by their name)
    ranks           the ranks beside each other, and who is slow
    machine         processors, disks, network, GPU, in a thread of its own; memory, process: this process
    tags            every number: name, unit, how ranks combine
    boards          where numbers go: TensorBoard, jsonl, console; summary: the end of a run
    tensorboard_board  event_file: what lies on disk; layout, hparams, pictures: what a person sees there
    read            what the ranks wrote, as one table
"""

from ii_dist.metrics.boards import BOARDS, Board, make_boards
from ii_dist.metrics.clock import ClockReading, StepClock, Stretch, Totals
from ii_dist.metrics.columns import Start
from ii_dist.metrics.read import RankFigures, Row, RunMetrics, read_rank_metrics, read_run
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
