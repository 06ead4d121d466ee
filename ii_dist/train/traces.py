"""Profiler traces of single steps, asked for in the config or while the run goes on; for Perfetto.

In: the number of steps done, at each step's start; the phases that the step says it is in. Out: for each traced rank
`profile/steps_<first>-<last>_rank_<rank>.json.gz` in the run folder, with a range for each step and each phase. Ranks
need not agree on anything: each looks for itself. Nothing is recorded, and next to nothing done, between two traces.
"""

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

import torch

from ii_dist.config import ProfileConfig, RunFolder
from ii_dist.metrics import StepClock

logger = logging.getLogger(__name__)

_NEVER = -1
MOST_STEPS_ON_REQUEST = 1000


class Traces:
    """The traces of one attempt on one rank."""

    def __init__(
        self, cfg: ProfileConfig, folder: RunFolder, rank: int, device: torch.device, clock: StepClock
    ) -> None:
        self._cfg, self._folder, self._rank, self._device, self._clock = cfg, folder, rank, device, clock
        self._mine = cfg.traces_on(rank)
        self._first = self._last = 0
        self._wake = _NEVER  # steps done when there is something to do; compared with once a step
        self._answered: tuple[int, int] | None = None
        self._on_request = False
        self._trace: _Trace | None = None

    def plan(self, step: int) -> None:
        """Called with the step that the attempt goes on from: steps that are done already are not traced."""
        if self._mine and self._cfg.span is not None:
            first, last = self._cfg.span
            if last > step:
                self._expect(first, last, step)

    def begin_step(self, step: int) -> None:
        """`step` steps are done and the next one begins."""
        if step == self._wake or self._trace is not None:
            with self._clock.pause():
                self._act(step)

    def look(self, step: int) -> None:
        """Whether somebody asks for a trace; one look at the disk. Called by all ranks before they next wait for each
        other, so that no rank can be done with the file before all have seen it."""
        if self._wake != _NEVER or self._trace is not None or not (self._mine or self._rank == 0):
            return
        asked = self._folder.profile_now
        try:
            stat = asked.stat()
        except OSError:
            return
        if (stat.st_mtime_ns, stat.st_ino) != self._answered:
            self._answered, self._on_request = (stat.st_mtime_ns, stat.st_ino), True
            self._expect(step + 2, step + 1 + self._steps_asked_for(asked), step)

    def close(self) -> None:
        """Write what was traced of a trace that the end of the attempt cuts short."""
        if self._trace is not None:
            self._finish(self._trace)

    def _expect(self, first: int, last: int, step: int) -> None:
        self._first, self._last = first, last
        self._wake = max(step, first - 2)  # the step before warms the profiler up, where there is one

    def _act(self, step: int) -> None:
        if self._trace is None:
            self._wake = _NEVER
            if self._mine:
                self._trace = _Trace(self._device, self._cfg.memory)
                self._clock.phases.listener = self._trace.begin_phase
            else:  # rank 0, which takes the request away when those who were asked are done
                self._wake = self._last if step < self._last else _NEVER
                if self._wake == _NEVER:
                    self._take_request_away()
                return
        if step >= self._last:
            self._finish(self._trace)
        elif step >= self._first - 1:
            self._trace.begin_step(step + 1)

    def _finish(self, trace: "_Trace") -> None:
        self._trace = self._clock.phases.listener = None
        first, last = trace.stop()
        if first:
            path = self._folder.trace(first, last, self._rank)
            try:
                trace.write(path)
                logger.info("steps %d to %d traced: %s (open it in https://ui.perfetto.dev)", first, last, path)
            except OSError as error:
                logger.warning("%s: the trace cannot be written (%s); training goes on", path, error.strerror or error)
        self._take_request_away()

    def _take_request_away(self) -> None:
        if self._on_request and self._rank == 0:
            self._folder.profile_now.unlink(missing_ok=True)
        self._on_request = False

    def _steps_asked_for(self, file: Path) -> int:
        try:
            text = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            text = ""
        if text.isdecimal() and 1 <= int(text[:9]) <= MOST_STEPS_ON_REQUEST:
            return int(text)
        if text:
            logger.warning("%s: needs nothing or a number of steps, 1 to %d", file, MOST_STEPS_ON_REQUEST)
        return self._cfg.steps_on_request


class _Trace:
    """One use of torch's profiler: warming up from its making on, recording from the first `begin_step` on."""

    def __init__(self, device: torch.device, memory: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._device = device
        self._profiler: Any = profile(
            activities=[ProfilerActivity.CPU, *on_gpu], profile_memory=memory, record_shapes=memory, acc_events=True
        )
        self._profiler.prepare_trace()
        self._ranges = contextlib.ExitStack()
        self._phase = contextlib.ExitStack()
        self._thread = threading.get_ident()
        self.first = self.last = 0

    def begin_step(self, step: int) -> None:
        """Step number `step` begins: the one before it, if it was recorded, is over."""
        if not self.first:
            self.first = step
            self._profiler.start_trace()
        self._ranges.close()
        self._ranges.enter_context(torch.profiler.record_function(f"step {step}"))
        self._ranges.callback(self._phase.close)
        self.last = step

    def begin_phase(self, phase: str) -> None:
        """The step does `phase` from here on. Only the loop's own thread is heard: ranges of others would not nest."""
        if self.first and threading.get_ident() == self._thread:
            self._phase.close()
            self._phase.enter_context(torch.profiler.record_function(phase))

    def stop(self) -> tuple[int, int]:
        """First and last step recorded; (0, 0) = none."""
        self._ranges.close()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if not self.first:
            self._profiler.start_trace()  # the profiler cannot be let go of otherwise
        self._profiler.stop_trace()
        return self.first, self.last

    def write(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f".{path.name}")
        try:
            self._profiler.export_chrome_trace(str(part))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
