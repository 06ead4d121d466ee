"""The loader doctor: what bounds the loading of a run's images on this machine, and what to set.

    python -m tools.bench_loader CONFIG [key=value ...] [--seconds 5] [--step] [--json]

Measures, with the config's own images, sizes and threads: reading from storage (cold where the system lets it be made
cold, and warm), decoding on one core, each reader (DALI, torch, synthetic; DALI on a GPU where there is one), a few
numbers of threads and prefetched batches, and with --step what the network takes. Then says in words what bounds the
run, and prints a YAML patch. Exit codes: 0 done, 2 wrong config or arguments, 3 wrong data, 5 a missing package.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ii_dist.config import (
    ClusterError,
    ConfigError,
    DataConfig,
    DataFacts,
    Plan,
    RunConfig,
    data_facts,
    gpu_count,
    load_config,
    make_plan,
    ranks_on_a_node,
    recipe_differences,
)
from ii_dist.config.errors import EXIT_DONE
from ii_dist.data import Index
from tools import _loader_verdict as verdict
from tools._border import run
from tools._loader_speeds import Setting, Speed, source_speed, step_speed, windows_per_cpu_s
from tools._loader_storage import ReadSpeed, decoded_per_cpu_s, read_cold, read_warm, spread_rows, write_sample
from tools._loader_verdict import Findings, rate

SAMPLE_IMAGES = 1024
READERS = ("dali", "torch", "synthetic")


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    if args.seconds <= 0:
        raise ConfigError(f"--seconds {args.seconds:g}: needs a number above 0")
    cfg = load_config(args.config, args.overrides)
    doctor = Doctor(cfg, args.seconds, args.step)
    with tempfile.TemporaryDirectory(prefix="bench_loader-") as folder:
        doctor.measure(Path(folder))
    findings = doctor.findings()
    data = verdict.changes(findings)
    patch = verdict.patch_text(args.config.resolve(), data) if data else ""
    if args.json:
        print(json.dumps(as_json(doctor, findings, data), indent=2))
        return EXIT_DONE
    for line in [*table(doctor, findings), "", verdict.bound(findings)[1], *verdict.remarks(findings), ""]:
        print(line)
    if not data:
        print("no change to make: nothing that was tried would make this run faster by more than 5 % and the noise")
        return EXIT_DONE
    overrides = " ".join(f"data.{key}={value}" for key, value in data.items())
    print(f"# save this as a config of its own, or put on the command line: {overrides}")
    patched = cfg.model_copy(update={"data": DataConfig.model_validate(cfg.data.model_dump() | data)})
    if recipe_differences(cfg, patched):
        print("# this changes pixels in the last bit: for new runs; a run that has begun keeps what it has")
    print(patch, end="")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_loader", description="Say what bounds the loading of a run's images here."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.root=/scratch/imagenet")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement (default 5)")
    parser.add_argument("--step", action="store_true", help="measure the network's training step as well")
    parser.add_argument("--json", action="store_true", help="all figures for machines")
    return parser


class Doctor:
    """One rank's share of this machine, the measurements of it, and what they found."""

    def __init__(self, cfg: RunConfig, seconds: float, with_step: bool) -> None:
        self.cfg, self._seconds, self._with_step = cfg, seconds, with_step
        gpus = gpu_count(os.environ)
        self.ranks = ranks_on_a_node(cfg, gpus)
        self.device = "cuda:0" if gpus and cfg.engine.device != "cpu" else "cpu"
        if cfg.engine.device == "cuda" and not gpus:
            raise ConfigError("engine.device cuda: this machine has no GPU; add engine.device=auto to look at its CPU")
        self._facts = data_facts(cfg.data)
        self.plan: Plan = make_plan(cfg, self.ranks * cfg.launch.nodes, self._facts)
        cores = sorted(os.sched_getaffinity(0))
        self.cores = max(1, len(cores) // self.ranks)
        # A rank alone on the machine would borrow the cores of the others.
        os.sched_setaffinity(0, cores[: self.cores])
        self.current = Setting(
            cfg.data.source,
            cfg.data.threads_per_rank or self.cores,
            cfg.data.prefetch_batches,
            self.device,
            cfg.data.decode,
            getattr(cfg.data, "hw_decoder_share", None) if self.device != "cpu" else None,
        )
        self.files = cfg.data.source != "synthetic"
        self.batch = self.plan.micro_batch
        self.cold: ReadSpeed | str | None = None
        self.warm: ReadSpeed | None = None
        self.decoded_per_core: float | None = None
        self.windows_per_core: float | None = None
        self.need: Speed | None = None
        self.trials: dict[Setting, list[Speed]] = {}
        self.other: dict[str, Speed] = {}
        self.missing: dict[str, str] = {}
        self._fits_memory, self._end_s = True, 0.0

    def measure(self, folder: Path) -> None:
        """Everything, with progress on stderr."""
        settings = list(self._settings())
        others = [name for name in READERS if name != self.current.source and (self.files or name == "synthetic")]
        parts = (4 + 2) * self.files + len(settings) + 2 + len(others) + self._with_step
        limit_s = 2 * parts * self._seconds + 30
        self._end_s = time.monotonic() + limit_s
        _say(f"{parts} measurements, {self._seconds:g} s each; none is begun after {limit_s:.0f} s")
        _say(f"load of this machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        facts = self._measure_files(folder) if self.files else self._facts
        first = self._speed(folder, facts, self.current)
        self.trials[self.current] = [first]
        for setting in settings:
            self._try(folder, facts, setting)
        best = max(self.trials, key=lambda setting: self.trials[setting][0].images_per_s)
        for prefetch in sorted({1, 4} - {best.prefetch_batches}) if self.files else ():
            self._try(folder, facts, dataclasses.replace(best, prefetch_batches=prefetch))
        self._try(folder, facts, self.current)
        for name in others:
            self._try_other(folder, facts, name)
        if self._with_step and self._time_is_left("network"):
            _say(f"network {self.cfg.model.network}")
            self.need = step_speed(self.cfg, self.plan, self.device, self.cores, self._seconds)

    def findings(self) -> Findings:
        """What was measured, one speed a setting: the mean of its turns."""
        first, last = self.trials[self.current][0].images_per_s, self.trials[self.current][-1].images_per_s
        return Findings(
            current=self.current,
            trials={setting: _mean(speeds) for setting, speeds in self.trials.items()},
            other=self.other,
            noise=abs(first - last) / max(first, last),
            ranks=self.ranks,
            cores=self.cores,
            cold=self.cold,
            fits_memory=self._fits_memory,
            decoded_per_core=self.decoded_per_core,
            windows_per_core=self.windows_per_core,
            need=self.need,
            missing=self.missing,
        )

    def _settings(self) -> Iterator[Setting]:
        """Other numbers of threads; on a GPU also the other decoders."""
        if not self.files:
            return
        for threads in sorted({max(1, self.cores // 2), self.cores, self.cores + 1} - {self.current.threads_per_rank}):
            yield dataclasses.replace(self.current, threads_per_rank=threads)
        if self.device != "cpu" and self.current.source == "dali":
            yield dataclasses.replace(self.current, decode="gpu" if self.current.decode == "cpu" else "cpu")
            if (share := self.current.hw_decoder_share) is not None:
                yield dataclasses.replace(self.current, hw_decoder_share=0.0 if share else 1.0)

    def _measure_files(self, folder: Path) -> DataFacts:
        """Storage and one core's decoding; makes the sample that the readers get."""
        index = Index.open(Path(self.cfg.data.root) / "train.index")
        self._fits_memory = int(index.length.sum()) < 0.8 * _free_memory_bytes()
        _say("storage, cold")
        self.cold = read_cold(index, self._seconds)
        rows = spread_rows(index, max(SAMPLE_IMAGES, self.batch))
        _say("storage, warm")
        self.warm = read_warm(index, rows, self._seconds)
        _say("decoding whole images, one core")
        self.decoded_per_core = decoded_per_cpu_s(index, rows, self._seconds)
        # Some batches must fit a measurement; the time of an image hardly depends on how many come together.
        fitting = int(self.decoded_per_core * self.current.threads_per_rank * self._seconds / 8)
        self.batch = min(self.batch, max(16, fitting), len(rows))
        write_sample(index, rows, folder)
        facts = DataFacts(len(rows), self._facts.eval_images, self._facts.num_classes)
        _say("decoding crop windows, one core")
        self.windows_per_core = windows_per_cpu_s(self.cfg, folder, facts, self.batch, self._seconds)
        return facts

    def _try(self, folder: Path, facts: DataFacts, setting: Setting) -> None:
        if self._time_is_left(describe(setting)):
            self.trials.setdefault(setting, []).append(self._speed(folder, facts, setting))

    def _try_other(self, folder: Path, facts: DataFacts, name: str) -> None:
        setting = dataclasses.replace(self.current, source=name, decode="auto")
        if self._time_is_left(name):
            try:
                self.other[name] = self._speed(folder, facts, setting)
            except ClusterError as error:
                self.missing[name] = str(error)

    def _speed(self, folder: Path, facts: DataFacts, setting: Setting) -> Speed:
        _say(describe(setting))
        return source_speed(self.cfg, folder, facts, self.batch, setting, self._seconds)

    def _time_is_left(self, name: str) -> bool:
        if time.monotonic() < self._end_s:
            return True
        self.missing[name] = "the time was over before its turn"
        return False


def describe(setting: Setting) -> str:
    """A setting in a few words."""
    if setting.source == "synthetic":
        return "synthetic"
    more = f", decode {setting.decode}" if setting.device != "cpu" and setting.source == "dali" else ""
    more += "" if setting.hw_decoder_share is None else f", hw_decoder_share {setting.hw_decoder_share:g}"
    device = "GPU" if setting.device != "cpu" else "CPU"
    return f"{setting.source} on {device}, {setting.threads_per_rank} threads, {setting.prefetch_batches} ahead{more}"


def table(doctor: Doctor, f: Findings) -> list[str]:
    """What was measured, as lines of text."""
    cores = f"{f.cores} core{'s' if f.cores > 1 else ''}"
    lines = [f"{doctor.cfg.name}: one of {f.ranks} ranks of this node, {cores} a rank, batches of {doctor.batch}", ""]
    if isinstance(f.cold, str):
        lines.append(f"{'storage, cold':<44} not measured: {f.cold}")
    for name, read in (("storage, cold", f.cold), ("storage, warm (page cache)", doctor.warm)):
        if isinstance(read, ReadSpeed):
            lines.append(f"{name:<44}{rate(read.images_per_s):>10} images/s  {read.bytes_per_s / 1e6:,.0f} MB/s")
    if f.decoded_per_core:
        lines.append(f"{'decoding whole images, one core':<44}{rate(f.decoded_per_core):>10} images/s")
    if f.windows_per_core:
        name = f"decoding crop windows, one core, {f.current.source}"
        lines.append(f"{name:<44}{rate(f.windows_per_core):>10} images/s")
    speeds: list[tuple[str, Speed]] = [(describe(setting), speed) for setting, speed in f.trials.items()]
    speeds += [(describe(dataclasses.replace(f.current, source=name)), speed) for name, speed in f.other.items()]
    speeds += [(f"network, {doctor.cfg.model.network}", f.need)] if f.need else []
    for name, speed in speeds:
        lines.append(f"{name:<44}{rate(speed.images_per_s):>10} images/s  {speed.cpu_ms_per_image:.2f} CPU ms an image")
    return lines


def as_json(doctor: Doctor, f: Findings, data: dict[str, object]) -> dict[str, object]:
    """All figures and the verdict."""
    word, sentence = verdict.bound(f)
    return {
        "ranks": f.ranks,
        "cores_per_rank": f.cores,
        "batch": doctor.batch,
        "storage_cold": dataclasses.asdict(f.cold) if isinstance(f.cold, ReadSpeed) else f.cold,
        "storage_warm": dataclasses.asdict(doctor.warm) if doctor.warm else None,
        "fits_memory": f.fits_memory,
        "decoded_per_core": f.decoded_per_core,
        "windows_per_core": f.windows_per_core,
        "trials": [dataclasses.asdict(setting) | dataclasses.asdict(speed) for setting, speed in f.trials.items()],
        "other": {name: dataclasses.asdict(speed) for name, speed in f.other.items()},
        "network": dataclasses.asdict(f.need) if f.need else None,
        "noise": f.noise,
        "bound": word,
        "verdict": sentence,
        "remarks": verdict.remarks(f),
        "patch": {"data": data} if data else {},
    }


def _mean(speeds: list[Speed]) -> Speed:
    return Speed(*(sum(values) / len(speeds) for values in zip(*map(dataclasses.astuple, speeds), strict=True)))


def _free_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
