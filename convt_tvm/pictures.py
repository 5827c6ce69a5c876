"""What all pictures share: a figure that needs no display, colours, and the look of axes. Needs matplotlib."""

from typing import Any

from convt_tvm.errors import ConvTError

__all__ = ["COLOURS", "new_figure", "require_matplotlib", "tidy"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
"""Okabe and Ito's palette, distinguishable with any colour vision."""


def require_matplotlib(error: type[ConvTError]) -> None:
    """Raise `error` saying what to install where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401, whether it can be imported is all that is asked
    except ImportError as missing:
        raise error(f"plots need matplotlib ({missing}); pip install 'convt-tvm[plot]'.") from missing


def new_figure(width: float, height: float, error: type[ConvTError]) -> Any:
    """An empty figure, in inches; raises `error` where matplotlib is missing."""
    require_matplotlib(error)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def tidy(axes: Any) -> None:
    """Draw the grid faintly and behind everything, and leave out the frame's upper and right sides."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
