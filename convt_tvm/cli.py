"""The command ``convt-tvm``: parses, calls one function, prints.

Results go to stdout, errors and progress to stderr. Exit codes: 0 done, 1 failed work, 2 bad usage, 3 a regression, 130
interrupted. What a command needs is imported when it runs, so that help and mistakes are answered at once.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeAlias

import typer

from convt_tvm.errors import ConvTError, SpecError, TargetError, UnknownWorkloadError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from convt_tvm.check import CheckRow

__all__ = ["app", "main"]

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_USAGE_ERRORS = (UnknownWorkloadError, TargetError, SpecError)
_UNLIMITED_WIDTH = 10_000
_LONGEST_REASON = 600
_NOISY = 2

app = typer.Typer(
    name="convt-tvm",
    help="PyTorch's ConvTranspose2d, compiled ahead of time with Apache TVM.",
    epilog="Exit codes: 0 done, 1 failed work, 2 bad usage, 3 a regression, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Workloads: TypeAlias = Annotated[
    list[str],
    typer.Argument(
        metavar="WORKLOAD",
        help="A suite (dcgan), a name (dcgan/2), a canonical spec name, or all.",
        show_default=False,
    ),
]
TargetName: TypeAlias = Annotated[
    str, typer.Option("--target", metavar="TARGET", help="llvm is this machine; llvm:x86-64-v2, -v3, -v4 are levels.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code; an expected error is one line on stderr.

    Parameters
    ----------
    arguments
        Those of the process by default.
    """
    try:
        app(arguments, prog_name="convt-tvm")
    except (ConvTError, OSError) as error:
        _complain(str(error))
        raise SystemExit(USAGE if isinstance(error, _USAGE_ERRORS) else FAILED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    raise SystemExit(0)


def _complain(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from convt_tvm.target import package_versions

    versions = package_versions(["convt-tvm", "apache-tvm", "apache-tvm-ffi", "torch", "numpy"])
    own = versions.pop("convt-tvm") or "(not installed)"
    print(f"convt-tvm {own} with", ", ".join(f"{name} {version or '(none)'}" for name, version in versions.items()))
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _stdout() -> "Console":
    """A console for results: as wide as the terminal, or as wide as it takes where there is none."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, width=None if terminal else _UNLIMITED_WIDTH, highlight=False, emoji=False)


def _print(table: "Table", console: "Console") -> None:
    """Print a table without the blanks that fill its last column."""
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _print_json(values: Any) -> None:
    print(json.dumps(values, allow_nan=False), flush=True)


def _stderr_is_terminal() -> bool:
    return sys.stderr.isatty()


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr if that is a terminal; call the result with the name of each item as it begins."""
    if quiet or not _stderr_is_terminal():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

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


def _each(items: Iterable[Any], work: Callable[[Any], None], total: int, *, quiet: bool) -> bool:
    """Work through the items under a progress bar; False if the user interrupted it."""
    try:
        with _progress(total, quiet=quiet) as begin:
            for item in items:
                begin(item.name)
                work(item)
    except KeyboardInterrupt:
        return False
    return True


def _stop_if_interrupted(finished: bool, done: int, total: int) -> None:
    if not finished:
        print(f"interrupted: {done} of {total} workloads done", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)


@app.command(short_help="Build, run, compare with torch and float64.")
def check(
    workloads: Workloads,
    target: TargetName = "llvm",
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="For the kernel and for torch alike; by default torch's number."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Of the inputs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the timing.")] = False,
    as_json: Json = False,
) -> None:
    """Build, save, load and run kernels, and compare them with torch and with float64.

    Integer inputs have to give the exact bits; random ones have to stay within the error bound of a dot product
    (error/bound at most 1). Exits with 1 if a verdict is bad. With --json, one line a workload.
    """
    from convt_tvm.target import Target, machine
    from convt_tvm.workloads import resolve

    chosen, compiled_for = resolve(workloads), Target.parse(target)
    cores = machine().cores
    if threads is not None and threads > cores:
        raise typer.BadParameter(f"{threads} threads are more than the {cores} cores that this process may run on.")
    from convt_tvm.check import check as check_workload

    rows: list[CheckRow] = []

    def work(workload: Any) -> None:
        row = check_workload(workload, compiled_for, seed=seed, threads=threads, quick=quick)
        rows.append(row)
        if as_json:
            _print_json(row.to_json())

    finished = _each(chosen, work, len(chosen), quiet=as_json and sys.stdout.isatty())
    if rows and not as_json:
        _print_check(rows)
    _stop_if_interrupted(finished, len(rows), len(chosen))
    if any(row.verdict == "bad" for row in rows):
        raise typer.Exit(FAILED)


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


def _print_check(rows: "Sequence[CheckRow]") -> None:
    from rich import box
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

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


@app.command(short_help="Compile kernels ahead of time.")
def build(
    workloads: Workloads,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the artifact directories go.")],
    target: TargetName = "llvm",
    with_runtime: Annotated[
        bool, typer.Option("--with-runtime", help="Add TVM's runtime library, for machines without apache-tvm.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile kernels ahead of time, each to a directory of its own inside DIR.

    Prints the directory, its size and the build time of each. An artifact that is there already is replaced in one
    step. Exits with 1 if one could not be built; the others are. With --json, one line a workload.
    """
    from convt_tvm.target import Target
    from convt_tvm.workloads import resolve

    chosen, compiled_for = resolve(workloads), Target.parse(target)
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def work(workload: Any) -> None:
        row = {"workload": workload.name, "spec": workload.spec.name, "target": compiled_for.name}
        try:
            row |= _build_one(workload.spec, compiled_for, output, with_runtime=with_runtime)
        except Exception as error:  # recorded as this row's status, so that the others are still built
            text = " ".join(str(error).split())
            row["error"] = text if isinstance(error, ConvTError) else f"{type(error).__name__}: {text}"
        rows.append(row)
        if as_json:
            _print_json(row)
        elif row["error"] is None:
            size = f"{row['size_bytes'] / 1024:.0f} KiB"
            print(f"{row['path']}  ({workload.name}, {size}, built in {row['build_secs']:.2f} s)", flush=True)

    finished = _each(chosen, work, len(chosen), quiet=sys.stdout.isatty())
    failed = [row for row in rows if row["error"] is not None]
    for row in failed:
        _complain(f"{row['workload']}: {row['error']}")
    _stop_if_interrupted(finished, len(rows), len(chosen))
    if failed:
        raise typer.Exit(FAILED)


def _build_one(spec: Any, target: Any, output: Path, *, with_runtime: bool) -> dict[str, Any]:
    """Publish one artifact, which need not run here; returns what is printed about it."""
    from convt_tvm import artifact, runtime
    from convt_tvm.build import build_artifact

    with TemporaryDirectory(prefix="convt-tvm-build-") as temporary:
        built, final = Path(temporary) / "built", Path(temporary) / "final"
        start = perf_counter()
        build_artifact(spec, target, built)
        build_secs = perf_counter() - start
        extra = {artifact.RUNTIME_FILE: runtime._find_runtime(built)} if with_runtime else {}
        # The runtime library changes the digest, and with it the name.
        directory = output / artifact.copy(built, final, extra=extra).name
        artifact.copy(final, directory)
    size = sum(path.stat().st_size for path in directory.iterdir())
    return {"path": str(directory), "size_bytes": size, "build_secs": build_secs, "error": None}


@app.command(short_help="Verify an artifact and show its manifest.")
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show an artifact's manifest, after verifying every file against it."""
    from convt_tvm import artifact

    manifest = artifact.verify(directory)
    sizes = {name: (directory / name).stat().st_size for name in (*manifest.files, artifact.MANIFEST_FILE)}
    try:
        manifest.target.require_host()
        obstacle = ""
    except ConvTError as error:
        obstacle = str(error)
    if as_json:
        values = {"path": str(directory), "runs_here": not obstacle, "size_bytes": sizes}
        _print_json(values | {"manifest": manifest.to_json()})
        return
    spec, target = manifest.spec, manifest.target
    facts = {
        "artifact": manifest.name,
        "computes": f"{'x'.join(map(str, spec.input_shape))} to {'x'.join(map(str, spec.output_shape))} {spec.dtype}",
        "spec": spec.name,
        "target": f"{target.kind} {target.arch}",
        "features": ", ".join(target.features) or "none",
        "runs here": f"no: {obstacle}" if obstacle else "yes",
        "schedule": manifest.schedule,
        "layout": ", ".join(f"{key}={value}" for key, value in manifest.layout.items()),
        "packed": f"{'x'.join(map(str, manifest.packed_shape))} {manifest.packed_dtype}",
        "built with": ", ".join(f"{name} {version or '(none)'}" for name, version in manifest.versions.items()),
        "digest": manifest.digest,
    }
    described = {**facts, **{name: f"{size:,} bytes, verified" for name, size in sizes.items()}}
    _print_facts(described.items())


def _print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns; a value too long for the terminal continues in its own column."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(escape(name), escape(value))
    _print(grid, _stdout())


@app.command(short_help="Look for what is missing or broken.")
def doctor(as_json: Json = False) -> None:
    """Look for what is missing, what is known to break, and whether the compiler computes the right thing.

    Exits with 1 if something that matters is broken.
    """
    from convt_tvm.cache import cache_directory
    from convt_tvm.doctor import diagnose

    findings = []
    with _progress(1, quiet=as_json and sys.stdout.isatty()) as begin:
        begin("looking at versions, then running the compiler")
        for finding in diagnose(cache_directory()):
            findings.append(finding)
    is_bad = any(finding.status == "bad" for finding in findings)
    if as_json:
        _print_json({"healthy": not is_bad, "findings": [finding.to_json() for finding in findings]})
    else:
        from rich.markup import escape
        from rich.table import Table

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
    if is_bad:
        raise typer.Exit(FAILED)
