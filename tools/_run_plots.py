"""A picture of runs: loss, accuracy, images a second, data wait. In: facts of runs. Out: one PNG.

The left half goes by steps, the right half by running time with the joints between attempts marked. matplotlib draws;
it is imported here only.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ii_dist.config.errors import ClusterError
from ii_dist.metrics.words import in_words_rate, in_words_share
from tools._plot_style import INK, STYLE, label
from tools._run_facts import RunFacts

COLOURS = ("#1f5fa8", "#d1622b", "#2f8f5b", "#8a4fa3", "#b8912a", "#4a4a4a")
TRAIN_ALPHA = 0.45


def plot_runs(runs: Sequence[RunFacts], path: Path) -> None:
    """Draw `runs` into one PNG. Raises ClusterError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ClusterError(
            "plots need matplotlib: python -m pip install 'matplotlib>=3.10', or ask for --no-plots"
        ) from None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), dpi=150, layout="constrained")
        axes = figure.subplots(2, 2)
        (loss, rate), (top1, wait) = axes
        several = len(runs) > 1
        unit, seconds = _time_unit(max((facts.running_s for facts in runs), default=0.0))
        for facts, colour in zip(runs, _colours(len(runs)), strict=True):
            _draw_learning(loss, facts, colour, "loss", several)
            _draw_learning(top1, facts, colour, "top1", several)
            _draw_over_time(rate, facts, colour, "throughput/images_per_s", 1.0, seconds, several)
            _draw_over_time(wait, facts, colour, "time/data_wait_share", 100.0, seconds, several)
            _mark_restarts(axes, facts, seconds, colour if several else INK)
        _name_axes(loss, rate, top1, wait, unit)
        if not several:
            _say_results(rate, top1, wait, runs[0])
        _legends(figure, axes, runs)
        figure.savefig(path)


def _colours(count: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _time_unit(longest_s: float) -> tuple[str, float]:
    if longest_s < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest_s < 3 * 3600 else ("hours", 3600.0)


def _draw_learning(axis: Any, facts: RunFacts, colour: str, name: str, several: bool) -> None:
    """Training as a thin line, evaluation with a marker each."""
    train_rows, train = facts.metrics.series(f"train/{name}")
    eval_rows, evaluated = facts.metrics.series(f"eval/{name}")
    second = colour if several else COLOURS[1]
    alpha = TRAIN_ALPHA if several else 1.0
    axis.plot([r.step for r in train_rows], train, color=colour, alpha=alpha, linewidth=1.2, label="training")
    marker = "o" if len(evaluated) <= 40 else ""
    axis.plot([r.step for r in eval_rows], evaluated, color=second, marker=marker, markersize=3.5, label="evaluation")


def _draw_over_time(
    axis: Any, facts: RunFacts, colour: str, tag: str, scale: float, seconds: float, several: bool
) -> None:
    elapsed = dict(zip((row.step for row in facts.metrics.rows), facts.elapsed_s, strict=True))
    rows, values = facts.metrics.series(tag)
    times = [elapsed[row.step] / seconds for row in rows]
    scaled = [scale * value for value in values]
    axis.plot(times, scaled, color=colour)
    if not several:
        axis.fill_between(times, scaled, color=colour, alpha=0.08, linewidth=0)


def _mark_restarts(axes: Any, facts: RunFacts, seconds: float, colour: str) -> None:
    elapsed, rows = facts.elapsed_s, facts.metrics.rows
    for k, step in enumerate(facts.restart_steps()):
        before = [time for row, time in zip(rows, elapsed, strict=True) if row.step <= step]
        places = {0: step, 1: (before[-1] if before else 0.0) / seconds}
        for column, place in places.items():
            for axis in axes[:, column]:
                named = "restart" if k == 0 else None
                axis.axvline(place, color=colour, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.6, label=named)


def _name_axes(loss: Any, rate: Any, top1: Any, wait: Any, unit: str) -> None:
    loss.set(title="Loss (nats)", xlabel="step")
    top1.set(title="Top-1 accuracy (%)", xlabel="step")
    rate.set(title="Images per second, all ranks", xlabel=f"running time ({unit})")
    wait.set(title="Waiting for data (% of training time)", xlabel=f"running time ({unit})")
    rate.set_ylim(bottom=0)
    wait.set_ylim(0, max(10.0, wait.get_ylim()[1]))
    for axis in (loss, rate, top1, wait):
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter("{x:,.0f}" if axis.get_xlim()[1] >= 8 else "{x:g}")
    rate.yaxis.set_major_formatter("{x:,.0f}")


def _say_results(rate: Any, top1: Any, wait: Any, facts: RunFacts) -> None:
    """The figure of each panel in its upper right corner."""
    last = facts.metrics.last("eval/top1")
    if last is not None:
        top1.set_title(f"{last:.2f} % on the evaluation set", loc="right", color=COLOURS[1], fontsize=10)
    if not math.isnan(facts.images_per_s):
        rate.set_title(f"steady {in_words_rate(facts.images_per_s)}", loc="right", color=COLOURS[0], fontsize=10)
    if not math.isnan(facts.data_wait_share):
        share = in_words_share(facts.data_wait_share)
        wait.set_title(f"steady {share}", loc="right", color=COLOURS[0], fontsize=10)


def _legends(figure: Any, axes: Any, runs: Sequence[RunFacts]) -> None:
    if len(runs) == 1:
        axes[0][0].legend(loc="upper right")
        return
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=c) for c in _colours(len(runs))]
    figure.legend(lines, [label(facts.name) for facts in runs], loc="outside lower center", ncols=min(4, len(runs)))
    kinds = [Line2D([], [], color=INK, alpha=TRAIN_ALPHA, linewidth=1.2), Line2D([], [], color=INK)]
    axes[0][0].legend(kinds, ["training", "evaluation"], loc="upper right")
