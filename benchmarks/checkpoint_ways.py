"""The ways to save and load one state that benchmarks/checkpoint.py compares, and how it takes turns.

The one place that calls torch.save and torch.load, to be measured; what is loaded was written a moment before.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.step import config
from ii_dist.checkpoint import CheckpointStore, RunFacts, Saver, find_newest, load_step
from ii_dist.config import RunConfig, RunFolder
from ii_dist.models import create_model

Figures = dict[str, float]
State = dict[str, Tensor]
KEEP = 2


def resnet50_config(**engine: object) -> RunConfig:
    tree = config("unused").model_dump()
    tree["model"]["network"] = "ini_resnet50"
    tree["engine"] |= engine
    return RunConfig.model_validate(tree)


def make_state() -> State:
    """As an engine hands it over: weights, buffers, momentum."""
    model = create_model(resnet50_config().model, 1000).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    return state | {
        f"optimizer.{name}.momentum_buffer": torch.randn_like(parameter.detach())
        for name, parameter in model.named_parameters()
    }


class Timer:
    """Wall and CPU seconds of the process, and CPU seconds of this thread, since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu, self._thread = time.perf_counter(), time.process_time(), time.thread_time()

    def read(self) -> Figures:
        return {
            "wall_s": time.perf_counter() - self._wall,
            "cpu_s": time.process_time() - self._cpu,
            "thread_s": time.thread_time() - self._thread,
        }


def flush_tree(folder: Path) -> None:
    """What a writer that flushes nothing would have had to do."""
    for path in [*folder.rglob("*"), folder]:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


class Ways:
    """The same state saved in each way; every call returns its stall and the time until it was on disk."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state = state
        self._folder = folder
        self._bytes = torch.randint(0, 255, (sum(t.nbytes for t in state.values()),), dtype=torch.uint8)
        self._spare = {name: tensor.clone() for name, tensor in state.items()}
        self.run = RunFolder(folder / "run")
        self.run.root.mkdir()
        store = CheckpointStore(self.run, RunFacts("ddp", 256), 0, 1, 1)
        cfg = resnet50_config().checkpoint.model_copy(update={"keep_last": KEEP})
        self.saver = Saver(store, cfg)
        self._step = 0

    def floor(self) -> Figures:
        """One buffer to a new file, flushed."""
        path = self._folder / "raw"
        path.unlink(missing_ok=True)
        left = memoryview(self._bytes.numpy().data)
        timer = Timer()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        while left:
            left = left[os.write(file, left[: 1 << 24]) :]
        os.fsync(file)
        os.close(file)
        return timer.read()

    def clone(self) -> Figures:
        """Copies of all tensors, in new memory."""
        timer = Timer()
        copies = {name: tensor.clone() for name, tensor in self.state.items()}
        found = timer.read()
        assert copies
        return found

    def copy(self) -> Figures:
        """Copies of all tensors into memory that is there."""
        timer = Timer()
        for name, tensor in self.state.items():
            self._spare[name].copy_(tensor)
        return timer.read()

    def start_ours(self) -> Figures:
        self._step += 1
        timer = Timer()
        self.saver.save(self._step, 0, 0, self.state, {"step": self._step})
        return timer.read()

    def ours(self) -> Figures:
        timer = Timer()
        stall = self.start_ours()
        (result,) = self.saver.wait()
        assert result.ok, result.message
        assert not result.message, result.message
        return timer.read() | {
            "stall_s": stall["wall_s"],
            "stall_thread_s": stall["thread_s"],
            "wall_s": result.seconds,
        }

    def torch_save(self) -> Figures:
        """Into a new file, flushed here."""
        path = self._folder / "torch.pt"
        path.unlink(missing_ok=True)
        timer = Timer()
        with path.open("wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        return _all_of_it(timer.read())

    def dcp_save(self) -> Figures:
        folder = self._new_folder("dcp")
        timer = Timer()
        dcp_save(self.state, checkpoint_id=folder)
        return _all_of_it(timer.read())

    def start_dcp_async(self) -> tuple[Figures, Callable[[], object]]:
        folder = self._new_folder("dcp_async")
        timer = Timer()
        handle: Any = dcp_async_save(self.state, checkpoint_id=folder)
        return timer.read(), handle.result

    def dcp_async(self) -> Figures:
        timer = Timer()
        stall, wait = self.start_dcp_async()
        wait()
        return timer.read() | {"stall_s": stall["wall_s"], "stall_thread_s": stall["thread_s"]}

    def load_ours(self, verify: bool = True) -> Figures:
        timer = Timer()
        found, _ = find_newest(self.run.checkpoints)
        assert found is not None
        if not verify:
            timer = Timer()
        tensors, _ = load_step(found.path, found.manifest, verified=True)
        self._fill(tensors)
        return timer.read()

    def load_torch(self) -> Figures:
        timer = Timer()
        self._fill(torch.load(self._folder / "torch.pt", weights_only=True))
        return timer.read()

    def load_dcp(self) -> Figures:
        timer = Timer()
        dcp_load(dict(self._spare), checkpoint_id=self._folder / "dcp")
        return timer.read()

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Into the tensors of a network that is there, as a resumed run does."""
        for name, tensor in self._spare.items():
            tensor.copy_(tensors[name])

    def _new_folder(self, name: str) -> Path:
        shutil.rmtree(self._folder / name, ignore_errors=True)
        return self._folder / name


def _all_of_it(found: Figures) -> Figures:
    return found | {"stall_s": found["wall_s"], "stall_thread_s": found["thread_s"]}


def interleaved(ways: Mapping[str, Callable[[], Figures]], turns: int) -> dict[str, list[Figures]]:
    """Every way once a turn, nobody always first; the first turn, which makes memory and folders, is left out."""
    names = list(ways)
    found: dict[str, list[Figures]] = {name: [] for name in ways}
    for turn in range(-1, turns):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            figures = ways[name]()
            if turn >= 0:
                found[name].append(figures)
    return found


def medians(found: Mapping[str, list[Figures]]) -> dict[str, Figures]:
    return {name: {key: statistics.median(f[key] for f in rows) for key in rows[0]} for name, rows in found.items()}


def ratio(found: Mapping[str, list[Figures]], over: tuple[str, str], under: tuple[str, str]) -> float:
    """Median of the turns' ratios; each side: (way, figure)."""
    pairs = zip(found[over[0]], found[under[0]], strict=True)
    return statistics.median(a[over[1]] / b[under[1]] for a, b in pairs)
