"""The picture of `tools.show_inner_images`. In: what some gates saw. Out: one PNG as bytes.

Rows are images. Of each block: the pseudo-image, the lens's view of it (each value at the middle of its window) and the
factors. Colours of a column mean the same in all rows. matplotlib draws; it is imported here only.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import ClusterError

if TYPE_CHECKING:
    from ii_dist.models.watching import GateView

F32 = NDArray[np.float32]

# Inches.
SIDE, GATE_WIDTH = 0.9, 1.0
MARGIN, BLOCK_NAMES, HEAD, FOOT = 0.14, 0.4, 0.92, 0.46
ROW_GAP, PANEL_GAP, GATE_GAP, BLOCK_GAP = 0.28, 0.07, 0.36, 0.42
ROW_PITCH = 0.01  # least height of a pseudo-image's row: two pixels
MOST_ROWS = 260  # of a pseudo-image in panels that are not yet too tall
MOST_NAMED_ROWS = 10

INK, FAINT, DOTS = "#222222", "#9a9a9a", "#1f5fa8"
SIGNAL_COLOURS, VIEW_COLOURS = "viridis", "magma"
CLIPPED_PERCENT = 0.5  # at each end of a colour scale, so that one outlier does not flatten the rest
STYLE = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.titlepad": 4,
    "axes.linewidth": 0.6,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: a row for each of `names` and `pixels`, a group of panels for each of `views`."""

    title: str
    names: Sequence[str]
    pixels: Sequence[NDArray[np.uint8]]
    views: "Sequence[GateView]"


class Sheet:
    """A figure whose panels are placed in inches from its upper left corner, in rows of one height."""

    def __init__(self, figure: Any, row_height: float) -> None:
        self._figure, self.row_height = figure, row_height
        self._width, self._height = (float(side) for side in figure.get_size_inches())

    def panel(self, left: float, top: float, width: float, height: float) -> Any:
        bottom = self._height - top - height
        return self._figure.add_axes(
            (left / self._width, bottom / self._height, width / self._width, height / self._height)
        )

    def row_top(self, row: int) -> float:
        return HEAD + row * (self.row_height + ROW_GAP)

    def text(self, left: float, top: float, text: str, **options: Any) -> None:
        self._figure.text(left / self._width, 1 - top / self._height, text, va="top", **options)


def draw(scene: Scene) -> bytes:
    """The PNG. Raises ClusterError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ClusterError("pictures need matplotlib: python -m pip install 'matplotlib>=3.10'") from None
    rows = len(scene.names)
    width = 2 * MARGIN + SIDE + sum(BLOCK_GAP + _block_width(view) for view in scene.views)
    row_height = max(SIDE, *(ROW_PITCH * min(MOST_ROWS, _lines(view)) for view in scene.views))
    height = HEAD + rows * row_height + (rows - 1) * ROW_GAP + FOOT
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=200)
        sheet = Sheet(figure, row_height)
        sheet.text(MARGIN, 0.12, scene.title, color=INK, fontsize=9)
        _draw_inputs(sheet, scene)
        left = MARGIN + SIDE + BLOCK_GAP
        for view in scene.views:
            _draw_block(sheet, view, left)
            left += _block_width(view) + BLOCK_GAP
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _block_width(view: "GateView") -> float:
    images: float = 0.0 if view.image_NHW is None else 2 * SIDE + PANEL_GAP + GATE_GAP
    return images + GATE_WIDTH


def _lines(view: "GateView") -> int:
    return 0 if view.image_NHW is None else int(view.image_NHW.shape[1])


def _draw_inputs(sheet: Sheet, scene: Scene) -> None:
    sheet.text(MARGIN, BLOCK_NAMES, "input", fontsize=9, fontweight="bold", color=INK)
    for row, (name, pixels_HWC) in enumerate(zip(scene.names, scene.pixels, strict=True)):
        axis = sheet.panel(MARGIN, sheet.row_top(row), SIDE, SIDE)
        axis.imshow(pixels_HWC, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(name if len(name) <= 18 else f"…{name[-17:]}", fontsize=6.5, labelpad=3)
        if row == 0:
            axis.set_title(f"image\n{pixels_HWC.shape[0]} × {pixels_HWC.shape[1]}", loc="left")


def _draw_block(sheet: Sheet, view: "GateView", left: float) -> None:
    assert view.scale_NC is not None
    sheet.text(left, BLOCK_NAMES, view.block, fontsize=9, fontweight="bold", color=INK)
    if view.image_NHW is not None and view.view_Nhw is not None:
        first = _draw_images(sheet, view.image_NHW, view.image_NHW, left, "pseudo-image", SIGNAL_COLOURS)
        _name_lines(first, *view.image_NHW.shape[1:])
        left += SIDE + PANEL_GAP
        _draw_images(sheet, view.view_Nhw, view.image_NHW, left, "after the lens", VIEW_COLOURS)
        left += SIDE + GATE_GAP
    _draw_factors(sheet, view.scale_NC, left)


def _draw_images(sheet: Sheet, shown_NHW: F32, whole_NHW: F32, left: float, what: str, colours: str) -> Any:
    """A column of panels, `shown` in the middle of the area of `whole`, and the colour scale below; the first panel."""
    (count, height, width), (_, rows, columns) = whole_NHW.shape, shown_NHW.shape
    top, side = (height - rows) / 2, (width - columns) / 2
    low, high = np.percentile(shown_NHW, [CLIPPED_PERCENT, 100 - CLIPPED_PERCENT])
    axes = [sheet.panel(left, sheet.row_top(row), SIDE, sheet.row_height) for row in range(count)]
    for axis, shown_HW in zip(axes, shown_NHW, strict=True):
        drawn = axis.imshow(
            shown_HW,
            cmap=colours,
            vmin=low,
            vmax=high,
            extent=(side, width - side, height - top, top),
            aspect="auto",
            interpolation="nearest" if height <= MOST_ROWS else "auto",
        )
        axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes[0].set_title(f"{what}\n{rows} × {columns}", loc="left")
    below = 0.2 if width == 2 and count == 1 else 0.09  # the names of two columns stand under the first row
    scale = sheet.panel(left, sheet.row_top(count - 1) + sheet.row_height + below, SIDE, 0.06)
    bar = drawn.figure.colorbar(drawn, cax=scale, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.locator = _few_ticks(3)
    bar.formatter = "{x:g}"
    bar.update_ticks()
    return axes[0]


def _name_lines(axis: Any, height: int, width: int) -> None:
    """Say once which lines of the pseudo-image come from which branch: two columns, or rows in turn."""
    if width == 2:
        axis.set_xticks([0.5, 1.5], ["residual", "identity"], fontsize=6)
    elif height <= MOST_NAMED_ROWS:
        axis.set_yticks([0.5, 1.5], ["residual", "identity"], fontsize=6)
    axis.tick_params(length=0, pad=1.5)


def _draw_factors(sheet: Sheet, scale_NC: F32, left: float) -> None:
    """Factors of each image as dots, channels in the order of their mean over the images (the line)."""
    count, channels = scale_NC.shape
    mean_C = scale_NC.mean(0)
    order = np.argsort(mean_C)
    low, high = float(scale_NC.min()), float(scale_NC.max())
    room = 0.06 * max(high - low, 0.02)
    axes = [sheet.panel(left, sheet.row_top(row), GATE_WIDTH, sheet.row_height) for row in range(count)]
    for axis, scale_C in zip(axes, scale_NC, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.axhline(0.5, color=FAINT, linewidth=0.6, linestyle=(0, (2, 2)))
        if count > 1:
            axis.plot(mean_C[order], color=FAINT, linewidth=1.0)
        size = float(np.clip(250 / channels, 0.8, 7.0))
        axis.scatter(range(channels), scale_C[order], s=size, color=DOTS, linewidths=0, zorder=3)
        axis.set(xlim=(-0.02 * channels, 1.02 * channels - 1), ylim=(low - room, high + room), xticks=[])
        axis.yaxis.set_major_locator(_few_ticks(4))
    axes[0].set_title(f"gate\n{channels} channels", loc="left")
    axes[-1].set_xlabel("channels, sorted by\nmean factor (line)" if count > 1 else "channels, sorted", fontsize=6.5)


def _few_ticks(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10])
