"""What this machine has, read without torch."""

from collections.abc import Mapping
from pathlib import Path


def gpu_count(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a process started with `environ` may use.

    Counts device files, so that a launcher need not import torch; CUDA_VISIBLE_DEVICES narrows them.
    """
    present = sum(1 for p in devices.glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit())
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [part for part in visible.split(",") if part.strip() not in ("", "-1")]
    return min(present, len(named))
