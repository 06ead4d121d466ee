"""A picture of a data set: sizes, shapes and bytes of its images. matplotlib draws; it is imported here only.

In: the widths, heights and lengths of a scan. Out: one PNG.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import ClusterError
from tools._plot_style import BLUE, INK, ORANGE, STYLE

_BINS = 60
_TICKS = 4
_LEAST_SPREAD = 1.25  # of a logarithmic axis on which all images stand at one place


def draw_sizes(name: str, width: Sequence[int], height: Sequence[int], length: Sequence[int], path: Path) -> None:
    """Four histograms of all images. Raises ClusterError without matplotlib, OSError where `path` cannot be written."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ClusterError(
            "the picture needs matplotlib: python -m pip install 'matplotlib>=3.10', or ask for --no-picture"
        ) from None
    w_N, h_N, bytes_N = (np.asarray(column, dtype=np.float64) for column in (width, height, length))
    shorter_N = np.minimum(w_N, h_N)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
        figure.suptitle(f"{name}: {len(w_N):,} images", x=0.01, ha="left", fontweight="bold", color=INK)
        (size, shape), (volume, density) = figure.subplots(2, 2)
        _histogram(size, shorter_N, "shorter side, pixels")
        _histogram(shape, w_N / h_N, "width / height")
        _histogram(volume, bytes_N / 1000, "file, kB")
        _histogram(density, 8 * bytes_N / (w_N * h_N), "bits a pixel")
        figure.savefig(path, format="png")


def _histogram(axes: Any, values_N: NDArray[np.float64], label: str) -> None:
    """On a logarithmic axis; the median is marked."""
    low, high, median = float(values_N.min()), float(values_N.max()), float(np.median(values_N))
    if high < low * _LEAST_SPREAD:
        middle = (low * high) ** 0.5
        low, high = middle / _LEAST_SPREAD, middle * _LEAST_SPREAD
    axes.hist(values_N, bins=np.geomspace(low, high * 1.0001, _BINS + 1), color=BLUE, edgecolor="white", linewidth=0.3)
    axes.axvline(median, color=ORANGE, linewidth=1.4)
    ticks = _ticks(low, high)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:,.4g}" for tick in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("images")
    axes.set_title(label)
    spread = f"{values_N.min():,.4g} to {values_N.max():,.4g}, median {median:,.4g}"
    axes.set_title(spread, loc="right", color=ORANGE, fontsize=10, fontweight="normal")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two, few enough to be read."""
    from matplotlib.ticker import MaxNLocator

    for steps in ((1,), (1, 3), (1, 2, 5)):
        decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= _TICKS:
            return ticks
    return [float(tick) for tick in MaxNLocator(2 * _TICKS).tick_values(low, high) if low <= tick <= high]
