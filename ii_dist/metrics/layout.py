"""Which numbers stand together in TensorBoard's CUSTOM SCALARS: five groups of charts.

In: nothing. Out: `GROUPS`, by names of `TAGS`. A chart whose numbers a run does not have stays empty. To show a number:
its name in a chart here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lines:
    """A chart of one line a tag."""

    title: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Band:
    """A chart of one line with a band round it."""

    title: str
    low: str
    middle: str
    high: str

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.low, self.middle, self.high)


Chart = Lines | Band


def _over_ranks(phase: str, says: str) -> Band:
    return Band(f"{says}, over the ranks (s)", *(f"ranks/{phase}_{kind}_s" for kind in ("min", "median", "max")))


GROUPS: dict[str, tuple[Chart, ...]] = {
    "Throughput": (
        Lines("Images per second, all ranks", ("throughput/images_per_s",)),
        Lines("Images per second, rank 0", ("throughput/images_per_s_rank",)),
        Lines("Share of what the hardware could do", ("throughput/mfu_share", "throughput/roofline_share")),
        Lines("Share of the time that trained", ("run/goodput_share",)),
    ),
    "Where the time goes": (
        Lines("Wall time of a step (s)", ("time/step_s", "time/step_p50_s", "time/step_p99_s")),
        Lines(
            "Parts of a step (s)",
            (
                "time/data_wait_s",
                "time/copy_s",
                "time/forward_s",
                "time/backward_s",
                "time/allreduce_s",
                "time/optimizer_s",
                "time/metrics_s",
                "time/other_s",
            ),
        ),
        Lines("Share of the time waiting for images", ("time/data_wait_share",)),
        Lines("How much longer the slowest rank takes (share)", ("ranks/slowest_excess_share",)),
        Lines("Which rank is the slowest", ("ranks/slowest_rank",)),
        # TensorBoard shows bands behind all lines, the last one first.
        _over_ranks("optimizer", "Optimizer"),
        _over_ranks("backward", "Backward with all-reduce"),
        _over_ranks("forward", "Forward"),
        _over_ranks("data_wait", "Waiting for images"),
        _over_ranks("step", "A step"),
    ),
    "Learning": (
        Lines("Top-1 (%)", ("train/top1", "eval/top1")),
        Lines("Loss", ("train/loss", "eval/loss")),
        Lines("Top-5 (%)", ("train/top5", "eval/top5")),
        Lines("Learning rate", ("train/learning_rate",)),
        Lines("Gradient norm", ("train/grad_norm",)),
    ),
    "Health": (
        Lines("Updates left out", ("train/skipped_updates",)),
        Lines(
            "Images that could not be read", ("data/substituted_images", "data/read_retries", "eval/left_out_images")
        ),
        Lines("Memory (GiB)", ("memory/rss_gib", "memory/device_gib")),
        Lines("Cores and GPU at work (share)", ("machine/cpu_share", "gpu/utilization_share", "gpu/throttled_share")),
        Lines("Disk and network (MB/s)", ("machine/disk_read_mb_per_s", "machine/network_mb_per_s")),
        Lines("GPU clock (MHz)", ("gpu/sm_clock_mhz",)),
        Lines("GPU power (W)", ("gpu/power_w",)),
        Lines("GPU temperature (°C)", ("gpu/temperature_c",)),
        Lines("GPU memory errors", ("gpu/ecc_errors",)),
    ),
    "Checkpoints": (
        Lines("Training stood still for saves (s)", ("time/checkpoint_stall_s",)),
        Lines("From the copy to the commit (s)", ("checkpoint/seconds",)),
        Lines("Size of a step on disk (bytes)", ("checkpoint/bytes",)),
        Lines("Evaluation (s)", ("eval/seconds",)),
    ),
}
