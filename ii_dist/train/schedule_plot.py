"""A recipe's schedule as a picture, before anything is trained and without its data. In: a config. Out: one file.

matplotlib draws; it is imported here only.
"""

from pathlib import Path
from typing import Any

from ii_dist.config.errors import ClusterError, ConfigError
from ii_dist.config.plan import DataFacts, Plan, make_plan
from ii_dist.config.schema import RunConfig
from ii_dist.optim.schedules import learning_rate

_POINTS = 2000
_STEPS_PER_EPOCH = 1000  # of a set of any size: epochs and images decide a schedule, steps only cut it finer or coarser


def plot_schedule(cfg: RunConfig, path: Path) -> None:
    """Draw the learning rate, and sizes of images that change, over the epochs into `path` (.png, .svg or .pdf).

    Raises ConfigError, ClusterError.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ClusterError("--plot needs matplotlib: python -m pip install 'matplotlib>=3.10'") from None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: needs a name that ends in .png, .svg or .pdf")
    plan = make_plan(cfg, 1, DataFacts(_STEPS_PER_EPOCH * cfg.train.global_batch, 1, 2))
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.5, 3.6), dpi=150, layout="constrained")
        axes = figure.subplots()
        _draw_rate(axes, cfg, plan)
        if len(plan.image_sizes) > 1:
            _draw_sizes(axes.twinx(), plan, cfg.train.epochs)
        try:
            figure.savefig(path)
        except OSError as error:
            raise ConfigError(f"--plot {path}: cannot be written ({error.strerror})") from None


def rates_over_epochs(cfg: RunConfig, plan: Plan) -> tuple[list[float], list[float]]:
    """Epochs and rates at points spread evenly over the run, its first and last update among them."""
    last = plan.total_steps - 1
    steps = sorted({round(last * point / _POINTS) for point in range(_POINTS + 1)})
    return [step / plan.steps_per_epoch for step in steps], [learning_rate(step, cfg.optim, plan) for step in steps]


def _draw_sizes(axes: Any, plan: Plan, epochs: float) -> None:
    starts, sides = zip(*plan.image_sizes, strict=True)
    axes.step([*starts, epochs], [*sides, sides[-1]], where="post", color="#d1622b", linewidth=1.4)
    axes.set_ylim(0, 1.15 * max(sides))
    axes.set_ylabel("side of training images, pixels", color="#d1622b")
    axes.spines["right"].set_visible(True)


def _draw_rate(axes: Any, cfg: RunConfig, plan: Plan) -> None:
    optim = cfg.optim
    axes.plot(*rates_over_epochs(cfg, plan), color="#1f5fa8", linewidth=1.8)
    if optim.warmup_epochs:
        axes.axvspan(0, min(optim.warmup_epochs, cfg.train.epochs), color="#1f5fa8", alpha=0.08, linewidth=0)
        axes.text(0, 1.0, " warm-up", transform=axes.get_xaxis_transform(), va="top", color="#5a6f8a", fontsize=8)
    axes.set_xlim(0, cfg.train.epochs)
    axes.set_ylim(0, None)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_title(
        f"{cfg.name}: {optim.optimizer}, {optim.schedule}, peak {plan.peak_lr:.4g}, {plan.global_batch} images a step",
        loc="left",
        fontsize=10,
        fontweight="bold",
    )
