"""Memory of this process. In: its device. Out: the memory tags; asks the device for nothing that waits."""

import functools
import os
import resource

import torch

_GIB = 1 << 30
_STATM = "/proc/self/statm"


def memory_tags(device: torch.device) -> dict[str, float]:
    """Resident memory of the process and, on a GPU, the peak of its tensors, in GiB."""
    tags = {"memory/rss_gib": _rss_bytes() / _GIB}
    if device.type == "cuda":
        tags["memory/device_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
    return tags


def _rss_bytes() -> int:
    try:
        return int(os.pread(_statm(), 128, 0).split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: the peak is the next best
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache
def _statm() -> int:
    """Kept open: opening it costs ten times as much as reading it."""
    return os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC)
