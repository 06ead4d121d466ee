"""What the machine does beside us: processors, disks and network of the node, and the rank's GPU.

In: a look every few seconds, in a thread of its own, so that no step waits for a driver. Out: means since the last line
under their tags. What a machine does not tell is left out.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
_LONGEST_LOOK_S = 5.0  # a driver that hangs does not keep the process
_MB = 1e6
_NOT_CARDS = ("lo", "veth", "docker", "br-", "virbr", "bond", "tun", "tap")
"""First letters of interfaces whose traffic stays here or is counted at a card as well."""
_LARGEST = ("gpu/temperature_c", "gpu/ecc_errors")
Look = Callable[[], Mapping[str, float]]


class MachineWatch:
    """Means (of temperature and errors: maxima) of what `looks` told since the last `tags`."""

    def __init__(self, looks: list[Look], every_s: float = LOOK_EVERY_S) -> None:
        self._looks, self._every_s = looks, every_s
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._seen: dict[str, list[float]] = {}
        self._thread: threading.Thread | None = None
        if looks:
            self._thread = threading.Thread(target=self._run, name="machine-watch", daemon=True)
            self._thread.start()

    def tags(self) -> dict[str, float]:
        """Since the last call; empty where nobody has looked since then."""
        with self._lock:
            seen, self._seen = self._seen, {}
        return {tag: max(v) if tag in _LARGEST else sum(v) / len(v) for tag, v in seen.items()}

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_LONGEST_LOOK_S)

    def _run(self) -> None:
        while not self._closed.wait(self._every_s):
            for look in self._looks:
                with contextlib.suppress(OSError):  # /proc of a container may miss a part
                    told = look()
                    with self._lock:
                        for tag, value in told.items():
                            self._seen.setdefault(tag, []).append(value)


def machine_looks(local_rank: int, device: torch.device) -> list[Look]:
    """What this rank looks at: the first rank of a node at the node, every rank with a GPU at that."""
    looks: list[Look] = []
    if local_rank == 0 and (node := node_look()) is not None:
        looks.append(node)
    if device.type == "cuda" and (gpu := gpu_look(f"GPU-{torch.cuda.get_device_properties(device).uuid}")) is not None:
        looks.append(gpu)
    return looks


def node_look() -> Look | None:
    """Share of the cores in use, megabytes a second from disks and through network cards, since the look before."""
    try:
        import psutil
    except ImportError:
        logger.warning("machine/*: psutil is not installed (python -m pip install psutil); these numbers are left out")
        return None

    def counters() -> tuple[float, ...]:
        disks, cpu = psutil.disk_io_counters(), psutil.cpu_times()
        cards = psutil.net_io_counters(pernic=True)
        moved = sum(c.bytes_sent + c.bytes_recv for name, c in cards.items() if not name.startswith(_NOT_CARDS))
        idle_s = cpu.idle + getattr(cpu, "iowait", 0.0)
        return time.monotonic(), sum(cpu[:8]), idle_s, -1.0 if disks is None else disks.read_bytes, moved

    before = counters()

    def look() -> Mapping[str, float]:
        nonlocal before
        after = counters()
        seconds, cpu_s, idle_s, disk, moved = (now - then for now, then in zip(after, before, strict=True))
        before = after
        tags = {"machine/network_mb_per_s": max(0.0, moved) / _MB / seconds}
        if cpu_s > 0:
            tags["machine/cpu_share"] = min(1.0, max(0.0, 1 - idle_s / cpu_s))
        if after[3] >= 0:
            tags["machine/disk_read_mb_per_s"] = max(0.0, disk) / _MB / seconds
        return tags

    return look


def gpu_look(uuid: str) -> Look | None:
    """What NVIDIA's driver tells of the GPU `uuid`; None, with a line in the log, where it cannot be asked."""
    try:
        import pynvml
    except ImportError:
        logger.warning(
            "gpu/*: nvidia-ml-py is not installed (python -m pip install nvidia-ml-py); these numbers are left out"
        )
        return None
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        logger.warning("gpu/*: %s cannot be watched (%s); these numbers are left out", uuid, error)
        return None
    asked = _gpu_questions(pynvml, gpu)

    def look() -> Mapping[str, float]:
        tags = {}
        for tag, ask in asked.items():
            with _not_told(pynvml):
                tags[tag] = float(ask())
        return tags

    return look


def _gpu_questions(nvml: Any, gpu: Any) -> dict[str, Callable[[], float]]:
    # Clocks that are lower than they could be for heat, power or a fault; not because nobody asks for more.
    held_back = (
        nvml.nvmlClocksThrottleReasonSwPowerCap
        | nvml.nvmlClocksThrottleReasonHwSlowdown
        | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
    )
    uncorrected, since_reset = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return {
        "gpu/utilization_share": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
        "gpu/sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "gpu/power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "gpu/temperature_c": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "gpu/ecc_errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(gpu, uncorrected, since_reset),
        "gpu/throttled_share": lambda: bool(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu) & held_back),
    }


@contextlib.contextmanager
def _not_told(nvml: Any) -> Iterator[None]:
    """A GPU without ECC, or a slice of one, refuses some questions."""
    with contextlib.suppress(nvml.NVMLError):
        yield
