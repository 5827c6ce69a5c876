"""The command that runs autotuning sessions, `tune`, and what `report` says about them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convt_tvm.cli_options import (
    FAILED,
    INTERRUPTED,
    ChannelsLast,
    Dtype,
    Json,
    OptionalWorkloads,
    TargetName,
    ThreadCounts,
    choose,
    print_json,
    thread_counts,
)
from convt_tvm.errors import ConvTError
from convt_tvm.records import GENERIC, OWN

if TYPE_CHECKING:
    from convt_tvm.session import Outcome

__all__ = ["report_sessions", "tune"]


def tune(
    workloads: OptionalWorkloads = None,
    target: TargetName = "llvm",
    threads: ThreadCounts = None,
    dtype: Dtype = None,
    channels_last: ChannelsLast = False,
    effort: Annotated[
        str, typer.Option(metavar="quick|normal|full", help="32, 64 or 512 trials in at most 5, 10 or 60 minutes.")
    ] = "normal",
    trials: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of each session, those of earlier runs included.")
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, metavar="MINUTES", help="Of each session, this time.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Of the search and the inputs.")] = 0,
    space: Annotated[
        str, typer.Option(metavar="own|generic", help="generic: TVM's own space, a baseline that build never uses.")
    ] = "own",
    logs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the logs are; by default those that build reads.")
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECS", help="Wait for another session that writes to the same log.")
    ] = 0,
    rpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Check and time on servers of this TVM RPC tracker.")
    ] = None,
    key: Annotated[str, typer.Option(metavar="KEY", help="Of the servers to ask the tracker for.")] = "",
    merge: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Bring in the logs of another machine, and tune nothing.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search for the fastest schedule, and keep it for `build`.

    Candidates are checked on integers before their times count. Everything is written down at once: the same command
    goes on after an interrupt or a crash, and does nothing when all is done. An interrupt ends the session at hand with
    the best so far; a second one ends it at once. Exits with 1 if a session failed. With --json, one line a session.
    """
    from convt_tvm.database import logs_directory

    where = logs or logs_directory()
    if merge is not None:
        _merge(merge, where, as_json=as_json)
        return
    if not workloads:
        raise typer.BadParameter("name at least one workload, for example dcgan/4, or all.")
    chosen, compiled_for = choose(workloads, target, dtype=dtype, channels_last=channels_last)
    if (rpc is None) != (not key):
        raise typer.BadParameter("--rpc and --key go together: the tracker's address and the key of its servers.")
    if compiled_for.kind == "cuda":
        if threads is not None or rpc is not None:
            raise typer.BadParameter("--threads and --rpc are for processors; a GPU is tuned where it is.")
        compiled_for.require_host()
        threads = "1"
    from convt_tvm.threads import get_num_threads

    counts = [get_num_threads()] if threads is None else thread_counts(threads, here=rpc is None)
    from convt_tvm.terminal_tune import print_outcomes, session_progress
    from convt_tvm.tune import EFFORTS, Budget
    from convt_tvm.tune import tune as tune_workload

    if effort not in EFFORTS:
        raise typer.BadParameter(f"there is no effort {effort!r}; there are {', '.join(EFFORTS)}.")
    if space not in (OWN, GENERIC):
        raise typer.BadParameter(f"there is no space {space!r}; there are {OWN} and {GENERIC}.")
    limits = Budget(trials or EFFORTS[effort].trials, EFFORTS[effort].minutes if budget is None else budget)
    outcomes: list[Outcome] = []
    failed = interrupted = False
    try:
        with session_progress(quiet=as_json and sys.stdout.isatty()) as observe:
            for workload in chosen:
                for count in counts:
                    try:
                        outcome = tune_workload(
                            workload,
                            compiled_for,
                            budget=limits,
                            effort=effort,
                            threads=count,
                            logs=where,
                            seed=seed,
                            space=space,
                            wait_secs=wait,
                            rpc=None if rpc is None else (rpc, key),
                            observe=observe,
                        )
                    except ConvTError as error:
                        # The others are still tuned.
                        print(f"error: {workload.name}: {' '.join(str(error).split())}", file=sys.stderr)
                        failed = True
                        continue
                    outcomes.append(outcome)
                    failed |= outcome.result is None
                    if as_json:
                        print_json(_to_json(outcome))
                    if outcome.stopped == "interrupted":
                        raise KeyboardInterrupt
    except KeyboardInterrupt:
        interrupted = True
    if outcomes and not as_json:
        print_outcomes(outcomes)
    if interrupted:
        total = len(chosen) * len(counts)
        done = sum(outcome.stopped != "interrupted" for outcome in outcomes)
        print(f"interrupted: {done} of {total} sessions done; the same command goes on", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(FAILED)


def _merge(source: Path, into: Path, *, as_json: bool) -> None:
    from convt_tvm.database import merge

    for merged in merge(source, into):
        if as_json:
            print_json({"spec": merged.spec, "added": merged.added})
        else:
            print(f"{merged.spec}: {', '.join(f'{count} lines of {name}' for name, count in merged.added.items())}")


def _to_json(outcome: "Outcome") -> dict[str, Any]:
    return {
        "workload": outcome.info.workload,
        "session": outcome.info.to_json(),
        "result": None if outcome.result is None else outcome.result.to_json(),
        "trials": outcome.trials,
        "measured": outcome.measured,
        "stopped": outcome.stopped,
        "failures": dict(outcome.failures),
        "secs": round(outcome.secs, 1),
        "notes": list(outcome.notes),
    }


def report_sessions(directories: list[Path], *, plot: Path | None, html: Path | None, as_json: bool) -> None:
    """Print what the logs say, and write a page or a picture if asked to."""
    from convt_tvm.session_report import draw, read_searches, readable_trace, to_html
    from convt_tvm.terminal_tune import print_searches

    searches = [search for directory in directories for search in read_searches(directory)]
    traces = []
    if html is not None or not as_json:
        for search in searches:
            found = search.result or search.best
            traces.append("nothing was timed" if found is None else readable_trace(search, found.candidate))
    if as_json:
        for search in searches:
            print_json(search.to_json())
    elif html is None and plot is None:
        print_searches(searches, traces)
    if html is not None:
        html.write_text(to_html(searches, traces), encoding="utf-8")
    if plot is not None:
        draw(searches, plot)
