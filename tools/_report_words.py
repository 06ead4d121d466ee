"""Numbers of a report as text; "-" for what is not known. In: numbers. Out: words."""

import math

from ii_dist.metrics.words import in_words_rate, in_words_share

PHASE_NAMES = {
    "data_wait": "data wait",
    "copy": "copy to the device",
    "forward": "forward",
    "backward": "backward",
    "allreduce": "waiting for other ranks",
    "optimizer": "optimizer",
    "metrics": "metrics",
    "other": "other",
}


def per_cent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def rate_words(per_s: float) -> str:
    return "-" if math.isnan(per_s) else in_words_rate(per_s)


def share_words(share: float) -> str:
    return "-" if math.isnan(share) else in_words_share(share)


def gib(size: float) -> str:
    return "-" if math.isnan(size) else f"{size:.2f} GiB"


def ms(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{1000 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
