"""Memory of this process. In: its device. Out: the memory tags; asks the device for nothing that waits."""

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
        with open(_STATM, "rb", buffering=0) as file:  # noqa: PTH123  (a third of the time of Path.read_text)
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: the peak is the next best
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
