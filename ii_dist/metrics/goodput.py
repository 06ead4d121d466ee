"""Where the allocated time went: the share of rank-seconds that trained, and what took the rest.

In: `Piece`s, the stretches of time in which ranks were allocated, one for each start of the ranks; the run's rows and
starts. Out: a `Goodput` whose parts add up to the allocated time, and the save interval of Young's formula. Pure.

A line tells its steps and their mean time, so training, evaluation and saves are sums over lines. What lies before the
first step of a piece is start-up; what lies after the last line that still counts is the end of a piece that stopped
in good order, and lost work of one that failed: an attempt that goes on cuts away what will be trained again.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ii_dist.metrics.columns import Start
from ii_dist.metrics.read import Row

PARTS = {
    "training": "steps that count, at their steady pace; waiting for data is inside",
    "warm-up": "the excess of the first steps of a start over those that follow",
    "evaluation": "on the evaluation images",
    "saves": "training stood still for a save",
    "start-up": "from the start of the job to its first step",
    "restarts": "the same, of every later start of the ranks",
    "lost steps": "trained after the last save before a failure, and trained again",
    "hang": "a rank was silent until it was ended",
    "shut-down": "from the last line to the end of the processes: the last save, and leaving",
    "other": "between lines and not in one of the above",
}
_WARM_MARGIN, _WARM_LINES = 1.1, 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Allocated time around one start of the ranks. Times are Unix seconds."""

    start_s: float
    end_s: float
    ranks: int
    restart: bool = False
    """Not the first of the run."""
    failed: bool = False
    """It ended otherwise than done, or stopped and saved."""
    committed_step: int | None = None
    """Newest committed step when it ended, where known."""
    silent_s: float = 0.0
    """How long a rank had to be silent before it was ended, if it was."""


@dataclass(slots=True)
class Goodput:
    """Rank-seconds by part, in the order of `PARTS`, and what goes with them."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    allocated: float = 0.0
    """Rank-seconds of all pieces: the sum of `parts`."""
    wall_s: float = 0.0
    failures: int = 0
    saves: int = 0
    stall_s: float = 0.0
    lost_steps: float = 0.0
    """Estimated from the time lost and the time of a step."""

    @property
    def share(self) -> float:
        return self.parts["training"] / self.allocated if self.allocated else math.nan

    def share_of(self, part: str) -> float:
        return self.parts[part] / self.allocated if self.allocated else math.nan


def account(pieces: Sequence[Piece], rows: Sequence[Row], starts: Sequence[Start]) -> Goodput:
    """Add up all pieces. Rows and starts are the run's, pieces in order of time and without overlap."""
    total = Goodput()
    for piece in pieces:
        mine = [row for row in rows if piece.start_s < row.time_s <= piece.end_s]
        begun = [start for start in starts if piece.start_s <= start.time_s <= piece.end_s]
        seconds = _parts_of(piece, mine, begun[-1] if begun else None)
        for part, spent_s in seconds.items():
            total.parts[part] += spent_s * piece.ranks
        wall_s = piece.end_s - piece.start_s
        total.wall_s += wall_s
        total.allocated += wall_s * piece.ranks
        total.failures += piece.failed
        total.saves += sum("checkpoint/bytes" in row.values for row in mine)
        total.stall_s += seconds["saves"]
        step_s = _typical_step_s(mine or rows)
        total.lost_steps += seconds["lost steps"] / step_s if step_s else 0.0
    return total


def young_interval_s(save_s: float, between_failures_s: float) -> float:
    """Seconds of work between saves that lose the least: sqrt(2 x cost of a save x mean time between failures).

    J. W. Young, A first order approximation to the optimum checkpoint interval, 1974.
    """
    return math.sqrt(2 * save_s * between_failures_s)


def pieces_of_starts(starts: Sequence[Start], rows: Sequence[Row]) -> list[Piece]:
    """Pieces of a run without job records: from each start to the last line before the next one. What came before a
    start is known only where the attempt has written its start-up time."""
    pieces = []
    for k, start in enumerate(starts):
        end_s = starts[k + 1].time_s if k + 1 < len(starts) else math.inf
        mine = [row for row in rows if start.time_s <= row.time_s < end_s]
        last_s = max((_after(row) for row in mine), default=start.time_s)
        startup_s = mine[0].values.get("time/startup_s", 0.0) if mine else 0.0
        began_s = min(start.time_s, _first_step_s(mine, start) - startup_s) if startup_s else start.time_s
        pieces.append(Piece(began_s, min(last_s, end_s), start.world_size, restart=k > 0))
    return [piece for piece in pieces if piece.end_s > piece.start_s]


def _parts_of(piece: Piece, rows: Sequence[Row], start: Start | None) -> dict[str, float]:
    """Wall seconds of one piece by part; they add up to its length."""
    parts = dict.fromkeys(PARTS, 0.0)
    beginning = "restarts" if piece.restart else "start-up"
    wall_s = piece.end_s - piece.start_s
    if not rows:
        began_s = start.time_s - piece.start_s if start and piece.failed else wall_s
        parts[beginning], lost_s = began_s, wall_s - began_s
        _lose(parts, lost_s, piece)
        return parts
    covered = _covered(rows, start)
    # Not cut away yet, for nobody has gone on: trained, but not saved before the failure.
    unsaved = math.inf if not piece.failed or piece.committed_step is None else piece.committed_step
    kept = [(row, steps) for row, steps in covered if row.step <= unsaved]
    first_s = max(piece.start_s, min(_first_step_s(rows, start), rows[0].time_s))
    last_s = min(piece.end_s, max(map(_after, rows)))
    parts[beginning] = first_s - piece.start_s
    parts["evaluation"] = sum(_finite(row, "eval/seconds") for row in rows)
    parts["saves"] = sum(_finite(row, "time/checkpoint_stall_s") for row in rows)
    parts["warm-up"] = _warm_up_s(kept)
    parts["training"] = _trained_s(kept) - parts["warm-up"]
    parts["lost steps"] = _trained_s(covered) - _trained_s(kept)
    if piece.failed:
        _lose(parts, piece.end_s - last_s, piece)
    else:
        parts["shut-down"] = piece.end_s - last_s
    parts["other"] = wall_s - sum(parts.values())
    _balance(parts)
    return parts


def _lose(parts: dict[str, float], seconds: float, piece: Piece) -> None:
    """The end of a failed piece: silence first, for it is known."""
    hung_s = min(seconds, piece.silent_s)
    parts["hang"] += hung_s
    parts["lost steps"] += seconds - hung_s


def _balance(parts: dict[str, float]) -> None:
    """Means of clocks that differ may say a little too much: take it from the largest parts, so that the sum holds."""
    excess = -min(0.0, parts["other"])
    parts["other"] = max(0.0, parts["other"])
    for part in sorted(parts, key=lambda name: -parts[name]):
        taken = min(excess, parts[part])
        parts[part] -= taken
        excess -= taken


def _covered(rows: Sequence[Row], start: Start | None) -> list[tuple[Row, int]]:
    """Rows with a step time, and how many steps each tells of."""
    timed = [row for row in rows if _finite(row, "time/step_s") > 0]
    gaps = [b.step - a.step for a, b in pairwise(timed)]
    usual = int(statistics.median(gaps)) if gaps else timed[0].step if timed else 1
    before = start.step if start and timed and start.step < timed[0].step else (timed[0].step - usual if timed else 0)
    steps = [row.step for row in timed]
    return [(row, step - prior) for row, step, prior in zip(timed, steps, [before, *steps], strict=False)]


def _trained_s(covered: Sequence[tuple[Row, int]]) -> float:
    return sum(steps * row.values["time/step_s"] for row, steps in covered)


def _first_step_s(rows: Sequence[Row], start: Start | None) -> float:
    """Unix time at which the first step began."""
    if not rows:
        return math.nan
    covered = _covered(rows, start)
    if not covered or covered[0][0].step != rows[0].step:
        return rows[0].time_s - _finite(rows[0], "eval/seconds")
    row, steps = covered[0]
    return row.time_s - steps * row.values["time/step_s"] - _finite(row, "time/checkpoint_stall_s")


def _after(row: Row) -> float:
    """Unix time when the row's work had ended. A step's training line comes before its evaluation."""
    return row.time_s + (_finite(row, "eval/seconds") if "time/step_s" in row.values else 0.0)


def _warm_up_s(covered: Sequence[tuple[Row, int]]) -> float:
    """What the first lines take above the median of those that follow, up to the first that is at their pace."""
    excess = 0.0
    for k, (row, steps) in enumerate(covered):
        later = [r.values["time/step_s"] for r, _ in covered[k + 1 : k + 1 + _WARM_LINES]]
        if len(later) < 2 or row.values["time/step_s"] <= _WARM_MARGIN * (pace := statistics.median(later)):
            break
        excess += steps * (row.values["time/step_s"] - pace)
    return excess


def _typical_step_s(rows: Sequence[Row]) -> float:
    return statistics.median([s for row in rows if (s := _finite(row, "time/step_s")) > 0] or [0.0])


def _finite(row: Row, tag: str) -> float:
    value = row.values.get(tag, 0.0)
    return value if math.isfinite(value) else 0.0
