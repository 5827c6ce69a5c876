"""The command `check`: the quick verdict, the numerics lab's report, conformance, and replay."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convt_tvm.cli_options import (
    FAILED,
    ChannelsLast,
    Dtype,
    Json,
    OptionalWorkloads,
    TargetName,
    Threads,
    choose,
    each,
    print_json,
    require_cores,
    stop_if_interrupted,
)

if TYPE_CHECKING:
    from convt_tvm.check import CheckRow
    from convt_tvm.conformance import Tally
    from convt_tvm.findings import Examination
    from convt_tvm.replay import Reproducer
    from convt_tvm.target import Target
    from convt_tvm.workloads import Workload

__all__ = ["check"]

_FAILURES = Path("convt-tvm-failures")


def check(
    workloads: OptionalWorkloads = None,
    target: TargetName = "llvm",
    dtype: Dtype = None,
    channels_last: ChannelsLast = False,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Of the inputs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the timing.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go through every stage of the numerics lab; write a page, plots and rows."),
    ] = None,
    runs: Annotated[int, typer.Option(min=2, metavar="N", help="With --report: calls that must repeat.")] = 10,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="With a cuda target: run its kernels on an emulator, without a GPU.")
    ] = False,
    conformance: Annotated[
        bool, typer.Option("--conformance", help="Try torch's and ONNX's cases, and fuzzed ones, instead.")
    ] = False,
    fuzz: Annotated[int, typer.Option(min=0, metavar="N", help="With --conformance: how many fuzzed cases.")] = 100,
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --conformance: processes; one a core by default.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Compare other libraries too, or our schedules alone.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="With --conformance: append tallies; what it has of these kernels is not tried again.",
        ),
    ] = None,
    failures: Annotated[
        Path, typer.Option(metavar="DIR", help="Where each failure leaves a file for --replay.")
    ] = _FAILURES,
    replay: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run again what such a file describes, and nothing else.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build, save, load and run kernels, and compare them with torch and with float64.

    Integer inputs have to give the exact bits; random ones have to stay within the error bound of a dot product
    (error/bound at most 1). Exits with 1 if a verdict is bad. With --json, one line a workload.

    With --report each workload goes through the numerics lab instead: exactness, rounding on five distributions,
    special values and determinism, of our kernel, of torch and of other libraries; DIR gets a page, index.html, its
    plots and rows.jsonl. Exits with 1 if one of our kernels fails.

    With --emulate the kernels of a cuda target run on an emulator: exact and slow, without times. With --report as
    well, integers alone and a single image of each batch; with --conformance, the kernels that would run.

    With --conformance no workload is named: cases of torch's own tests, of ONNX's, and fuzzed ones are tried with every
    schedule space and every other implementation there is. Exits with 1 if one of ours fails. With --json, one line for
    each block of cases and implementation.
    """
    chosen_modes = [bool(workloads), conformance, replay is not None]
    if sum(chosen_modes) != 1:
        raise typer.BadParameter("name workloads, or give --conformance, or --replay FILE: one of them.")
    chosen, compiled_for = choose(workloads or [], target, dtype=dtype, channels_last=channels_last)
    require_cores(threads)
    if replay is not None:
        _replay(replay, as_json=as_json)
    elif conformance:
        _conform(
            compiled_for,
            seed=seed,
            fuzz=fuzz,
            jobs=jobs,
            peers=peers,
            emulate=emulate,
            output=output,
            failures=failures,
            as_json=as_json,
        )
    elif report is not None:
        _report(
            chosen,
            compiled_for,
            report,
            seed=seed,
            threads=threads,
            runs=runs,
            peers=peers,
            emulate=emulate,
            failures=failures,
            as_json=as_json,
        )
    else:
        _check(
            chosen,
            compiled_for,
            threads=threads,
            seed=seed,
            quick=quick,
            emulate=emulate,
            as_json=as_json,
        )


def _check(
    chosen: "Sequence[Workload]",
    target: "Target",
    *,
    threads: int | None,
    seed: int,
    quick: bool,
    emulate: bool,
    as_json: bool,
) -> None:
    from convt_tvm.check import check as check_workload

    rows: list[CheckRow] = []

    def work(workload: Any) -> None:
        if emulate:
            from convt_tvm.emulate import check_emulated

            row = check_emulated(workload, target, seed=seed)
        else:
            row = check_workload(workload, target, seed=seed, threads=threads, quick=quick)
        rows.append(row)
        if as_json:
            print_json(row.to_json())

    finished = each(chosen, work, len(chosen), quiet=as_json and sys.stdout.isatty())
    if rows and not as_json:
        from convt_tvm.terminal import print_check

        print_check(rows)
    stop_if_interrupted(finished, len(rows), len(chosen))
    if any(row.verdict == "bad" for row in rows):
        raise typer.Exit(FAILED)


def _report(
    chosen: "Sequence[Workload]",
    target: "Target",
    directory: Path,
    *,
    seed: int,
    threads: int | None,
    runs: int,
    peers: bool,
    emulate: bool,
    failures: Path,
    as_json: bool,
) -> None:
    import torch

    from convt_tvm.bench import current_commit
    from convt_tvm.check_report import write_report
    from convt_tvm.errors import RowsError
    from convt_tvm.examine import examine_emulated, examine_workload
    from convt_tvm.implementations import emulated_implementation, implementations
    from convt_tvm.machine import machine
    from convt_tvm.pictures import require_matplotlib
    from convt_tvm.replay import Reproducer, write_reproducer
    from convt_tvm.terminal_numerics import print_examinations

    commit = current_commit()
    compared = [emulated_implementation(target)] if emulate else implementations(target, peers=peers)
    require_matplotlib(RowsError)
    sizes = sorted({1, threads or torch.get_num_threads(), machine().cores})
    done: list[Examination] = []

    def work(workload: Any) -> None:
        if emulate:
            one = examine_emulated(workload, target, compared[0], seed=seed, commit=commit)
        else:
            one = examine_workload(workload, target, compared, seed=seed, threads=sizes, runs=runs, commit=commit)
        done.append(one)
        for finding in one.failures:
            reproducer = Reproducer.of(finding, compared[0], target, commit)
            print(f"failed: {workload.name}: {finding.stage}, {finding.data}: {finding.reason}", file=sys.stderr)
            print(f"  convt-tvm check --replay {write_reproducer(failures, reproducer)}", file=sys.stderr)
        for implementation in compared:
            implementation.forget()
        write_report(directory, done)
        if as_json:
            print_json(one.to_json())

    finished = each(chosen, work, len(chosen), quiet=as_json and sys.stdout.isatty())
    if done and not as_json:
        print_examinations(done)
        print(f"the report is {directory / 'index.html'}")
    stop_if_interrupted(finished, len(done), len(chosen))
    if any(one.failures for one in done):
        raise typer.Exit(FAILED)


def _conform(
    target: "Target",
    *,
    seed: int,
    fuzz: int,
    jobs: int | None,
    peers: bool,
    emulate: bool,
    output: Path | None,
    failures: Path,
    as_json: bool,
) -> None:
    from convt_tvm.bench import current_commit
    from convt_tvm.cases import FAMILIES, FUZZ, missing_families
    from convt_tvm.conformance import blocks, conform, read_tallies, untried
    from convt_tvm.json_lines import append_lines
    from convt_tvm.terminal import progress
    from convt_tvm.terminal_numerics import print_conformance

    commit = current_commit()
    before = [] if output is None else read_tallies(output)
    missing = missing_families()
    for family, reason in missing.items():
        print(f"left out: {family}: {reason}", file=sys.stderr)
    wanted = blocks([*(family for family in FAMILIES if family not in missing), FUZZ], seed=seed, fuzz=fuzz)
    left = untried(wanted, before)
    tallies = [tally for tally in before if tally.block in wanted and tally.block not in left]
    if len(left) < len(wanted):
        print(
            f"{len(wanted) - len(left)} of {len(wanted)} blocks were tried with these kernels already", file=sys.stderr
        )
    interrupted = False
    try:
        with progress(len(left), quiet=as_json and sys.stdout.isatty()) as begin:
            begin("blocks of 25 cases")
            for found in conform(left, target, peers=peers, emulate=emulate, jobs=jobs, commit=commit):
                tallies += found
                if output is not None:
                    append_lines(output, found)
                if as_json:
                    for tally in found:
                        print_json(tally.to_json())
                begin(found[0].block.family)
    except KeyboardInterrupt:
        interrupted = True
    if tallies and not as_json:
        print_conformance(tallies)
    bad = _leave_reproducers(tallies, failures)
    stop_if_interrupted(not interrupted, len({tally.block for tally in tallies}), len(wanted), what="blocks")
    if bad:
        raise typer.Exit(FAILED)


def _leave_reproducers(tallies: "Sequence[Tally]", directory: Path) -> "list[Reproducer]":
    """Write a reproducer for each failure of ours, name it on stderr, and return them."""
    from convt_tvm.implementations import OURS
    from convt_tvm.replay import write_reproducer

    ours = [failure for tally in tallies if tally.implementation.split("/")[0] == OURS for failure in tally.failures]
    for failure in ours:
        print(f"failed: {failure.implementation}: {failure.reason}", file=sys.stderr)
        print(f"  convt-tvm check --replay {write_reproducer(directory, failure)}", file=sys.stderr)
    return ours


def _replay(path: Path, *, as_json: bool) -> None:
    from convt_tvm.replay import read_reproducer
    from convt_tvm.replay import replay as run_again

    reproducer = read_reproducer(path)
    found = run_again(reproducer)
    finding = found.finding
    if as_json:
        print_json({"finding": finding.to_json(), "same_artifact": found.same_artifact})
    else:
        from convt_tvm.terminal import print_facts

        same = {None: "not ours", True: "the one that failed", False: "another one: other sources or versions"}
        print_facts(
            [
                ("implementation", finding.implementation),
                ("spec", finding.spec),
                ("stage", f"{finding.stage}, {finding.data}, seed {finding.seed}"),
                ("then", reproducer.reason),
                ("now", f"{finding.status}{': ' * bool(finding.reason)}{finding.reason}"),
                ("artifact", same[found.same_artifact]),
            ]
        )
    if finding.status == "fail":
        raise typer.Exit(FAILED)
