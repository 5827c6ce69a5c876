"""How results look in a terminal, or in a file where there is none: tables on stdout, progress on stderr."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import geometric_mean
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from convt_tvm.check import CheckRow
    from convt_tvm.doctor import Finding

__all__ = ["print_check", "print_facts", "print_findings", "progress"]

_UNLIMITED_WIDTH = 10_000
_LONGEST_REASON = 600
_NOISY = 2


def _stdout() -> Console:
    """A console for results: as wide as the terminal, or as wide as it takes where there is none."""
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, width=None if terminal else _UNLIMITED_WIDTH, highlight=False, emoji=False)


def _print(table: Table, console: Console) -> None:
    """Print a table without the blanks that fill its last column."""
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _stderr_is_terminal() -> bool:
    return sys.stderr.isatty()


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr if that is a terminal; call the result with the name of each item as it begins."""
    if quiet or not _stderr_is_terminal():
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
class _Column:
    """A column of the table that `check` prints; ``title`` is what a note calls it that is not shown.

    ``dropped`` orders the columns that a narrow terminal goes without, lowest first; 0 is never dropped. ``timing``
    columns are for rows that were timed.
    """

    header: str
    text: Callable[["CheckRow"], str]
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


def _milliseconds(microseconds: float | None) -> str:
    return "-" if microseconds is None else _digits(microseconds / 1e3)


def _speedup(row: "CheckRow") -> str:
    if row.speedup is None:
        return "-"
    return f"[{'green' if row.speedup >= 1 else 'yellow'}]{_digits(row.speedup)}x[/]"


def _verdict(row: "CheckRow") -> str:
    return "[green]good[/]" if row.verdict == "good" else "[bold red]bad[/]"


_COLUMNS = (
    _Column("workload", lambda row: row.workload, "left"),
    _Column("output\nNCHW", lambda row: "x".join(map(str, row.output_shape)), "left", dropped=2, title="output"),
    _Column("schedule", lambda row: row.schedule or "-", "left", dropped=1, title="schedule"),
    _Column("max error\nours", lambda row: _number(row.max_error, "{:.1e}")),
    _Column("\ntorch", lambda row: _number(row.max_error_torch, "{:.1e}"), dropped=3, title="torch's error"),
    _Column("error/\nbound", lambda row: _number(row.error_over_bound, "{:.2g}")),
    _Column("time, ms\nours", lambda row: _milliseconds(row.latency_us), timing=True),
    _Column("\ntorch", lambda row: _milliseconds(row.torch_latency_us), dropped=4, timing=True, title="torch's time"),
    _Column("torch/\nours", _speedup, timing=True),
    _Column("verdict", _verdict, "left"),
)


def print_check(rows: "Sequence[CheckRow]") -> None:
    """Print what `check` found: a table, the reason of each bad verdict, and one line that sums it up.

    A terminal too narrow for the table gets it without its less important columns, and a line that names them.
    """
    console = _stdout()

    def table_of(columns: Sequence[_Column]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        for column in columns:
            table.add_column(
                column.header,
                justify=column.justify,
                vertical="bottom",
                no_wrap=column.header != "workload",
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(column.text(row) for column in columns))
        return table

    timed = any(row.speedup is not None for row in rows)
    columns = [column for column in _COLUMNS if timed or not column.timing]
    # A measurement never exceeds the width in the options, so it is taken without a limit.
    unlimited = console.options.update_width(_UNLIMITED_WIDTH)
    while Measurement.get(console, unlimited, table_of(columns)).maximum > console.width:
        droppable = [column for column in columns if column.dropped]
        if not droppable:
            break
        columns.remove(min(droppable, key=lambda column: column.dropped))
    _print(table_of(columns), console)
    hidden = [
        column.title for column in _COLUMNS if column.dropped and (timed or not column.timing) and column not in columns
    ]
    if hidden:
        console.print(f"[dim]not shown in {console.width} columns: {', '.join(hidden)}[/]", soft_wrap=True)
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


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns; a value too long for the terminal continues in its own column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(escape(name), escape(value))
    _print(grid, _stdout())


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
    _print(grid, _stdout())
