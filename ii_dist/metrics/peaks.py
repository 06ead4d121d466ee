"""What a machine can do at most: arithmetic and memory, from a table of data sheets or as measured.

In: the name of a GPU, or a file of `python -m tools.measure_machine`. Out: a `Device`. No torch.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ii_dist.config.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks of one GPU, or of one process on a CPU with `threads` threads."""

    name: str
    tflops: Mapping[str, float]
    """Type of the factors (bf16, fp16, tf32, fp32) -> 1e12 operations a second, dense."""
    gb_per_s: float
    """Memory, 1e9 bytes a second, read and written together."""
    link_gb_per_s: float = 0.0
    """Between the GPUs of a node, each way; 0 = unknown."""
    kind: str = "cuda"
    threads: int = 0
    roofline_share: float = 0.0
    """Share of the roofline that a training step reached when it was measured; 0 = it was not."""

    def flops_per_s(self, precision: str) -> float:
        """For `engine.precision`. fp32 on a GPU means TF32 where there is one: convolutions use it unless told not to.
        A type that the device has no units for counts as fp32."""
        order = (precision,) if precision != "fp32" else ("tf32", "fp32")
        return 1e12 * next((self.tflops[name] for name in order if name in self.tflops), self.tflops["fp32"])


def _row(name: str, bf16: float, fp16: float, tf32: float, fp32: float, gb_per_s: float, link: float = 0.0) -> Device:
    peaks = {"bf16": bf16, "fp16": fp16, "tf32": tf32, "fp32": fp32}
    return Device(name, {key: value for key, value in peaks.items() if value}, gb_per_s, link)


DEVICES: dict[tuple[str, ...], Device] = {
    ("B200",): _row("B200", 2250, 2250, 1125, 75, 8000, 900),
    ("GH200",): _row("GH200", 989.4, 989.4, 494.7, 66.9, 4000, 450),
    ("H200",): _row("H200", 989.4, 989.4, 494.7, 66.9, 4800, 450),
    ("H100", "PCIE"): _row("H100 PCIe", 756, 756, 378, 51.2, 2000, 64),
    ("H100", "NVL"): _row("H100 NVL", 835.5, 835.5, 417.5, 60, 3900, 300),
    ("H100",): _row("H100", 989.4, 989.4, 494.7, 66.9, 3350, 450),
    ("A100", "PCIE", "40GB"): _row("A100 PCIe 40GB", 312, 312, 156, 19.5, 1555, 32),
    ("A100", "40GB"): _row("A100 40GB", 312, 312, 156, 19.5, 1555, 300),
    ("A100", "PCIE"): _row("A100 PCIe", 312, 312, 156, 19.5, 1935, 32),
    ("A100",): _row("A100", 312, 312, 156, 19.5, 2039, 300),
    ("A30",): _row("A30", 165, 165, 82, 10.3, 933, 32),
    ("A10",): _row("A10", 125, 125, 62.5, 31.2, 600, 32),
    ("A6000",): _row("A6000", 154.8, 154.8, 77.4, 38.7, 768, 32),
    ("A40",): _row("A40", 149.7, 149.7, 74.8, 37.4, 696, 32),
    ("L40S",): _row("L40S", 362, 362, 183, 91.6, 864, 32),
    ("L4",): _row("L4", 121, 121, 60, 30.3, 300, 32),
    ("V100",): _row("V100", 0, 125, 0, 15.7, 900, 150),
    ("T4",): _row("T4", 0, 65, 0, 8.1, 320, 16),
    ("4090",): _row("RTX 4090", 165.2, 165.2, 82.6, 82.6, 1008, 32),
    ("3090",): _row("RTX 3090", 71, 71, 35.6, 35.6, 936, 16),
}
"""Words of a GPU's name, the first row whose words are all in it -> what NVIDIA's data sheets and architecture papers
say of it: dense matrix products (half of what they print "with sparsity"; accumulated in fp32), memory, NVLink or PCIe
one way. A measured file is nearer to what can be reached: an H100's 989 and 3,350 were measured as 798 and 3,000."""


def device_named(name: str) -> Device | None:
    """The row for a GPU's name, such as "NVIDIA A100-SXM4-80GB" or "H100"; None where none fits."""
    words = set(name.upper().replace("-", " ").replace("/", " ").split())
    found = (row for need, row in DEVICES.items() if words.issuperset(need))
    return next(found, None)


@dataclass(frozen=True, slots=True)
class MachineFile:
    """What `tools.measure_machine` found. 0 = not measured."""

    devices: tuple[Device, ...]
    cores: int
    loader_images_per_core_s: float = 0.0
    """500x375 JPEGs to 224x224 random crops, a core."""
    loader: str = ""
    disk_mb_per_s: float = 0.0
    allreduce_gb_per_s: float = 0.0
    """Bytes through each of two gloo ranks of this machine, a second."""
    allreduce_latency_s: float = 0.0

    def device(self, kind: str, threads: int = 0, processes: int = 1) -> Device:
        """A GPU, or the CPU for each of `processes` that compute at once, with the number of threads nearest to
        `threads`: they share the memory. Raises ConfigError."""
        fitting = [device for device in self.devices if device.kind == kind]
        if not fitting:
            raise ConfigError(f"the machine file has no {kind} device; measure again on such a machine")
        nearest = min(fitting, key=lambda device: abs(device.threads - threads))
        if kind != "cpu":
            return nearest
        shared = max(device.gb_per_s for device in fitting) / processes
        return dataclasses.replace(nearest, gb_per_s=min(nearest.gb_per_s, shared))


def write_machine(path: Path, machine: MachineFile) -> None:
    """As JSON. Raises ConfigError where the file cannot be written."""
    try:
        path.write_text(json.dumps(machine_json(machine), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def machine_json(machine: MachineFile) -> dict[str, Any]:
    """The file's content."""
    return {"format": FORMAT, **dataclasses.asdict(machine)}


def read_machine(path: Path) -> MachineFile:
    """Raises ConfigError for a file that is missing or not one of ours."""
    try:
        tree: Any = json.loads(path.read_text())
        if tree.pop("format") != FORMAT:
            raise ValueError("another format")
        return MachineFile(**tree | {"devices": tuple(Device(**device) for device in tree["devices"])})
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: is not a file of tools.measure_machine ({error}); measure again") from None


def choose_device(machine: str, gpu_name: str, threads: int = 0, processes: int = 1) -> Device | None:
    """The device that `metrics.machine` means, or None for no figures.

    machine: auto (the table's row for this GPU, nothing on a CPU), none, a GPU's name, or a file that ends in .json.
    gpu_name: "" on a CPU; threads: of this process; processes: on this node.
    """
    if machine == "none":
        return None
    if machine == "auto":
        return device_named(gpu_name) if gpu_name else None
    if machine.endswith(".json"):
        return read_machine(Path(machine)).device("cuda" if gpu_name else "cpu", threads, processes)
    if (found := device_named(machine)) is None:
        names = ", ".join(row.name for row in DEVICES.values())
        raise ConfigError(f"metrics.machine {machine!r}: not one of {names}, nor a measured file, which ends in .json")
    return found
