"""What the ranks' phases say of each other: fastest, middle, slowest, and who holds the others up.

In: each rank's seconds by phase, as whole numbers that travel in a sum which the ranks make anyway: every rank fills
places of its own, so the sum is all of them side by side. Out, on rank 0: tags, and a line in the log that names a
straggler.

Ranks step together: while one is slow, the others wait for its gradients, so all steps last equally long. The slow one
is who has the longest part of its own, without the wait for others.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.engine import EngineConfig

logger = logging.getLogger(__name__)

PLACES = ("data_wait", "copy", "forward", "backward", "allreduce", "optimizer", "metrics", "other", "step")
SHOWN = ("step", "data_wait", "forward", "backward", "optimizer")
EXCESS_SHARE = 0.15
"""Of a step: a rank that is held to be slow has at least so much more of its own than the others in the middle."""
LINES_IN_A_ROW = 3
QUIET_S = 600.0
"""A straggler that stays is named again after so long."""
_STEP, _FORWARD = PLACES.index("step"), PLACES.index("forward")
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
        table_RP = np.array(sums, dtype=np.float64).reshape(-1, len(PLACES)) / _NS
        if not table_RP[:, [_STEP, _FORWARD]].all():  # a rank without a measured step
            return {}
        shown_RP = table_RP[:, [PLACES.index(phase) for phase in SHOWN]]
        shown_RP.sort(axis=0)
        kinds = {"min": shown_RP[0], "median": _middle(shown_RP), "max": shown_RP[-1]}
        tags = {
            f"ranks/{phase}_{kind}_s": seconds
            for kind, values_P in kinds.items()
            for phase, seconds in zip(SHOWN, values_P.tolist(), strict=True)
        }
        own_RP = table_RP[:, [PLACES.index(phase) for phase in self._own]]
        if "backward" in self._own:  # what is left of it when the wait for others is taken out
            own_RP[:, self._own.index("backward")] -= table_RP[:, PLACES.index("allreduce")]
        slowest, excess_s = self._slowest(own_RP)
        share = excess_s / tags["ranks/step_median_s"]
        self._name(own_RP, slowest, excess_s, share)
        return tags | {"ranks/slowest_rank": float(slowest), "ranks/slowest_excess_share": share}

    def _slowest(self, own_RP: NDArray[np.float64]) -> tuple[int, float]:
        """The rank with the longest part of its own, and by how much that exceeds the others' in the middle."""
        own_R = own_RP.sum(1)
        ranks_R = own_R.argsort()
        slowest = int(ranks_R[-1])
        return slowest, float(own_R[slowest] - _middle(own_R[ranks_R[:-1]]))

    def _name(self, own_RP: NDArray[np.float64], slowest: int, excess_s: float, share: float) -> None:
        """Say it where the rank was the slow one for some lines, and has not been named lately."""
        if share < EXCESS_SHARE or excess_s < _LEAST_EXCESS_S:
            self._suspect, self._lines = -1, 0
            return
        self._lines = self._lines + 1 if slowest == self._suspect else 1
        self._suspect = slowest
        now = self._now()
        if self._lines < LINES_IN_A_ROW or now - self._named_s.get(slowest, -math.inf) < QUIET_S:
            return
        self._named_s[slowest] = now
        others_P = np.median(np.delete(own_RP, slowest, axis=0), 0)
        worst = int((own_RP[slowest] - others_P).argmax())
        logger.warning(
            "rank %d on %s is slow: the others wait for it %.0f %% of a step; its %s takes %.1f ms, theirs %.1f ms",
            *(slowest, self._hosts[slowest], 100 * share, self._own[worst].replace("_", " ")),
            *(1000 * own_RP[slowest, worst], 1000 * others_P[worst]),
        )


def _middle(ascending_R: NDArray[np.float64]) -> Any:
    """The median of what is sorted along the first axis: numpy's own takes ten times as long on few numbers."""
    half = len(ascending_R) // 2
    return ascending_R[half] if len(ascending_R) % 2 else (ascending_R[half - 1] + ascending_R[half]) / 2
