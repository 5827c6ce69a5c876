"""The commands that measure, report and explain: `bench`, `report` and `explain`."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from convt_tvm.cli_options import (
    FAILED,
    REGRESSED,
    ChannelsLast,
    Dtype,
    Json,
    TargetName,
    ThreadCounts,
    Threads,
    Workloads,
    choose,
    each,
    print_json,
    require_cores,
    stop_if_interrupted,
    thread_counts,
)

if TYPE_CHECKING:
    from convt_tvm.rows import Row
    from convt_tvm.workloads import Workload

__all__ = ["bench", "explain", "report"]


class _Timing(NamedTuple):
    """A workload to be timed with so many threads, by default torch's number."""

    workload: "Workload"
    threads: int | None

    @property
    def name(self) -> str:
        """What progress shows."""
        return self.workload.name


def bench(
    workloads: Workloads,
    peers: Annotated[
        str, typer.Option("--peers", metavar="NAME,...", help="Of those listed above; all there are by default.")
    ] = "all",
    threads: ThreadCounts = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of each.")] = 15,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Append the rows to it, as JSON lines.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Exit with 3 where these rows were faster, beside torch.")
    ] = None,
    dtypes: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="DTYPE,...", help="Each of float32, float16, bfloat16, float64; by default their own."
        ),
    ] = None,
    channels_last: ChannelsLast = False,
    target: TargetName = "llvm",
    cold: Annotated[
        bool, typer.Option("--cold", help="With a cuda target: overwrite the second cache before each call.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time kernels against torch, torch_channels_last, torch_compile, onnxruntime and openvino.

    All in one process, by turns, in reversed order each round, with constant weights and the same number of threads. An
    answer that is wrong by float64 is never timed. A second copy of each kernel gives the noise floor. Of several
    numbers of threads, or types, each has a table; with more than one thread our time stands beside that with one, and
    in other types beside that in float32. Exits with 1 if one of our kernels failed. With --json, one line for each
    workload and implementation.

    On a GPU the peers are torch's: cuDNN with its benchmark mode, NCHW and channels_last, and torch.compile with
    autotuning; float32 is IEEE's. Calls are captured in CUDA graphs and timed by the GPU.
    """
    from convt_tvm.json_lines import append_lines
    from convt_tvm.rows import OURS, latest_runs, read_rows, regressions

    names = [None] if dtypes is None else list(dict.fromkeys(dtypes.split(",")))
    choices = [choose(workloads, target, dtype=name, channels_last=channels_last) for name in names]
    compiled_for = choices[0][1]
    if compiled_for.kind == "cuda" and threads is not None:
        raise typer.BadParameter("--threads is for processors.")
    counts = [None] if threads is None else thread_counts(threads)
    # Those of one layer one after the other, as they are compared.
    timings = [
        _Timing(workload, count)
        for same in zip(*(each for each, _ in choices), strict=True)
        for workload in same
        for count in counts
    ]
    before = None if baseline is None else read_rows(baseline)
    from convt_tvm.peers import GPU_PEERS, PEERS
    from convt_tvm.place import Place

    place = Place.of(compiled_for, cold=cold)
    known = list(GPU_PEERS) if place.device == "cuda" else list(PEERS)
    rivals = known if peers == "all" else list(dict.fromkeys(filter(None, peers.split(","))))
    if unknown := [name for name in rivals if name not in known]:
        raise typer.BadParameter(f"there is no peer {', '.join(unknown)}; there are {', '.join(known)}.")
    if before is not None and "torch" not in rivals:
        raise typer.BadParameter("--baseline compares ratios to torch, which has to be among the peers.")

    from convt_tvm.bench import bench as bench_workload

    compiled_for.require_host()
    rows: list[Row] = []

    def work(timing: _Timing) -> None:
        found = bench_workload(
            timing.workload, compiled_for, peers=rivals, threads=timing.threads, place=place, rounds=rounds
        )
        rows.extend(found)
        if output is not None:
            append_lines(output, found)
        if as_json:
            for row in found:
                print_json(row.to_json())

    finished = each(timings, work, len(timings), quiet=as_json and sys.stdout.isatty())
    ours = [row for row in rows if row.implementation == OURS]
    if rows and not as_json:
        from convt_tvm.terminal import print_bench

        print_bench(latest_runs(rows))
    stop_if_interrupted(finished, len(ours), len(timings), "runs")
    if any(row.status != "ok" for row in rows if row.is_ours):
        raise typer.Exit(FAILED)
    if before is not None and (slower := regressions(before, rows)):
        for line in slower:
            print("regression:", line, file=sys.stderr)
        raise typer.Exit(REGRESSED)


def report(
    path: Annotated[Path | None, typer.Argument(metavar="ROWS", help="A file of rows.", show_default=False)] = None,
    session: Annotated[
        list[Path] | None,
        typer.Option(
            "--session", metavar="DIR", help="Instead of rows: the log of a tuned workload; two are compared."
        ),
    ] = None,
    markdown: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the tables there; - is stdout, and the default.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw ratios to the best peer, or searches (.png, .svg, .pdf).")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all about the sessions as one page, pictures included.")
    ] = None,
    readme: Annotated[Path | None, typer.Option(metavar="FILE", help="Replace its section between markers.")] = None,
    as_json: Json = False,
) -> None:
    """Turn stored rows, or the logs of tuning sessions, into tables and plots; measures nothing.

    ROWS are those of bench, of which the last run of each workload and number of threads counts, or the rows.jsonl of
    `check --report`. The README's section is results, results-gpu for rows of GPUs, numerics for those of check. With
    --json, the rows, one a line, or one line for each search.
    """
    if (path is None) == (not session):
        raise typer.BadParameter("name either a file of rows or, with --session, the log of a tuned workload.")
    if path is None:
        if markdown or readme:
            raise typer.BadParameter("--markdown and --readme are for rows; sessions have --html and --plot.")
        from convt_tvm.cli_tune import report_sessions

        report_sessions(session or [], plot=plot, html=html, as_json=as_json)
        return
    if html:
        raise typer.BadParameter("--html is for sessions; rows have --markdown and --plot.")
    from convt_tvm.report import update_section

    draw: Callable[[Path], None]
    if _is_of_check(path):
        from convt_tvm import check_report
        from convt_tvm.findings import read_examinations

        examinations = read_examinations(path)
        section, text = "numerics", check_report.to_markdown(examinations)
        values = [one.to_json() for one in examinations]
        draw = partial(check_report.plot, examinations)
    else:
        from convt_tvm import report as bench_report
        from convt_tvm.rows import latest_runs, read_rows

        rows = read_rows(path)
        section = "results-gpu" if any("gpu" in row.machine for row in rows) else "results"
        text = bench_report.to_markdown(rows)
        values = [row.to_json() for run in latest_runs(rows) for row in run.rows.values()]
        draw = partial(bench_report.plot, rows)
    if as_json:
        for each_row in values:
            print_json(each_row)
    elif markdown == "-" or not (markdown or plot or readme):
        print(text, end="")
    if markdown not in (None, "-"):
        Path(markdown).write_text(text, encoding="utf-8")
    if plot is not None:
        draw(plot)
    if readme is not None:
        update_section(readme, section, text)


def _is_of_check(path: Path) -> bool:
    """Whether the rows are those of `check --report`, by the first of them."""
    with path.open(encoding="utf-8") as file:
        return '"findings"' in file.readline()


def explain(
    workloads: Workloads,
    target: TargetName = "llvm",
    threads: Threads = None,
    dtype: Dtype = None,
    channels_last: ChannelsLast = False,
    as_json: Json = False,
) -> None:
    """Show which taps reach which outputs, what the machine allows, and which schedule would run and why.

    Measures this machine's peak and bandwidth for each, half a second or so. With --json, one line a workload.
    """
    chosen, compiled_for = choose(workloads, target, dtype=dtype, channels_last=channels_last)
    require_cores(threads)
    import torch

    from convt_tvm.bench import measure_target_limits
    from convt_tvm.explain import explain as explain_workload
    from convt_tvm.target import Target
    from convt_tvm.terminal import print_explanation

    here, count = Target.parse("llvm"), threads or torch.get_num_threads()
    for number, workload in enumerate(chosen):
        limits = measure_target_limits(workload.spec.sized, here, count)
        found = explain_workload(workload, compiled_for, limits=limits)
        if as_json:
            print_json(found.to_json())
        else:
            print("\n" * (number > 0), end="")
            print_explanation(found)
