"""Say before a run is paid for how fast it will be, how long it takes, and what would hold it back.

    python -m tools.estimate_run CONFIG [key=value ...] --gpus N [--nodes M] [--device H100 | --machine FILE]
                                 [--link GB/s] [--cores N] [--threads N] [--loader IMAGES/S] [--storage GB/s]
                                 [--share 0.7] [--json]

The network is counted, the devices are those of a table (--device) or as measured by tools.measure_machine (--machine),
whose CPU it takes with engine.device=cpu; nothing is run. What is not given is assumed, and said. docs/performance.md
tells the model and how far it was off. Exit codes: 0 done, 2 wrong config or arguments.
"""

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from ii_dist.config import ConfigError, DataError, DataFacts, RunConfig, data_facts, load_config, make_plan
from ii_dist.config.errors import EXIT_DONE
from ii_dist.metrics.peaks import DEVICES, Device, MachineFile, device_named, read_machine
from ii_dist.metrics.words import in_words_s
from tools._border import run
from tools._estimate import Cluster, Estimate, estimate

GPUS_PER_NODE = 8
TABLE_SHARE = 0.7
"""Of the roofline by data sheet. Published ResNet-50 figures came to 0.66 to 0.89 of it (docs/performance.md)."""
LINK_GB_PER_S = 25.0  # 200 Gb/s a GPU
GPU_LATENCY_S, CPU_LATENCY_S = 5e-5, 2e-4  # of an exchange of nothing
CPU_LINK_GB_PER_S = 1.0  # gloo
LOADER_IMAGES_PER_CORE_S = 365.0
CORES_PER_GPU = 16
IMAGE_BYTES = 117e3  # of ImageNet's JPEGs, mean
IMAGENET = DataFacts(1_281_167, 50_000, 1000)


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    cfg = load_config(args.config, args.overrides)
    assumed: list[str] = []
    facts, image_bytes = _data(cfg, assumed)
    cluster = _cluster(cfg, args, image_bytes, assumed)
    plan = make_plan(cfg, cluster.ranks, facts)
    found = estimate(cfg, plan, cluster)
    if args.json:
        tree = {"run": cfg.name, **dataclasses.asdict(found), "cluster": dataclasses.asdict(cluster)}
        print(json.dumps(tree | {"assumed": assumed, "verdict": verdict(found, cluster)}, indent=2))
    else:
        print("\n".join(report(cfg, cluster, found, assumed)))
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.estimate_run", description="Predict speed, time and GPU-hours of a run."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.global_batch=4096")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of all nodes together")
    parser.add_argument("--nodes", type=int, metavar="M", help=f"(default: {GPUS_PER_NODE} ranks a node)")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device", metavar="NAME", help="a GPU of the table, such as H100 (default A100)")
    device.add_argument("--machine", type=Path, metavar="FILE", help="what tools.measure_machine wrote")
    parser.add_argument(
        "--link", type=float, metavar="GB/S", help="slowest link between ranks, each way, for each rank"
    )
    parser.add_argument("--cores", type=int, metavar="N", help=f"cores of a node (default {CORES_PER_GPU} a GPU)")
    parser.add_argument("--threads", type=int, metavar="N", help="of a rank that computes on a CPU (default its cores)")
    parser.add_argument("--loader", type=float, metavar="IMAGES/S", help="images that one core prepares in a second")
    parser.add_argument("--storage", type=float, default=0.0, metavar="GB/S", help="of a node (default: no limit)")
    parser.add_argument("--share", type=float, help="of the roofline that a step reaches (0 to 1)")
    parser.add_argument("--json", action="store_true", help="all figures for machines")
    return parser


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The first of what was asked for, what was measured and what is assumed; notes the last."""

    assumed: list[str]

    def __call__(self, what: str, unit: str, asked: float | None, measured: float, otherwise: float) -> float:
        if asked is not None and asked <= 0:
            raise ConfigError(f"--{what} {asked:g}: needs a number above 0")
        if asked is None and not measured:
            self.assumed.append(f"--{what} {otherwise:g}{unit and ' ' + unit}")
        return asked or measured or otherwise


def _cluster(cfg: RunConfig, args: argparse.Namespace, image_bytes: float, assumed: list[str]) -> Cluster:
    nodes = args.nodes or math.ceil(args.gpus / GPUS_PER_NODE)
    if args.gpus < 1 or nodes < 1 or args.gpus % nodes:
        raise ConfigError(
            f"--gpus {args.gpus} --nodes {nodes}: needs the same number of ranks, 1 or more, on each node"
        )
    here = args.gpus // nodes
    machine = read_machine(args.machine) if args.machine else MachineFile((), 0)
    on_cpu = cfg.engine.device == "cpu"
    chosen = _Chosen(assumed)
    cores = int(chosen("cores", "", args.cores, machine.cores, CORES_PER_GPU * here))
    device = _device(args, machine, on_cpu, args.threads or max(1, cores // here), here)
    if args.share is not None and args.share > 1:
        raise ConfigError(f"--share {args.share:g}: needs 0 to 1")
    inside = 0.0 if nodes > 1 else device.link_gb_per_s
    link = chosen(
        "link",
        "GB/s",
        args.link,
        machine.allreduce_gb_per_s if on_cpu and nodes == 1 else inside,
        CPU_LINK_GB_PER_S if on_cpu else LINK_GB_PER_S,
    )
    synthetic = cfg.data.source == "synthetic"
    measured_loader = machine.loader_images_per_core_s
    return Cluster(
        device=device,
        ranks=args.gpus,
        nodes=nodes,
        link_gb_per_s=link,
        link_latency_s=(machine.allreduce_latency_s or CPU_LATENCY_S) if on_cpu else GPU_LATENCY_S,
        share=chosen("share", "of the roofline", args.share, device.roofline_share, TABLE_SHARE),
        cores_per_rank=cores / here,
        loader_images_per_core_s=0.0
        if synthetic
        else chosen("loader", "images/s a core", args.loader, measured_loader, LOADER_IMAGES_PER_CORE_S),
        storage_gb_per_s=0.0 if synthetic else args.storage,
        image_bytes=image_bytes,
    )


def _device(args: argparse.Namespace, machine: MachineFile, on_cpu: bool, threads: int, processes: int) -> Device:
    if args.machine:
        return machine.device("cpu" if on_cpu else "cuda", threads, processes)
    if on_cpu:
        raise ConfigError("engine.device cpu: no table knows this CPU; give --machine FILE (tools.measure_machine)")
    if (found := device_named(args.device or "A100")) is None:
        raise ConfigError(f"--device {args.device}: is not one of {', '.join(row.name for row in DEVICES.values())}")
    return found


def _data(cfg: RunConfig, assumed: list[str]) -> tuple[DataFacts, float]:
    """Images of both splits, and bytes of one."""
    try:
        return data_facts(cfg.data), IMAGE_BYTES
    except DataError:
        assumed.append("the images of ImageNet (data.root is not readable here)")
        return IMAGENET, IMAGE_BYTES


def report(cfg: RunConfig, cluster: Cluster, e: Estimate, assumed: list[str]) -> list[str]:
    """The estimate for people."""
    step, ranks = e.step, f"{cluster.ranks} x {cluster.device.name}"
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    unit = "GPU-hours" if cluster.device.kind == "cuda" else "rank-hours"
    lines = [
        f"{cfg.name}: {cfg.model.network}, gate {cfg.model.gate}, {cfg.train.global_batch} images a step on {ranks}"
        f" ({nodes})",
        f"  network    {e.parameters / 1e6:.2f} M parameters; an image: {e.gflop_per_image:.3g} GFLOP,"
        f" {e.mb_per_image:.4g} MB",
        f"  speed      {e.images_per_s:,.0f} images/s ({e.images_per_s_rank:,.0f} a rank), MFU {e.mfu_share:.0%},"
        f" {e.images_per_s / e.roofline_images_per_s:.0%} of the roofline",
        f"  step       {_ms(step.step_s)}: compute {_ms(step.compute_s)}, exchange {_ms(step.exchange_s)}"
        f" ({_ms(step.exposed_s)} of it not hidden)",
        f"  input      {_ms(step.loader_s)} to load a step's images, {_ms(step.storage_s)} to read them",
        f"  time       {in_words_s(3600 * e.hours)} for {e.steps:,} steps ({e.epochs_per_hour:.3g} epochs an hour,"
        f" evaluation included), {e.rank_hours:,.1f} {unit}; starts, saves and queues come on top",
        f"  verdict    {verdict(e, cluster)}",
        f"  launch     launch.expected_images_per_s_per_rank={_rate(e.images_per_s_rank)} for a dry run's account",
    ]
    return lines + ([f"  assumed    {'; '.join(assumed)}"] if assumed else [])


def verdict(e: Estimate, cluster: Cluster) -> str:
    """What the run waits for, in words."""
    step = e.step
    if step.bound == "loader":
        needed = cluster.cores_per_rank * step.loader_s / max(step.compute_s + step.exposed_s, 1e-9)
        return (
            f"input bound: the cores prepare images slower than the network takes them; {math.ceil(needed)} cores a "
            f"rank would do (there are {cluster.cores_per_rank:g})"
        )
    if step.bound == "storage":
        return "storage bound: images come off the storage slower than the network takes them"
    if step.bound == "exchange":
        return "exchange bound: gradients take longer than what hides them; more images a rank, or a faster link"
    lost = step.exposed_s / step.step_s
    limit = "bandwidth of the memory" if step.bound == "memory" else "arithmetic"
    return f"compute bound, by the {limit}; exchange of gradients costs {lost:.1%} of the step"


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


if __name__ == "__main__":
    run(main)
