"""What the ranks' phases say of each other: fastest, middle, slowest, and who holds the others up.

In: each rank's seconds by phase, as whole numbers that travel in a sum which the ranks make anyway: every rank fills
places of its own, so the sum is all of them side by side. Out, on rank 0: tags, and a line in the log that names a
straggler.

Ranks step together: while one is slow, the others wait for its gradients, so all steps last equally long. The slow one
is who has the longest part of its own, without the wait for others.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from ii_dist.config.engine import EngineConfig

logger = logging.getLogger(__name__)

PLACES = ("data_wait", "copy", "forward", "backward", "allreduce", "optimizer", "metrics", "other", "step")
SHOWN = ("step", "data_wait", "forward", "backward", "optimizer")
EXCESS_SHARE = 0.15
"""Of a step: a rank that is held to be slow has at least so much more of its own than the others in the middle."""
LINES_IN_A_ROW = 3
QUIET_S = 600.0
"""A straggler that stays is named again after so long."""
_LEAST_EXCESS_S = 1e-3
_NS = 1_000_000_000


def own_phases(engine: EngineConfig) -> tuple[str, ...]:
    """Phases in which a rank of this engine waits for nobody ("backward" here: without the all-reduce)."""
    if engine.sync_batchnorm:
        return ("data_wait", "copy")
    if engine.zero_stage == 3:  # weights come from other ranks in every pass
        return ("data_wait", "copy")
    if engine.zero_stage:  # gradients travel within the backward pass, weights within the update
        return ("data_wait", "copy", "forward")
    return ("data_wait", "copy", "forward", "backward", "optimizer")


class RankTable:
    """One rank's part in the comparison. `hosts` by rank; `own`: phases in which a rank waits for nobody."""

    def __init__(
        self, rank: int, hosts: Sequence[str], own: Sequence[str], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._rank, self._hosts, self._own = rank, tuple(hosts), tuple(own)
        self._now = now
        self._suspect, self._lines = -1, 0
        self._named_s: dict[int, float] = {}

    def row(self, seconds: Mapping[str, float]) -> list[int]:
        """Whole numbers to add up over ranks; `seconds` by phase, and of the whole "step". Nothing measured = zeros."""
        if len(self._hosts) == 1:
            return []
        row = [0] * (len(self._hosts) * len(PLACES))
        first = self._rank * len(PLACES)
        row[first : first + len(PLACES)] = [round(seconds.get(place, 0.0) * _NS) for place in PLACES]
        return row

    def tags(self, sums: Sequence[int]) -> dict[str, float]:
        """On rank 0, from the sums of the rows of all ranks: tags by rank; names a straggler. Elsewhere nothing."""
        if self._rank != 0 or not sums:
            return {}
        table = self._by_rank(sums)
        if any(not row["step"] or not row["forward"] for row in table):  # a rank without a measured step
            return {}
        tags: dict[str, float] = {}
        for phase in SHOWN:
            values = [row[phase] for row in table]
            tags |= {
                f"ranks/{phase}_min_s": min(values),
                f"ranks/{phase}_median_s": median(values),
                f"ranks/{phase}_max_s": max(values),
            }
        slowest, excess_s = self._slowest(table)
        share = excess_s / median(row["step"] for row in table)
        self._name(table, slowest, excess_s, share)
        return tags | {"ranks/slowest_rank": float(slowest), "ranks/slowest_excess_share": share}

    def _by_rank(self, sums: Sequence[int]) -> list[dict[str, float]]:
        width = len(PLACES)
        rows = (sums[first : first + width] for first in range(0, len(sums), width))
        return [{place: ns / _NS for place, ns in zip(PLACES, row, strict=True)} for row in rows]

    def _own_s(self, row: Mapping[str, float], phase: str) -> float:
        return row[phase] - (row["allreduce"] if phase == "backward" else 0.0)

    def _slowest(self, table: Sequence[Mapping[str, float]]) -> tuple[int, float]:
        """The rank with the longest part of its own, and by how much that exceeds the others' in the middle."""
        own_s = [sum(self._own_s(row, phase) for phase in self._own) for row in table]
        slowest = own_s.index(max(own_s))
        others = [seconds for rank, seconds in enumerate(own_s) if rank != slowest]
        return slowest, own_s[slowest] - median(others)

    def _name(self, table: Sequence[Mapping[str, float]], slowest: int, excess_s: float, share: float) -> None:
        if share < EXCESS_SHARE or excess_s < _LEAST_EXCESS_S:
            self._suspect, self._lines = -1, 0
            return
        self._lines = self._lines + 1 if slowest == self._suspect else 1
        self._suspect = slowest
        now = self._now()
        if self._lines < LINES_IN_A_ROW or now - self._named_s.get(slowest, -QUIET_S) < QUIET_S:
            return
        self._named_s[slowest] = now
        more_s = {phase: self._more_s(table, slowest, phase) for phase in self._own}
        phase = max(more_s, key=lambda name: more_s[name])
        logger.warning(
            "rank %d on %s is slow: the others wait for it %.0f %% of a step; its %s takes %.1f ms, theirs %.1f ms",
            slowest,
            self._hosts[slowest],
            100 * share,
            phase.replace("_", " "),
            1000 * self._own_s(table[slowest], phase),
            1000 * (self._own_s(table[slowest], phase) - more_s[phase]),
        )

    def _more_s(self, table: Sequence[Mapping[str, float]], slowest: int, phase: str) -> float:
        others = [self._own_s(row, phase) for rank, row in enumerate(table) if rank != slowest]
        return self._own_s(table[slowest], phase) - median(others)
