"""Saves in the background: the training step waits for a copy in memory, never for the disk.

In: named tensors (CPU or CUDA; whole, or scattered over the ranks) and JSON scalars of one step. Out: a committed step,
told by `poll` or `wait`. `save` copies this rank's share into host memory (`staging`; what is scattered is collected
one tensor at a time); one thread a rank then writes, hashes, agrees with the other ranks over a group of its own and
commits. Saves never overlap.
"""

import contextlib
import functools
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ii_dist.checkpoint.staging import Staging
from ii_dist.checkpoint.store import CheckpointStore, StepContent
from ii_dist.config.errors import CheckpointError
from ii_dist.config.schema import CheckpointConfig
from ii_dist.runtime.group import all_gather_bytes, new_cpu_group
from ii_dist.runtime.scattered import Scattered

# Not the lowest: a thread that waits long for a core may hold the interpreter's lock meanwhile.
_NICER = 10
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


class Saver:
    """Saves steps of one run from every rank. Made, called and closed by all ranks in the same order (collective)."""

    def __init__(self, store: CheckpointStore, cfg: CheckpointConfig, timeout_s: float = 600.0) -> None:
        self._store = store
        self._cfg = cfg
        self._gather = functools.partial(all_gather_bytes, group=new_cpu_group(timeout_s))
        self._thread = ThreadPoolExecutor(1, "saver", initializer=_give_way)
        self._running: Future[SaveResult] | None = None
        self._done: list[SaveResult] = []
        self._staging = Staging(store.rank, store.world_size)

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
        state = encode_state(scalars)
        self._staging.begin(tensors)
        content = StepContent(step, epoch, offset, self._staging.layout, self._staging.images, state)
        # The disk may begin with the first shard while the others are copied.
        self._running = self._thread.submit(self._work, content, start, late_s)
        self._staging.fill(tensors)
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

    def _work(self, content: StepContent, start: float, late_s: float) -> SaveResult:
        """In the thread: write, commit, then delete what retention lets go."""
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


def _give_way() -> None:
    """Let the training threads of this process go first; the threads that this one starts inherit it."""
    here = threading.get_native_id()  # of this thread alone
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, here, os.getpriority(os.PRIO_PROCESS, here) + _NICER)


def encode_state(scalars: Mapping[str, Any]) -> bytes:
    """The text of state.json. Raises CheckpointError for values that JSON cannot hold exactly."""
    try:
        text = json.dumps(scalars, sort_keys=True, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state.json: scalars must be plain finite JSON values: {error}") from None
    return (text + "\n").encode()
