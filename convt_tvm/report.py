"""Benchmark rows to Markdown and to a plot; measures nothing."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from convt_tvm.errors import RowsError
from convt_tvm.pictures import COLOURS, new_figure
from convt_tvm.rows import (
    OURS,
    OURS_DEFAULT,
    OURS_LAST,
    TORCH,
    Row,
    Run,
    beside_others,
    by_setting,
    geometric_means,
    latest_runs,
    shares,
)

__all__ = ["plot", "to_markdown", "update_section"]

_AHEAD, _BEHIND, _EVEN = COLOURS[0], COLOURS[1], COLOURS[6]


def _digits(value: float | None, unit: str = "") -> str:
    """About three significant digits without an exponent; a dash for None."""
    if value is None:
        return "-"
    for limit, places in ((0.1, 4), (1, 3), (10, 2), (100, 1)):
        if value < limit:
            return f"{value:.{places}f}{unit}"
    return f"{value:.0f}{unit}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _latest(rows: Sequence[Row]) -> list[Run]:
    """The last run of each workload; raises RowsError where there is none."""
    runs = latest_runs(rows)
    if not runs:
        raise RowsError("there is no row of our kernels to report on; write some with `convt-tvm bench -o`.")
    return runs


def _peer_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.peers))


def _our_cell(run: Run, name: str) -> str:
    row = run.rows.get(name)
    if row is None:
        return ""
    return row.status if row.median_us is None else _time(row)


def _time(row: Row, us: float | None = None) -> str:
    """A row's median, or another time beside it, in the unit of its table."""
    us = row.median_us if us is None else us
    return _digits(us if us is None or row.setting[0] else us / 1e3)


def _peer_cell(run: Run, name: str) -> str:
    row = run.peers.get(name)
    if row is None:
        return ""
    if row.median_us is None:
        return row.status
    text = _time(row)
    return f"**{text}**" if row is run.best_peer else text


def _table(runs: Sequence[Run], every: Sequence[Run]) -> list[str]:
    peers = _peer_names(runs)
    beside = shares(runs, every)
    more_of_ours = [name for name in (OURS_DEFAULT, OURS_LAST) if any(name in run.rows for run in runs)]
    header = [
        "workload",
        "bound",
        OURS,
        *more_of_ours,
        *peers,
        "best peer / ours",
        "torch / ours",
        "noise",
        "of peak",
        "of bound",
        *beside,
    ]
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'---:|' * (len(header) - 2)}"]
    for run in runs:
        ours = run.ours
        over_best = _digits(run.over_best)
        cells = [
            ours.workload,
            "-" if ours.bound_us is None else f"{_time(ours, ours.bound_us)} {ours.bound_by}",
            *(_our_cell(run, name) for name in (OURS, *more_of_ours)),
            *(_peer_cell(run, name) for name in peers),
            f"**{over_best} behind**" if run.is_behind else over_best,
            _digits(run.over_torch),
            "-" if ours.noise_floor is None else f"{ours.noise_floor - 1:.1%}",
            _percent(ours.share_of_peak),
            _percent(ours.share_of_bound),
            *(_digits(share(run)) for share in beside.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _overhead(run: Run) -> str:
    ours, torch = (run.rows[name].median_us if name in run.rows else None for name in (OURS, TORCH))
    text = f"What a call costs ({run.ours.workload}, torch tensors, packed weight, `out=`): {_digits(ours)} µs"
    return f"{text}, torch eager's {_digits(torch)} µs."


def _summary(runs: Sequence[Run]) -> str:
    over_best, over_torch = geometric_means(runs)
    compared = [run for run in runs if run.over_best is not None]
    if not compared:
        return "No peer was timed."
    behind = sum(run.is_behind for run in compared)
    text = f"Geometric means of {len(compared)}: {_digits(over_best)} times the best peer of each workload"
    if over_torch is not None:
        text += f", {_digits(over_torch)} times torch eager"
    text += f". Behind the best peer by more than the noise: {behind}."
    if any(OURS_DEFAULT in run.rows for run in compared):
        defaults = [run.by_default for run in compared]
        mean = _digits(geometric_means(defaults)[0])
        text += f" With no search: {mean} times the best peer, behind {sum(run.is_behind for run in defaults)}."
    return text


_VARYING = ("temperature",)
"""What is different in each row."""


def _conditions(runs: Sequence[Run]) -> list[str]:
    """Where the rows come from; more than one line where they come from several places."""
    lines = []
    for run in runs:
        ours = run.ours
        machine, versions = ours.machine, ours.versions
        installed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)
        gpu = "".join(f"{name} {value}; " for name, value in machine.get("gpu", {}).items() if name not in _VARYING)
        lines.append(
            f"{gpu}"
            f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('os')}, Python {machine.get('python')}; "
            f"{installed}; commit {ours.commit or 'unknown'}; {ours.date[:10]}."
        )
    return list(dict.fromkeys(lines))


_LIMITS = {
    False: "the bandwidth that of reading and writing as many bytes as the layer does",
    True: "of a product of matrices and of a copy no smaller than the layer's tensors",
}
"""What was timed for peak and bandwidth, on processors and on GPUs."""


def to_markdown(rows: Sequence[Row]) -> str:
    """Tables of the last run of each workload, one for each number of threads, and what they were measured with.

    Raises
    ------
    RowsError
        if there are no rows of our kernels.
    """
    parts = []
    everything = _latest(rows)
    for title, every in by_setting(everything).items():
        runs = [run for run in every if not run.is_overhead]
        peaks = [run.ours.peak_gflops for run in runs if run.ours.peak_gflops is not None]
        unit = "microseconds" if every[0].ours.setting[0] else "milliseconds"
        parts.append(f"**{title}**, {unit} a call, median of {every[0].ours.rounds} rounds")
        if runs:
            parts.append("\n".join(_table(runs, everything)))
            parts.append(" ".join(filter(None, (_summary(runs), beside_others(runs, everything)))))
        if peaks:
            least, most = _digits(min(peaks)), _digits(max(peaks))
            parts.append(f"Measured peak: {least if least == most else f'{least} to {most}'} GFLOP/s.")
        parts += [_overhead(run) for run in every if run.is_overhead]
    on_gpus = any("gpu" in row.machine for row in rows)
    parts.append(
        "*bound*: the roofline's time from the measured peak and bandwidth, and which of them binds; both are medians "
        f"taken by turns with the kernels, {_LIMITS[on_gpus]}. *noise*: by how much two copies of our kernel differed. "
        "*best peer / ours*: the smallest ratio of a peer's time, in bold, to ours in the same memory format; it and "
        "*torch / ours* are medians of the ratios in each round. "
        "*ours_default*: the cost rule's kernel, where tuning found the faster one that *ours* is. Weights are "
        "constant everywhere; all in one process, by turns."
    )
    if shares(everything, everything):
        parts[-1] += (
            " *of 1 thread*: our time over that with one thread, by turns as well. *of float32*: over that of the same "
            "commit in float32."
        )
    parts += _conditions(everything)
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the ratio of the best peer's time to ours for each workload, a panel for each table of `to_markdown`.

    The file's suffix names the format. Needs matplotlib.

    Raises
    ------
    RowsError
        if no workload has both our time and a peer's, or matplotlib is missing.
    """
    panels = {
        title: [run for run in runs if run.over_best is not None and not run.is_overhead]
        for title, runs in by_setting(_latest(rows)).items()
    }
    panels = {title: runs for title, runs in panels.items() if runs}
    if not panels:
        raise RowsError("no workload has both our time and a peer's; run `convt-tvm bench` with peers.")
    tallest = max(len(runs) for runs in panels.values())
    columns = min(2, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    picture = new_figure(1 + 6.9 * columns, (1.6 + 0.3 * tallest) * rows_of_panels, RowsError)
    all_axes = picture.subplots(rows_of_panels, columns, squeeze=False).flat
    for axes, (title, runs) in zip(all_axes, panels.items(), strict=False):
        _draw(axes, runs, title)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    picture.savefig(path, dpi=144)


def _colour(run: Run) -> str:
    if run.is_behind:
        return _BEHIND
    return _AHEAD if (run.over_best or 0) > (run.ours.noise_floor or 1) else _EVEN


def _draw(axes: Any, runs: Sequence[Run], title: str) -> None:
    ratios = [run.over_best or 0.0 for run in runs]
    places = range(len(runs))
    colours = [_colour(run) for run in runs]
    # Bars start at 1, where both are equally fast: on a logarithmic axis there is no 0 for them to start at.
    axes.barh(places, [ratio - 1 for ratio in ratios], left=1, color=colours, height=0.62, zorder=2)
    for place, run, ratio in zip(places, runs, ratios, strict=True):
        noise = run.ours.noise_floor or 1
        axes.plot([1 / noise, noise], [place, place], color="black", linewidth=1.2, marker="|", markersize=7, zorder=3)
        best = run.best_peer
        axes.annotate(
            f"{ratio:.2f}  {best.implementation if best else ''}",
            (max(ratio, noise), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1, color="black", linewidth=1, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.8, min(ratios) / 1.15), max(2.0, max(ratios)) * 1.9)
    ticks = [tick for tick in (0.125, 0.25, 0.5, 0.8, 1, 1.5, 2, 3, 4, 6, 8, 16, 32) if tick <= axes.get_xlim()[1]]
    axes.set_xticks([tick for tick in ticks if tick >= axes.get_xlim()[0]], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.set_yticks(list(places), [run.ours.workload[:40] for run in runs], fontsize=9)
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        "best peer's time / ours; blue: we are faster, orange: slower, gray: within the noise (black)", fontsize=9
    )
    mean = geometric_mean(ratios)
    axes.set_title(f"{title}: {mean:.2f} times the best peer, geometric mean", fontsize=10, loc="left")


def update_section(path: Path, name: str, markdown: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->`` in a file.

    Raises
    ------
    RowsError
        if the file does not hold exactly one such section.
    """
    section = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text = path.read_text(encoding="utf-8")
    if (count := len(section.findall(text))) != 1:
        raise RowsError(
            f"{path} has {count} sections between the lines <!-- {name} --> and <!-- /{name} -->; it needs one."
        )
    path.write_text(section.sub(lambda match: f"{match[1]}{markdown}{match[2]}", text), encoding="utf-8")
