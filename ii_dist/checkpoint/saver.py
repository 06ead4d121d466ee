"""Saves in the background: the training step waits for a copy in memory, never for the disk.

In: named tensors (CPU or CUDA; whole, or scattered over the ranks) and JSON scalars of one step. Out: a committed step,
told by `poll` or `wait`. `save` copies this rank's share into host buffers that are made once and used again (what is
scattered is collected one tensor at a time); one thread a rank then writes, hashes, agrees with the other ranks over a
group of its own and commits. Saves never overlap.
"""

import functools
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ii_dist.checkpoint.shards import TensorSpec, assign_shards, spec_of
from ii_dist.checkpoint.store import CheckpointStore, StepContent
from ii_dist.config.errors import CheckpointError
from ii_dist.config.schema import CheckpointConfig
from ii_dist.runtime.group import all_gather_bytes, new_cpu_group
from ii_dist.runtime.scattered import Scattered

_ALIGN_BYTES = 64
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How one save ended, the same `ok` on every rank.

    seconds: from the call of `save` until the step was on disk; late_s: how long that call waited for the save before
    it; bytes: of the whole step. message: why it failed, or what else there is to know; "" if nothing.
    """

    step: int
    ok: bool
    seconds: float
    bytes: int
    message: str
    late_s: float = 0.0


class Staging:
    """Host memory for copies of one rank's share: a single block, made anew only when the share's layout changes."""

    def __init__(self) -> None:
        self._layout: object = None
        self._views: dict[str, Tensor] = {}

    def copy(
        self, tensors: Mapping[str, Tensor | Scattered], owner: Mapping[str, int], rank: int
    ) -> "tuple[dict[str, Tensor], torch.cuda.Event | None]":
        """Copies of the tensors that `rank` owns, and the event after which they hold the values (None: they do now).

        From CUDA the copies are queued on the current stream, so that later updates of the tensors come after them and
        this call does not wait. Strides are kept: a plain memory copy, whatever the memory format. Collective where
        tensors are scattered: every rank then takes part in all of them, in the order of their names.
        """
        share = {name: tensors[name] for name in sorted(tensors) if owner[name] == rank}
        layout = [(n, t.dtype, t.shape, _dense_strides(t), t.is_cuda) for n, t in share.items()]
        if layout != self._layout:
            self._views = _carve(share)
            self._layout = layout
        with torch.no_grad():
            for name in sorted(tensors):
                tensor = tensors[name]
                whole = tensor.collect(owner[name]) if isinstance(tensor, Scattered) else tensor
                if owner[name] == rank:
                    assert whole is not None
                    self._views[name].copy_(whole, non_blocking=True)
        if not any(tensor.is_cuda for tensor in share.values()):
            return self._views, None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return self._views, event


def _dense_strides(tensor: Tensor | Scattered) -> tuple[int, ...]:
    """The tensor's own strides where they leave no gaps, else row-major ones."""
    if isinstance(tensor, Scattered):
        return torch.empty(tensor.shape, device="meta").stride()
    return torch.empty_like(tensor, device="meta").stride()


def _carve(share: Mapping[str, Tensor | Scattered]) -> dict[str, Tensor]:
    starts: dict[str, int] = {}
    total = 0
    for name, tensor in share.items():
        starts[name] = total
        total += -(-tensor.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    pinned = any(tensor.is_cuda for tensor in share.values())
    block = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
    views = {}
    for name, tensor in share.items():
        flat = block[starts[name] : starts[name] + tensor.nbytes].view(tensor.dtype)
        views[name] = flat.as_strided(tensor.shape, _dense_strides(tensor))
    return views


class Saver:
    """Saves steps of one run from every rank. Made, called and closed by all ranks in the same order (collective)."""

    def __init__(self, store: CheckpointStore, cfg: CheckpointConfig, timeout_s: float = 600.0) -> None:
        self._store = store
        self._cfg = cfg
        self._gather = functools.partial(all_gather_bytes, group=new_cpu_group(timeout_s))
        self._thread = ThreadPoolExecutor(1, "saver")
        self._running: Future[SaveResult] | None = None
        self._done: list[SaveResult] = []
        self._staging = Staging()

    def save(
        self, step: int, epoch: int, offset: int, tensors: Mapping[str, Tensor | Scattered], scalars: Mapping[str, Any]
    ) -> float:
        """Start saving a step; the seconds that training stood still.

        tensors: the same names on every rank; this rank's share is copied, so they may change afterwards. scalars: JSON
        values, written by rank 0. (epoch, offset): the position of the next image. Waits first for a save that is
        still running (its `late_s` is reported). Raises CheckpointError for what cannot be saved at all, on all ranks.
        """
        start = time.perf_counter()
        self._finish()
        late_s = time.perf_counter() - start
        specs = [spec_of(name, tensors[name]) for name in sorted(tensors)]
        shares = assign_shards(((s.name, s.bytes) for s in specs), self._store.world_size)
        owner = {name: rank for rank, share in enumerate(shares) for name in share}
        layout: list[tuple[TensorSpec, int]] = [(spec, owner[spec.name]) for spec in specs]
        state = encode_state(scalars)
        share, ready = self._staging.copy(tensors, owner, self._store.rank)
        content = StepContent(step, epoch, offset, layout, share, state)
        self._running = self._thread.submit(self._work, content, ready, start, late_s)
        return time.perf_counter() - start

    def poll(self) -> list[SaveResult]:
        """Saves that have ended since the last call; never waits. A bug in the thread is raised here."""
        if self._running is not None and self._running.done():
            self._finish()
        done, self._done = self._done, []
        return done

    def wait(self) -> list[SaveResult]:
        """Like `poll`, after the running save has ended."""
        self._finish()
        return self.poll()

    def close(self) -> list[SaveResult]:
        """Wait, end the thread; the last results."""
        try:
            return self.wait()
        finally:
            self._thread.shutdown()

    def _finish(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            self._done.append(running.result())

    def _work(self, content: StepContent, ready: "torch.cuda.Event | None", start: float, late_s: float) -> SaveResult:
        """In the thread: write, commit, then delete what retention lets go."""
        if ready is not None:
            ready.synchronize()
        try:
            size = self._store.save(content, self._gather)
        except CheckpointError as error:
            message = f"step {content.step} not saved: {error}"
            return SaveResult(content.step, False, time.perf_counter() - start, 0, message, late_s)
        seconds = time.perf_counter() - start
        message = ""
        if self._store.rank == 0:
            try:
                self._store.prune(self._cfg.keep_last, self._cfg.keep_every_steps, content.step)
            except CheckpointError as error:
                message = str(error)
        return SaveResult(content.step, True, seconds, size, message, late_s)


def encode_state(scalars: Mapping[str, Any]) -> bytes:
    """The text of state.json. Raises CheckpointError for values that JSON cannot hold exactly."""
    try:
        text = json.dumps(scalars, sort_keys=True, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state.json: scalars must be plain finite JSON values: {error}") from None
    return (text + "\n").encode()
