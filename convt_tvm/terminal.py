"""How results look in a terminal, or in a file where there is none: tables on stdout, progress on stderr."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from convt_tvm.rows import (
    COPY,
    OURS_DEFAULT,
    OURS_LAST,
    TORCH,
    Row,
    Run,
    beside_others,
    by_setting,
    geometric_means,
    shares,
)

if TYPE_CHECKING:
    from convt_tvm.check import CheckRow
    from convt_tvm.doctor import Finding
    from convt_tvm.explain import AxisPhase, Explanation

__all__ = [
    "milliseconds",
    "print_bench",
    "print_check",
    "print_explanation",
    "print_facts",
    "print_findings",
    "progress",
    "stderr_is_terminal",
    "stdout_console",
]

_UNLIMITED_WIDTH = 10_000
_LONGEST_REASON = 600
_NOISY = 2
_CANDIDATES_SHOWN = 6
_PHASES_SHOWN = 8


def stdout_console() -> Console:
    """A console for results: as wide as the terminal, or as wide as it takes where there is none."""
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, width=None if terminal else _UNLIMITED_WIDTH, highlight=False, emoji=False)


def _print(table: Table, console: Console) -> None:
    """Print a table without the blanks that fill its last column."""
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def stderr_is_terminal() -> bool:
    """Whether progress has somewhere to be drawn."""
    return sys.stderr.isatty()


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr if that is a terminal; call the result with the name of each item as it begins."""
    if quiet or not stderr_is_terminal():
        yield lambda name: None
        return

    columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
    # No thread of its own that redraws: it would take time from what is being measured.
    with Progress(
        *columns, console=Console(stderr=True, force_terminal=True), transient=True, auto_refresh=False
    ) as bar:
        task = bar.add_task("", total=total)
        started = 0

        def begin(name: str) -> None:
            nonlocal started
            bar.update(task, completed=started, description=name, refresh=True)
            started += 1

        yield begin


@dataclass(frozen=True)
class Column:
    """A column of a table of rows; ``title`` is what a note calls it that is not shown.

    ``dropped`` orders the columns that a narrow terminal goes without, lowest first; 0 is never dropped. ``timing``
    columns are for rows that were timed.
    """

    header: str
    text: Callable[[Any], str]
    justify: Literal["left", "right"] = "right"
    dropped: int = 0
    timing: bool = False
    title: str = ""


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return form.format(value) if math.isfinite(value) else str(value)


def _digits(value: float) -> str:
    """About three significant digits without an exponent: 0.0312, 0.683, 2.40, 12.4, 1280."""
    for limit, places in ((0.1, 4), (1, 3), (10, 2), (100, 1)):
        if value < limit:
            return f"{value:.{places}f}"
    return f"{value:.0f}"


def milliseconds(microseconds: float | None) -> str:
    """A time in milliseconds to about three digits; a dash for None."""
    return "-" if microseconds is None else _digits(microseconds / 1e3)


def _speedup(row: "CheckRow") -> str:
    if row.speedup is None:
        return "-"
    return f"[{'green' if row.speedup >= 1 else 'yellow'}]{_digits(row.speedup)}x[/]"


def _verdict(row: "CheckRow") -> str:
    return "[green]good[/]" if row.verdict == "good" else "[bold red]bad[/]"


_COLUMNS = (
    Column("workload", lambda row: row.workload, "left"),
    Column("output\nNCHW", lambda row: "x".join(map(str, row.output_shape)), "left", dropped=2, title="output"),
    Column("schedule", lambda row: row.schedule or "-", "left", dropped=1, title="schedule"),
    Column("max error\nours", lambda row: _number(row.max_error, "{:.1e}")),
    Column("\ntorch", lambda row: _number(row.max_error_torch, "{:.1e}"), dropped=3, title="torch's error"),
    Column("error/\nbound", lambda row: _number(row.error_over_bound, "{:.2g}")),
    Column("time, ms\nours", lambda row: milliseconds(row.latency_us), timing=True),
    Column("\ntorch", lambda row: milliseconds(row.torch_latency_us), dropped=4, timing=True, title="torch's time"),
    Column("torch/\nours", _speedup, timing=True),
    Column("verdict", _verdict, "left"),
)


def print_table(columns: Sequence[Column], rows: Sequence[Any], console: Console) -> None:
    """Print a table of rows; where it is too wide, without its less important columns and with a line naming them."""

    def table_of(shown: Sequence[Column]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        for column in shown:
            table.add_column(
                column.header,
                justify=column.justify,
                vertical="bottom",
                no_wrap=column.header != "workload",
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(column.text(row) for column in shown))
        return table

    shown = list(columns)
    # A measurement never exceeds the width in the options, so it is taken without a limit.
    unlimited = console.options.update_width(_UNLIMITED_WIDTH)
    while Measurement.get(console, unlimited, table_of(shown)).maximum > console.width:
        droppable = [column for column in shown if column.dropped]
        if not droppable:
            break
        shown.remove(min(droppable, key=lambda column: column.dropped))
    _print(table_of(shown), console)
    hidden = [column.title for column in columns if column not in shown]
    if hidden:
        console.print(f"[dim]not shown in {console.width} columns: {', '.join(hidden)}[/]", soft_wrap=True)


def print_check(rows: "Sequence[CheckRow]") -> None:
    """Print what `check` found: a table, the reason of each bad verdict, and one line that sums it up.

    A terminal too narrow for the table gets it without its less important columns, and a line that names them.
    """
    console = stdout_console()
    timed = any(row.speedup is not None for row in rows)
    print_table([column for column in _COLUMNS if timed or not column.timing], rows, console)
    bad = [row for row in rows if row.verdict == "bad"]
    for row in bad:
        reason = row.reason if len(row.reason) <= _LONGEST_REASON else row.reason[:_LONGEST_REASON] + " ..."
        console.print(f"[bold red]bad[/]  {escape(row.workload)}: {escape(reason)}", soft_wrap=True)
    console.print(escape(_summary(rows)), soft_wrap=True)


def _summary(rows: "Sequence[CheckRow]") -> str:
    """One line beneath the table: how many verdicts of each kind, and how the times compare."""
    bad = sum(row.verdict == "bad" for row in rows)
    text = f"{len(rows) - bad} good, {bad} bad"
    speedups = [row.speedup for row in rows if row.speedup is not None]
    if not speedups:
        return text
    threads = f"{rows[0].threads} thread{'s' if rows[0].threads > 1 else ''}"
    slower = sum(speedup < 1 for speedup in speedups)
    mean = f"{_digits(geometric_mean(speedups))}x torch eager, geometric mean of {len(speedups)}"
    noisy = sum(row.spread is not None and row.spread > _NOISY for row in rows)
    note = f"; {noisy} timings varied more than {_NOISY}-fold between rounds, is the machine busy?" if noisy else ""
    return f"{text}; {mean} with {threads}, slower on {slower}{note}"


def _peer_column(name: str, dropped: int) -> Column:
    def text(run: Run) -> str:
        row = run.peers.get(name)
        if row is None or row.median_us is None:
            return "" if row is None else f"[dim]{row.status}[/]"
        shown = milliseconds(row.median_us)
        return f"[bold]{shown}[/]" if row is run.best_peer else shown

    words = {
        "torch_channels_last": "torch\nch. last",
        "torch_compile": "torch\ncompile",
        "onnxruntime": "onnx\nruntime",
    }
    return Column(words.get(name, name), text, dropped=dropped, title=name)


def _over_best(run: Run) -> str:
    if run.over_best is None:
        return "-"
    return f"[{'yellow' if run.is_behind else 'green'}]{_digits(run.over_best)}x[/]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _bound(run: Run) -> str:
    return f"{milliseconds(run.ours.bound_us)} {(run.ours.bound_by or '')[:3]}"


def _our_time(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"[bold red]{row.status}[/]" if row.median_us is None else milliseconds(row.median_us)


_OUR_HEADINGS = {
    OURS_DEFAULT: ("by\ndefault\nms", "ours by default"),
    OURS_LAST: ("ours\nlast\nms", "ours channels_last"),
}


def _our_column(name: str) -> Column:
    heading, title = _OUR_HEADINGS[name]
    return Column(heading, lambda run: _our_time(run.rows.get(name)), dropped=4, title=title)


def print_bench(runs: Sequence[Run]) -> None:
    """Print benchmark runs: for each setting a table, the reason of each missing time, and a line that sums it up."""
    tables = by_setting(runs)
    for title, each in tables.items():
        if len(tables) > 1:
            stdout_console().print(f"[bold]{escape(title)}[/]\n", soft_wrap=True)
        _print_setting(each, runs)
        if len(tables) > 1:
            print()


def _print_setting(runs: Sequence[Run], every: Sequence[Run]) -> None:
    """Print runs that may stand in one table, and compare them with others of `every` run."""
    console = stdout_console()
    peers = list(dict.fromkeys(name for run in runs for name in run.peers))
    columns = [
        Column("workload", lambda run: run.ours.workload, "left"),
        Column("schedule", lambda run: run.ours.schedule or "-", "left", dropped=1, title="schedule"),
        Column("bound\nms", _bound, dropped=5, title="bound"),
        Column("ours\nms", lambda run: _our_time(run.ours)),
        *(_our_column(name) for name in _OUR_HEADINGS if any(name in run.rows for run in runs)),
        *(_peer_column(name, dropped=3 + (name == TORCH)) for name in peers),
        Column(
            "best\npeer",
            lambda run: run.best_peer.implementation if run.best_peer else "-",
            "left",
            dropped=9,
            title="best peer",
        ),
        Column("best/\nours", _over_best),
        Column("torch/\nours", lambda run: _number(run.over_torch, "{:.2f}x"), dropped=8, title="torch/ours"),
        Column("noise", lambda run: _noise(run.ours), dropped=6, title="noise"),
        Column("of\npeak", lambda run: _percent(run.ours.share_of_peak), dropped=2, title="share of peak"),
        Column("of\nbound", lambda run: _percent(run.ours.share_of_bound), dropped=7, title="share of bound"),
        *(_share_column(title, share) for title, share in shares(runs, every).items()),
    ]
    print_table(columns, runs, console)
    for run in runs:
        for row in run.rows.values():
            if row.status != "ok" and row.implementation != COPY:
                style = "bold red" if row.is_ours or row.status == "wrong" else "yellow"
                reason = row.reason if len(row.reason) <= _LONGEST_REASON else row.reason[:_LONGEST_REASON] + " ..."
                console.print(
                    f"[{style}]{row.status}[/]  {escape(row.workload)}: {row.implementation}: {escape(reason)}",
                    soft_wrap=True,
                )
    console.print(escape(_bench_summary(runs)), soft_wrap=True)
    if beside := beside_others(runs, every):
        console.print(escape(beside), soft_wrap=True)


def _share_column(title: str, share: Callable[[Run], float | None]) -> Column:
    header = "\n".join(title.rsplit(" ", 1))
    return Column(header, lambda run: _number(share(run), "{:.2f}"), dropped=8, title=f"time {title}")


def _noise(row: Row) -> str:
    return "-" if row.noise_floor is None else f"{row.noise_floor - 1:.1%}"


def _bench_summary(runs: Sequence[Run]) -> str:
    runs = [run for run in runs if not run.is_overhead] or runs
    over_best, over_torch = geometric_means(runs)
    threads = runs[0].ours.threads
    with_threads = f"with {threads} thread{'s' if threads > 1 else ''}"
    if over_best is None:
        return f"no peer was timed; {len(runs)} workloads {with_threads}"
    compared = sum(run.over_best is not None for run in runs)
    behind = sum(run.is_behind for run in runs)
    torch = "" if over_torch is None else f", {_digits(over_torch)}x torch eager"
    return (
        f"{_digits(over_best)}x the best peer of each workload{torch}, geometric means of {compared} {with_threads}; "
        f"behind the best peer by more than the noise on {behind}"
    )


def print_explanation(found: "Explanation") -> None:
    """Print what `explain` found about one workload."""
    spec, limit = found.workload.spec, found.bound

    def phases(of_axis: "Sequence[AxisPhase]") -> str:
        lines = [
            f"{phase.count} outputs from {phase.residue}: "
            + (f"taps {' '.join(map(str, phase.taps))}" if phase.taps else "no taps, the bias alone")
            for phase in of_axis[:_PHASES_SHOWN]
        ]
        more = len(of_axis) - len(lines)
        return "\n".join([*lines, *([f"and {more} more"] if more else [])])

    zeros = found.textbook_multiplications / max(1, found.useful_multiplications)
    print_facts(
        [
            ("workload", f"{found.workload.name}: {found.workload.source}"),
            ("computes", spec.shapes),
            ("spec", spec.name),
            (f"rows, stride {spec.stride[0]}", phases(found.rows)),
            (f"columns, stride {spec.stride[1]}", phases(found.columns)),
            (
                "multiplications",
                f"{found.useful_multiplications:,} useful; the text-book form makes "
                f"{found.textbook_multiplications:,}, {zeros:.2f} times as many: "
                f"{found.zero_multiplications:,} by zeros",
            ),
            (
                "roofline",
                f"{milliseconds(limit.secs * 1e6)} ms, bound by {limit.by}: {limit.flops / 1e9:.4g} GFLOP at "
                f"{limit.flops_per_sec / 1e9:.4g} GFLOP/s take {milliseconds(limit.compute_secs * 1e6)} ms, "
                f"{limit.size_bytes / 1e6:.4g} MB at {limit.bytes_per_sec / 1e9:.4g} GB/s "
                f"{milliseconds(limit.memory_secs * 1e6)} ms; "
                f"{found.threads} thread{'s' if found.threads > 1 else ''}",
            ),
            ("runs", found.reason),
            *(("ignored", reason) for reason in found.ignored),
        ]
    )
    if not found.candidates:
        return
    cheapest = found.candidates[0].cycles
    # The best few, and the best of every other schedule.
    shown = list(found.candidates[:_CANDIDATES_SHOWN])
    for candidate in found.candidates:
        if candidate.schedule not in {other.schedule for other in shown}:
            shown.append(candidate)
    print()
    print_table(
        [
            Column("schedule", lambda candidate: candidate.schedule, "left"),
            Column(
                "layout",
                lambda candidate: ", ".join(f"{key}={value}" for key, value in candidate.layout.items()),
                "left",
                dropped=1,
                title="layout",
            ),
            Column("estimated\ncycles", lambda candidate: f"{candidate.cycles:,.0f}"),
            Column("times the\ncheapest", lambda candidate: f"{candidate.cycles / cheapest:.2f}"),
        ],
        shown,
        stdout_console(),
    )
    if len(found.candidates) > len(shown):
        print(f"{len(found.candidates) - len(shown)} dearer ones not shown")


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns; a value too long for the terminal continues in its own column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(escape(name), escape(value))
    _print(grid, stdout_console())


def print_findings(findings: "Iterable[Finding]") -> None:
    """Print what `doctor` found: status, name, what was found and, beneath it, what to do."""
    styles = {"ok": "green", "note": "yellow", "bad": "bold red"}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for finding in findings:
        advice = f"\n{escape(finding.advice)}" if finding.advice else ""
        status = f"[{styles[finding.status]}]{finding.status}[/]"
        grid.add_row(status, escape(finding.name), f"{escape(finding.found)}[dim]{advice}[/]")
    _print(grid, stdout_console())
