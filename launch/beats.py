"""Signs of life of the ranks of one node, and who fell silent first.

In: the small files that `ii_dist.runtime.heartbeat` writes, in a folder in this node's memory. Out: which ranks count
as hung, and the facts that `status` shows of each rank.
"""

import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from launch.records import Facts

WARM_SIGNS = 3
"""Signs of a phase after which it runs at its own pace: before them lies what happens once, such as compilation."""
KEPT_STEPS = 31
_SHARED_MEMORY = Path("/dev/shm")
_STEADY = ("data", "step", "evaluate")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of silence; as in `SupervisionConfig`."""

    hang_after_s: float = 30.0
    hang_steps: float = 5.0
    start_timeout_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class Sign:
    """The last sign of life of a rank."""

    signs: int
    of_phase: int
    step: int
    save_s: float
    phase: str


class RankLife:
    """What is known of one rank's life."""

    def __init__(self, path: Path, now_s: float) -> None:
        self.path = path
        self.sign: Sign | None = None
        self.changed_s = now_s
        self._stepped_s: float | None = None
        self._steps_s: deque[float] = deque(maxlen=KEPT_STEPS)

    def look(self, now_s: float) -> None:
        try:
            words = self.path.read_text(encoding="ascii").split()
            new = Sign(int(words[0]), int(words[1]), int(words[2]), float(words[3]), words[4])
        except (OSError, ValueError, IndexError):
            return
        if self.sign is None or new.signs != self.sign.signs:
            if self.sign is None or new.step != self.sign.step:
                if self.sign is not None and self._stepped_s is not None and new.step > self.sign.step:
                    self._steps_s.append((now_s - self._stepped_s) / (new.step - self.sign.step))
                self._stepped_s = now_s
            self.sign, self.changed_s = new, now_s

    @property
    def step_p50_s(self) -> float | None:
        return statistics.median(self._steps_s) if self._steps_s else None

    def limit_s(self, limits: Limits) -> float:
        """Silence that counts as a hang now; 0 = none does."""
        if self.sign is None or self.sign.phase not in _STEADY or self.sign.of_phase < WARM_SIGNS:
            return limits.start_timeout_s and max(limits.start_timeout_s, limits.hang_after_s)
        return max(limits.hang_after_s, limits.hang_steps * (self.step_p50_s or 0.0))


class NodeLife:
    """The ranks of one node: where they leave signs, what these say."""

    def __init__(self, ranks: Sequence[int], limits: Limits, now: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._now = now
        self._folder = Path(
            tempfile.mkdtemp(prefix="ii-dist-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None)
        )
        self._ranks = {rank: RankLife(self._folder / f"rank_{rank:05d}", now()) for rank in ranks}
        for life in self._ranks.values():
            life.path.touch(mode=0o600)

    def __enter__(self) -> "NodeLife":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def path(self, rank: int) -> Path:
        """Where `rank` writes its signs."""
        return self._ranks[rank].path

    def look(self) -> None:
        now_s = self._now()
        for life in self._ranks.values():
            life.look(now_s)

    def silent(self, live: Sequence[int]) -> list[int]:
        """Live ranks that gave no sign for longer than they may."""
        now_s, found = self._now(), []
        for rank in live:
            life = self._ranks[rank]
            limit_s = life.limit_s(self._limits)
            if limit_s and now_s - life.changed_s > limit_s:
                found.append(rank)
        return found

    def facts(self, pids: dict[int, int]) -> dict[str, Facts]:
        """What `status` and `why` show, by rank; `state` is the kernel's letter for the process."""
        now_s, shown = self._now(), {}
        for rank, life in self._ranks.items():
            sign = life.sign or Sign(0, 0, 0, 0.0, "start")
            shown[str(rank)] = {
                "pid": pids.get(rank),
                "phase": sign.phase,
                "step": sign.step,
                "signs": sign.signs,
                "silent_s": round(now_s - life.changed_s, 2),
                "step_p50_s": life.step_p50_s,
                "save_s": sign.save_s,
                "state": _state(pids[rank]) if rank in pids else "",
            }
        return shown

    @property
    def stepped(self) -> bool:
        """Whether any rank has finished a step: it has come to the next one, or to an evaluation."""
        signs = [life.sign for life in self._ranks.values() if life.sign is not None]
        return any(sign.phase in _STEADY and sign.of_phase > 1 for sign in signs)

    @property
    def lead_s(self) -> float:
        """Seconds that a stop needs: to the end of a step, and a save, with room for a slow one."""
        lives = [life for life in self._ranks.values() if life.sign is not None]
        save_s = max((life.sign.save_s for life in lives if life.sign), default=0.0)
        step_s = max((life.step_p50_s or 0.0 for life in lives), default=0.0)
        return 2.0 * save_s + 5.0 * step_s + 10.0


def first_silent(ranks: dict[str, Facts]) -> int:
    """Which of the ranks of all nodes to blame for a hang: the others only wait for it.

    A stopped process, else the one that came least far (all ranks give the same signs in the same order), then the one
    that was silent for longest.
    """

    def order(item: tuple[str, Facts]) -> tuple[bool, int, float, int]:
        rank, facts = item
        return (facts["state"] != "T", facts["signs"], -facts["silent_s"], int(rank))

    return int(min(ranks.items(), key=order)[0])


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
