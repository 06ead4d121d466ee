"""The plots of an HTML report, each an SVG. In: facts of runs. Out: SVG documents whose colours are CSS variables.

matplotlib draws, in colours that stand for roles; in the finished SVG each becomes a variable of the page, so that one
picture serves light and dark. Curves of many points are averaged down to `MOST_POINTS`. One panel a picture: a phone
shows them below each other.
"""

import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from ii_dist.config.errors import ClusterError
from ii_dist.metrics import Row
from tools._plot_style import STYLE, label
from tools._report_page import Picture
from tools._report_words import PHASE_NAMES
from tools._run_facts import RunFacts

MOST_POINTS = 400
MOST_MARKERS = 40
MOST_GAP = 8  # times the usual distance of two points
# matplotlib is given these, the page its own: role -> stand-in.
ROLES = {
    "--ink": "#222221",
    "--faint": "#9a9a99",
    "--grid": "#e6e6e5",
    "--c0": "#1f5fa1",
    "--c1": "#d1621b",
    "--c2": "#2f8f51",
    "--c3": "#8a4fa1",
    "--c4": "#b89121",
    "--c5": "#3a9aa1",
    "--c6": "#c0508a",
    "--c7": "#7a7a71",
}
SERIES = [colour for role, colour in ROLES.items() if role.startswith("--c")]
_SIZE_IN = (5.4, 3.1)


def plots(runs: Sequence[RunFacts]) -> dict[str, Picture]:
    """Every plot that the runs have numbers for, by name."""
    one = runs[0] if len(runs) == 1 else None
    found: dict[str, Picture | None] = {
        "loss": _draw(lambda axis: _learning(axis, runs, "loss"), "Loss (nats) by epoch"),
        "top1": _draw(lambda axis: _learning(axis, runs, "top1"), "Top-1 accuracy (%) by epoch"),
        "rate": _draw(
            lambda axis: _over_time(axis, runs, "throughput/images_per_s", 1), "Images per second, all ranks"
        ),
        "wait": _draw(
            lambda axis: _over_time(axis, runs, "time/data_wait_share", 100), "Waiting for data (% of training time)"
        ),
        "learning_rate": _draw(lambda axis: _rates(axis, runs), "Learning rate by epoch"),
        "phases": phases_plot(one) if one else None,
        "phases_of_runs": None if one else _draw(lambda axis: _phases_of_runs(axis, runs), "Where a step's time goes"),
        "scaling": None if one else _draw(lambda axis: _scaling(axis, runs), "Images per second by ranks"),
    }
    return {name: picture for name, picture in found.items() if picture is not None}


def phases_plot(facts: RunFacts) -> Picture | None:
    """Where the time of a step goes, over the running time of one run."""
    return _draw(lambda axis: _phases_over_time(axis, facts), "Where a step's time goes (ms)", facts.name)


def _draw(draw: Callable[[Any], bool], says: str, of: str = "") -> Picture | None:
    """One panel; None where `draw` says that there is nothing to show. Raises ClusterError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ClusterError(
            "plots need matplotlib: python -m pip install 'matplotlib>=3.10', or ask for --no-plots"
        ) from None
    roles = {"axes.edgecolor": ROLES["--faint"], "grid.color": ROLES["--grid"], "svg.hashsalt": "report"}
    for key in ("axes.labelcolor", "xtick.color", "ytick.color", "text.color", "axes.titlecolor", "legend.labelcolor"):
        roles[key] = ROLES["--ink"]
    with mpl.rc_context({**STYLE, **roles, "figure.constrained_layout.w_pad": 0.05}):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        axis = figure.subplots()
        axis.set_title(says)
        if not draw(axis):
            return None
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Picture(_themed(out.getvalue(), f"{says} {of}"), says)


def _themed(svg: str, says: str) -> str:
    """The bare <svg> element in the page's colours, with ids that no other picture has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for role, colour in ROLES.items():
        svg = svg.replace(colour, f"var({role})")
    own = re.sub(r"[^a-z0-9]+", "-", says.lower())
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{own}-", svg)
    return re.sub(r'width="[^"]*pt"|height="[^"]*pt"', "", svg, count=2)


def _learning(axis: Any, runs: Sequence[RunFacts], name: str) -> bool:
    """Training as a thin line, evaluation with a marker each; the published value as a dashed line."""
    shown = False
    for k, facts in enumerate(runs):
        for split, alpha, width in (("train", 0.5, 1.1), ("eval", 1.0, 1.8)):
            rows, values = facts.metrics.series(f"{split}/{name}")
            if not values:
                continue
            several = len(runs) > 1
            colour = SERIES[k % len(SERIES)] if several or split == "train" else SERIES[1]
            shown_name: str | None = (
                label(facts.name) if several else {"train": "training", "eval": "evaluation"}[split]
            )
            if several and split == "train" and facts.metrics.series(f"eval/{name}")[1]:
                shown_name = None
            marker = "o" if split == "eval" and len(values) <= MOST_MARKERS else ""
            times, means = _fewer([_epoch(facts, row) for row in rows], values)
            axis.plot(
                times,
                means,
                color=colour,
                alpha=alpha if several else 1.0,
                linewidth=width,
                marker=marker,
                markersize=3,
                label=shown_name,
            )
            shown = True
    if name == "top1":
        expected = {facts.expected_top1 for facts in runs if facts.expected_top1}
        for value in expected:
            axis.axhline(
                value, color=ROLES["--faint"], linestyle=(0, (5, 3)), linewidth=1.2, label=f"recipe: {value:g} %"
            )
    _finish(axis, "epoch", shown)
    return shown


def _rates(axis: Any, runs: Sequence[RunFacts]) -> bool:
    shown = False
    for k, facts in enumerate(runs):
        rows, values = facts.metrics.series("train/learning_rate")
        if values:
            axis.plot(
                *_fewer([_epoch(facts, row) for row in rows], values),
                color=SERIES[k % len(SERIES)],
                label=label(facts.name),
            )
            shown = True
    _finish(axis, "epoch", shown, legend=len(runs) > 1)
    return shown


def _over_time(axis: Any, runs: Sequence[RunFacts], tag: str, scale: float) -> bool:
    unit, seconds = time_unit(max((facts.running_s for facts in runs), default=0.0))
    shown = False
    for k, facts in enumerate(runs):
        rows, values = facts.metrics.series(tag)
        if not values:
            continue
        shown, colour = True, SERIES[k % len(SERIES)]
        elapsed = dict(zip((row.step for row in facts.metrics.rows), facts.elapsed_s, strict=True))
        times, means = _fewer([elapsed[row.step] / seconds for row in rows], [scale * value for value in values])
        times, means = _with_gaps(times, means)
        axis.plot(times, means, color=colour, label=label(facts.name) if len(runs) > 1 else None)
        if len(runs) == 1:
            axis.fill_between(times, means, color=colour, alpha=0.1, linewidth=0)
        unmarked = not any(each.restart_steps() for each in runs[:k])
        _mark_restarts(axis, facts, seconds, SERIES[1] if len(runs) == 1 else colour, unmarked)
    axis.set_ylim(bottom=0)
    _finish(axis, f"running time ({unit})", shown, legend=len(runs) > 1 or bool(runs[0].restart_steps()))
    return shown


def _mark_restarts(axis: Any, facts: RunFacts, seconds: float, colour: str, named: bool) -> None:
    elapsed, rows = facts.elapsed_s, facts.metrics.rows
    for k, step in enumerate(facts.restart_steps()):
        before = [time for row, time in zip(rows, elapsed, strict=True) if row.step <= step]
        place = (before[-1] if before else 0.0) / seconds
        axis.axvline(
            place, color=colour, linewidth=1.1, linestyle=(0, (4, 3)), label="restart" if named and k == 0 else None
        )


def _phases_over_time(axis: Any, facts: RunFacts) -> bool:
    """Stacked, ms of a step."""
    names = list(facts.phase_s)
    rows = [row for row in facts.metrics.rows if any(f"time/{name}_s" in row.values for name in names)]
    if not rows:
        return False
    unit, seconds = time_unit(facts.running_s)
    elapsed = dict(zip((row.step for row in facts.metrics.rows), facts.elapsed_s, strict=True))
    times = [elapsed[row.step] / seconds for row in rows]
    stacks = []
    for name in names:
        values = [row.values.get(f"time/{name}_s", 0.0) for row in rows]
        if name == "backward":
            values = [
                max(0.0, v - row.values.get("time/allreduce_s", 0.0)) for v, row in zip(values, rows, strict=True)
            ]
        stacks.append(_fewer(times, [1000 * value for value in values])[1])
    axis.stackplot(
        _fewer(times, times)[0],
        stacks,
        labels=[PHASE_NAMES[n] for n in names],
        colors=phase_colours(names),
        linewidth=0,
    )
    axis.set_ylim(bottom=0)
    _finish(axis, f"running time ({unit})", True, legend=False)
    axis.legend(
        *(reversed(part) for part in axis.get_legend_handles_labels()), loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return True


def _phases_of_runs(axis: Any, runs: Sequence[RunFacts]) -> bool:
    """A bar a run, % of a step."""
    timed = [facts for facts in runs if facts.phase_s]
    if not timed:
        return False
    names = [name for name in PHASE_NAMES if any(name in facts.phase_s for facts in timed)]
    left = [0.0] * len(timed)
    for name, colour in zip(names, phase_colours(names), strict=True):
        shares = [100 * facts.phase_s.get(name, 0.0) / sum(facts.phase_s.values()) for facts in timed]
        axis.barh(
            [label(facts.name) for facts in timed], shares, left=left, color=colour, label=PHASE_NAMES[name], height=0.6
        )
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set(xlim=(0, 100), xlabel="% of a step")
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=3)
    return True


def _scaling(axis: Any, runs: Sequence[RunFacts]) -> bool:
    """Images/s against ranks, and the line of the smallest run's rate a rank."""
    points = sorted((facts.ranks, facts.images_per_s) for facts in runs if facts.ranks and facts.images_per_s > 0)
    if len({ranks for ranks, _ in points}) < 2:
        return False
    (fewest, base), (most, _) = points[0], points[-1]
    axis.plot(
        [fewest, most], [base, base * most / fewest], color=ROLES["--faint"], linestyle=(0, (5, 3)), label="linear"
    )
    axis.plot([r for r, _ in points], [rate for _, rate in points], marker="o", color=SERIES[0], label="measured")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ranks = sorted({ranks for ranks, _ in points})
    axis.set_xticks(ranks, [str(each) for each in ranks], minor=False)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("ranks")
    axis.legend(loc="upper left")
    return True


def phase_colours(names: Sequence[str]) -> list[str]:
    """Always the same colour for a phase."""
    order = list(PHASE_NAMES)
    wanted = {"data_wait": 1, "forward": 0, "backward": 5, "allreduce": 6, "optimizer": 3, "copy": 4, "metrics": 2}
    return [SERIES[wanted.get(name, 7)] for name in names if name in order]


def time_unit(longest_s: float) -> tuple[str, float]:
    if longest_s < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest_s < 3 * 3600 else ("hours", 3600.0)


def _epoch(facts: RunFacts, row: Row) -> float:
    """Passes over the images so far; the step itself where nobody knows how many make an epoch."""
    per_epoch = facts.plan.get("steps_per_epoch")
    return row.step / per_epoch if per_epoch else row.values.get("train/epoch", float(row.step))


def _fewer(times: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of neighbours, so that at most `MOST_POINTS` are left."""
    size = math.ceil(len(values) / MOST_POINTS) or 1
    blocks = range(0, len(values), size)
    return (
        [sum(part) / len(part) for k in blocks if (part := times[k : k + size])],
        [sum(part) / len(part) for k in blocks if (part := values[k : k + size])],
    )


def _with_gaps(times: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """NaN where much time passed between two points: nothing was trained there, and no line shall say otherwise."""
    gaps = [b - a for a, b in pairwise(times)]
    usual = statistics.median(gaps) if gaps else 0.0
    shown_times, shown = times[:1], values[:1]
    for gap, time_, value in zip(gaps, times[1:], values[1:], strict=True):
        if gap > MOST_GAP * usual:
            shown_times.append(time_ - gap / 2)
            shown.append(math.nan)
        shown_times.append(time_)
        shown.append(value)
    return shown_times, shown


def _finish(axis: Any, below: str, shown: bool, legend: bool = True) -> None:
    axis.set_xlabel(below)
    axis.set_xlim(left=0)
    if shown and legend:
        axis.legend(loc="best")
    for side in (axis.xaxis, axis.yaxis):
        _, high = side.get_view_interval()
        if high >= 1000:
            side.set_major_formatter("{x:,.0f}")
