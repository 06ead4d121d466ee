"""How the project's pictures look: colours, settings for matplotlib's `rc_context`, and labels."""

from typing import Any

INK, FAINT, BLUE, ORANGE = "#222222", "#9a9a9a", "#1f5fa8", "#d1622b"
LONGEST_LABEL = 40
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.wspace": 0.03,
    "figure.constrained_layout.hspace": 0.04,
}


def label(name: str) -> str:
    """A name as matplotlib shows it as it stands: no formula, not hidden, not endless."""
    short = name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"
    shown = short.replace("\\", "/").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
