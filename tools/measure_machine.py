"""Measure what this machine can do at most: arithmetic, memory, disk, image loading, exchange between processes.

    python -m tools.measure_machine [--out FILE] [--json] [--seconds 1]

Every GPU, and the CPU with one thread and with all. The file (--out machine.json) is what `metrics.machine` takes in a
config, for MFU and the share of the roofline, and `tools.estimate_run --machine`. Takes less than a minute. Run it on
an idle machine: what others use is missing in the figures. Exit codes: 0 done, 2 wrong arguments, 5 a missing package.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from ii_dist.config import ConfigError
from ii_dist.config.errors import EXIT_DONE
from ii_dist.metrics.peaks import Device, MachineFile, machine_json, write_machine
from tools._border import run


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    if args.seconds <= 0:
        raise ConfigError(f"--seconds {args.seconds:g}: needs a number above 0")
    _say(f"load of this machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    machine = measure(args.seconds, args.only, args.folder)
    if args.out:
        write_machine(args.out, machine)
    print(json.dumps(machine_json(machine), indent=2) if args.json else "\n".join(table(machine)))
    if args.out and not args.json:
        print(f"\nuse it: metrics.machine={args.out} in a config, --machine {args.out} with tools.estimate_run")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.measure_machine", description="Measure the peaks of this machine, in less than a minute."
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write them, for metrics.machine and --machine")
    parser.add_argument("--json", action="store_true", help="print them for machines")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each measurement (default 1)")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: this folder)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="some parts only")
    return parser


PARTS = ("devices", "disk", "loader", "link")


def measure(seconds: float, parts: list[str], disk: Path) -> MachineFile:
    """The named parts, with progress on stderr. Raises ConfigError where `disk` is no folder to write in."""
    from tools import _machine_parts as feeding

    found: dict[str, object] = {}
    if "disk" in parts:
        _say("disk: reading")
        found["disk_mb_per_s"] = feeding.disk_mb_per_s(disk)
    if "loader" in parts:
        _say("loader: JPEGs to crops, one core")
        with tempfile.TemporaryDirectory(prefix="measure_machine-") as folder:
            rate, reader = feeding.loader_images_per_core_s(Path(folder), seconds)
        found |= {"loader_images_per_core_s": rate, "loader": reader}
    if "link" in parts:
        _say("exchange between two processes")
        rate, latency_s = feeding.allreduce_rates()
        found |= {"allreduce_gb_per_s": rate, "allreduce_latency_s": latency_s}
    cores = len(os.sched_getaffinity(0))
    devices = _devices(cores, seconds) if "devices" in parts else ()
    return MachineFile(devices, cores, **found)  # type: ignore[arg-type]


def _devices(cores: int, seconds: float) -> tuple[Device, ...]:
    import torch

    from tools._machine_rates import measure_device

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    found = [measure_device(f"cuda:{n}", torch.cuda.get_device_name(n), 0, seconds, _say) for n in gpus]
    found += [measure_device("cpu", _cpu_name(), threads, seconds, _say) for threads in sorted({1, cores})]
    return tuple(found)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def table(machine: MachineFile) -> list[str]:
    """The figures as lines of text."""
    lines = []
    for device in machine.devices:
        threads = f", {device.threads} thread{'s' if device.threads > 1 else ''}" if device.kind == "cpu" else ""
        lines.append(f"{device.name}{threads}")
        rates = ", ".join(f"{kind} {tflops:.4g}" for kind, tflops in device.tflops.items())
        lines.append(f"  matrix products    {rates} TFLOP/s")
        lines.append(f"  memory             {device.gb_per_s:,.4g} GB/s, read and written together")
        lines.append(f"  training step      {100 * device.roofline_share:.0f} % of the roofline (ResNet-50)")
    if machine.loader:
        rate, reader = machine.loader_images_per_core_s, machine.loader
        lines.append(f"loader               {rate:,.0f} images/s a core ({reader}, 500x375 JPEGs to 224x224)")
    if machine.disk_mb_per_s:
        lines.append(f"disk                 {machine.disk_mb_per_s:,.0f} MB/s read, one file")
    if machine.allreduce_gb_per_s:
        latency_ms = 1000 * machine.allreduce_latency_s
        lines.append(f"two gloo processes   {machine.allreduce_gb_per_s:.3g} GB/s each, {latency_ms:.2g} ms at least")
    return lines


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
