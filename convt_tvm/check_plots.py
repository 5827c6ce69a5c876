"""The numerics lab's pictures, as PNG files in memory. Needs matplotlib."""

import io
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from convt_tvm.errors import RowsError
from convt_tvm.findings import Examination, Finding
from convt_tvm.pictures import COLOURS, new_figure, tidy
from convt_tvm.rounding import ULP_EDGES

__all__ = ["plot_lengths", "plot_overview", "plot_phases", "plot_ulps"]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SMALLEST = 1e-5
_PHASES_LABELLED = 12


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _measured(examination: Examination, data: str) -> list[Finding]:
    return [
        each
        for each in examination.findings
        if each.stage == "rounding" and each.data == data and each.rounding is not None
    ]


def plot_ulps(examination: Examination, data: str) -> bytes | None:
    """Histograms of errors in units in the last place, one panel for each implementation; None without any."""
    found = _measured(examination, data)
    if not found:
        return None
    labels = ["0", *(f"{edge:g}" for edge in ULP_EDGES[1:]), "more"]
    figure = new_figure(max(4.0, 2.1 * len(found)), 2.5, RowsError)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, each, colour in zip(panels, found, cycle(COLOURS), strict=False):
        total = max(1, sum(each.rounding.ulps)) if each.rounding else 1
        shares = [100 * count / total for count in each.rounding.ulps] if each.rounding else []
        axes.bar(range(len(labels)), shares, color=colour, width=0.85)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axes.set_title(each.implementation, fontsize=9)
        tidy(axes)
    panels[0].set_ylabel("% of the outputs", fontsize=8)
    figure.supxlabel(f"error up to so many ulps, {data} data", fontsize=8)
    return _png(figure)


def plot_lengths(examinations: Sequence[Examination], data: str) -> bytes | None:
    """The largest error over bound against the number of products summed; None where nothing was measured."""
    figure = new_figure(7.5, 3.6, RowsError)
    axes = figure.subplots()
    names = list(dict.fromkeys(each.implementation for one in examinations for each in _measured(one, data)))
    for name, colour, marker in zip(names, cycle(COLOURS), cycle(_MARKERS), strict=False):
        points = [
            (length.length, max(length.largest, _SMALLEST))
            for one in examinations
            for each in _measured(one, data)
            if each.implementation == name and each.rounding is not None
            for length in each.rounding.lengths
            if length.length
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=16, color=colour, marker=marker, label=name, alpha=0.75)
    if not axes.collections:
        return None
    axes.axhline(1, color="black", linewidth=1)
    axes.annotate("the bound", (axes.get_xlim()[1], 1), ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("products summed by an output", fontsize=9)
    axes.set_ylabel("largest error / bound", fontsize=9)
    axes.legend(fontsize=8, ncols=2, frameon=False, loc="best")
    tidy(axes)
    return _png(figure)


def plot_phases(examination: Examination, data: str) -> bytes | None:
    """Heat maps of the largest error over bound in every phase, one for each implementation; None without any."""
    found = [each for each in _measured(examination, data) if each.phases]
    if not found:
        return None
    highest = max(max(map(max, each.phases)) for each in found if each.phases)
    figure = new_figure(max(4.0, 1.9 * len(found)), 2.3, RowsError)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, each in zip(panels, found, strict=True):
        phases = each.phases or ()
        image = axes.imshow(phases, vmin=0, vmax=min(highest, 1e6) or 1, cmap="viridis", aspect="auto")
        axes.set_title(each.implementation, fontsize=9)
        axes.set_xticks(range(len(phases[0])) if len(phases[0]) <= _PHASES_LABELLED else [])
        axes.set_yticks(range(len(phases)) if len(phases) <= _PHASES_LABELLED else [])
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("row modulo stride", fontsize=8)
    figure.supxlabel(f"column modulo stride; colour: largest error / bound, {data} data", fontsize=8)
    figure.colorbar(image, ax=list(panels), shrink=0.9).ax.tick_params(labelsize=7)
    return _png(figure)


def plot_overview(examinations: Sequence[Examination], data: str, ours: str, other: str) -> bytes | None:
    """Our largest error over another implementation's, a bar for each workload; None where there is no pair."""
    ratios = {}
    for one in examinations:
        pair = [each.rounding for name in (ours, other) for each in [one.find("rounding", data, name)] if each]
        if len(pair) == 2 and pair[0] and pair[1] and pair[1].max_error > 0:
            ratios[one.workload] = pair[0].max_error / pair[1].max_error
    if not ratios:
        return None
    figure = new_figure(7.5, 1.2 + 0.24 * len(ratios), RowsError)
    axes = figure.subplots()
    places = range(len(ratios))
    colours = [COLOURS[0] if ratio <= 2 else COLOURS[1] for ratio in ratios.values()]
    axes.barh(places, list(ratios.values()), color=colours, height=0.62)
    axes.axvline(1, color="black", linewidth=1)
    axes.axvline(2, color="black", linewidth=1, linestyle=":")
    axes.set_yticks(list(places), [name[:40] for name in ratios], fontsize=8)
    axes.set_ylim(len(ratios) - 0.4, -0.6)
    axes.set_xlabel(f"{ours}: largest error over that of {other}, {data} data (dotted: twice)", fontsize=9)
    tidy(axes)
    return _png(figure)
