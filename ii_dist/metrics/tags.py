"""Every number that the project writes: its tag, unit, how the values of several ranks become one, and what it says.

In: nothing. Out: `TAGS`, which boards check what they are given against and reports take their units from, and
`check_tags`. To add a number: one line here, and a writer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Combine = Literal["mean", "sum", "max", "first"]
"""first = the lowest rank that wrote it: the ranks had agreed on it before they wrote."""


@dataclass(frozen=True, slots=True)
class Tag:
    """One row of the table."""

    name: str
    unit: str
    combine: Combine
    says: str


_ROWS = (
    Tag(
        "train/loss",
        "nats",
        "mean",
        "Training loss, mean over the images since the last line; skipped updates left out.",
    ),
    Tag(
        "train/top1",
        "%",
        "mean",
        "Training images whose likeliest class was right, since the last line (of a mixed image: the larger share).",
    ),
    Tag("train/top5", "%", "mean", "Training images whose class was among the five likeliest, since the last line."),
    Tag("train/learning_rate", "", "first", "Learning rate of this step."),
    Tag(
        "train/grad_norm", "", "first", "Global gradient norm before clipping, mean over the steps since the last line."
    ),
    Tag(
        "train/skipped_updates",
        "updates",
        "first",
        "Updates left out for a non-finite loss or gradient since the last line.",
    ),
    Tag("train/epoch", "epochs", "first", "Passes over the training images so far."),
    Tag("eval/loss", "nats", "first", "Loss over the whole evaluation set."),
    Tag("eval/top1", "%", "first", "Evaluation images whose likeliest class was right."),
    Tag("eval/top5", "%", "first", "Evaluation images whose class was among the five likeliest."),
    Tag("eval/images", "images", "first", "Images evaluated, each once."),
    Tag("eval/left_out_images", "images", "first", "Images that could not be read or decoded: not evaluated."),
    Tag("eval/seconds", "s", "max", "Wall time of the evaluation."),
    Tag("throughput/images_per_s", "images/s", "first", "All ranks: training images over training wall time."),
    Tag(
        "throughput/images_per_s_rank", "images/s", "sum", "One rank: its training images over its training wall time."
    ),
    Tag(
        "throughput/mfu_share",
        "share",
        "first",
        "Arithmetic of the network (6 operations a multiply-add) over the peak arithmetic of all ranks.",
    ),
    Tag(
        "throughput/roofline_share",
        "share",
        "first",
        "Least time that arithmetic and memory allow a step, over the time that it took.",
    ),
    Tag("time/step_s", "s", "mean", "Wall time of a step, mean since the last line."),
    Tag("time/step_p50_s", "s", "mean", "Wall time of a step, median since the last line."),
    Tag("time/step_p99_s", "s", "max", "Wall time of a step, 99th percentile since the last line."),
    Tag("time/data_wait_share", "share", "mean", "Share of the training wall time spent waiting for the next batch."),
    Tag(
        "time/data_wait_s",
        "s",
        "mean",
        "Of a step: waiting for the next batch (on a GPU: the device has nothing to do meanwhile).",
    ),
    Tag("time/copy_s", "s", "mean", "Of a step: images and labels from the host to the device."),
    Tag("time/forward_s", "s", "mean", "Of a step: forward pass and loss."),
    Tag("time/backward_s", "s", "mean", "Of a step: backward pass with the exchange of gradients and the wait for it."),
    Tag(
        "time/allreduce_s",
        "s",
        "mean",
        "Of time/backward_s: all gradients of the rank are computed, those of other ranks are not there yet.",
    ),
    Tag("time/optimizer_s", "s", "mean", "Of a step: gradient norm, update, moving average."),
    Tag(
        "time/metrics_s",
        "s",
        "mean",
        "Of a step: counting right answers, and writing the line before this one, spread over its steps.",
    ),
    Tag("time/other_s", "s", "mean", "Of a step: all the rest."),
    Tag("time/startup_s", "s", "max", "From the start of the process to its first step; once an attempt."),
    Tag("time/checkpoint_stall_s", "s", "max", "Time that training stood still for saves since the last line."),
    Tag(
        "data/substituted_images",
        "images",
        "first",
        "All ranks: bad training images since the last line, another one in the place of each.",
    ),
    Tag("data/read_retries", "reads", "first", "All ranks: reads tried again since the last line."),
    *(
        Tag(f"ranks/{phase}_{kind}_s", "s", "first", f"{word} rank: {says}")
        for phase, says in {
            "step": "wall time of a step.",
            "data_wait": "its time/data_wait_s.",
            "forward": "its time/forward_s.",
            "backward": "its time/backward_s.",
            "optimizer": "its time/optimizer_s.",
        }.items()
        for kind, word in {"min": "The least of any", "median": "The middle", "max": "The most of any"}.items()
    ),
    Tag("ranks/slowest_rank", "rank", "first", "The rank with the longest part of a step of its own."),
    Tag(
        "ranks/slowest_excess_share",
        "share",
        "first",
        "By how much of a step that part exceeds the one of the other ranks in the middle: what they wait for it.",
    ),
    Tag("run/goodput_share", "share", "mean", "Of the time since the process started: spent on training steps."),
    Tag("machine/cpu_share", "share", "mean", "Cores of the node in use, by whatever runs there."),
    Tag("machine/disk_read_mb_per_s", "MB/s", "mean", "Read from the disks of the node; files in its cache are not."),
    Tag(
        "machine/network_mb_per_s",
        "MB/s",
        "mean",
        "Sent and received by the network cards of the node; what cards move by themselves (RDMA) is not counted.",
    ),
    Tag("gpu/utilization_share", "share", "mean", "Of the time: some kernel runs on the rank's GPU."),
    Tag("gpu/sm_clock_mhz", "MHz", "mean", "Clock of the GPU's processors."),
    Tag("gpu/power_w", "W", "mean", "Power that the GPU draws."),
    Tag("gpu/temperature_c", "°C", "max", "Temperature of the GPU, the highest since the last line."),
    Tag("gpu/ecc_errors", "errors", "max", "Uncorrected memory errors of the GPU since its driver was loaded."),
    Tag(
        "gpu/throttled_share",
        "share",
        "mean",
        "Of the looks at the GPU: its clocks were held back for power, heat or a fault.",
    ),
    Tag("memory/rss_gib", "GiB", "max", "Memory that the process occupies on the host."),
    Tag("memory/device_gib", "GiB", "max", "Largest memory that tensors occupied on the GPU so far."),
    Tag("checkpoint/bytes", "bytes", "first", "Size of the committed step on disk, all shards."),
    Tag("checkpoint/seconds", "s", "max", "From the copy to the commit, in the background."),
)
TAGS: dict[str, Tag] = {tag.name: tag for tag in _ROWS}


def check_tags(names: Iterable[str]) -> None:
    """Assert that every name stands in the table: a misspelt tag would become a curve that nobody finds."""
    unknown = [name for name in names if name not in TAGS]
    assert not unknown, f"not in metrics/tags.py: {', '.join(unknown)}"


def tag_table() -> str:
    """All tags as a Markdown table, in the order of the table above."""
    rows = (f"| `{tag.name}` | {tag.unit} | {tag.combine} | {tag.says} |" for tag in TAGS.values())
    return "\n".join(["| tag | unit | ranks | says |", "| --- | --- | --- | --- |", *rows])
