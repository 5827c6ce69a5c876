"""What the commands of `convt_tvm.cli` share: their options, exit codes and ways to print."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:
    from convt_tvm.target import Target
    from convt_tvm.workloads import Workload

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "REGRESSED",
    "USAGE",
    "ChannelsLast",
    "Dtype",
    "Json",
    "OptionalWorkloads",
    "TargetName",
    "ThreadCounts",
    "Threads",
    "Workloads",
    "choose",
    "each",
    "print_json",
    "require_cores",
    "stop_if_interrupted",
    "thread_counts",
]

FAILED, USAGE, REGRESSED, INTERRUPTED = 1, 2, 3, 130

_WORKLOADS = typer.Argument(
    metavar="WORKLOAD",
    help="A suite (dcgan), a name (dcgan/2), a canonical spec name, or all.",
    show_default=False,
)
Workloads: TypeAlias = Annotated[list[str], _WORKLOADS]
OptionalWorkloads: TypeAlias = Annotated[list[str] | None, _WORKLOADS]
TargetName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="llvm is this machine; llvm:x86-64-v2, -v3, -v4; cuda:sm_90, with +tf32 to allow it.",
    ),
]
Dtype: TypeAlias = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="In place of the workloads' own: float16, bfloat16, float64."),
]
ChannelsLast: TypeAlias = Annotated[
    bool, typer.Option("--channels-last", help="Input and output in channels_last; on processors.")
]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="For kernels and peers alike; by default torch's number.")
]
ThreadCounts: TypeAlias = Annotated[
    str | None,
    typer.Option("--threads", metavar="N,...", help="One after the other; by default what there are."),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


def print_json(values: Any) -> None:
    """Print one line of JSON on stdout at once."""
    print(json.dumps(values, allow_nan=False), flush=True)


def each(items: Iterable[Any], work: Callable[[Any], None], total: int, *, quiet: bool) -> bool:
    """Work through the items under a progress bar; False if the user interrupted it."""
    from convt_tvm.terminal import progress

    try:
        with progress(total, quiet=quiet) as begin:
            for item in items:
                begin(item.name)
                work(item)
    except KeyboardInterrupt:
        return False
    return True


def stop_if_interrupted(finished: bool, done: int, total: int, what: str = "workloads") -> None:
    """Exit with `INTERRUPTED` and a line that counts, unless everything was finished."""
    if not finished:
        print(f"interrupted: {done} of {total} {what} done", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)


def choose(
    workloads: Sequence[str], target: str, *, dtype: str | None, channels_last: bool
) -> tuple[list["Workload"], "Target"]:
    """What is named, as the options want it, and what to compile it for; raises BadParameter for what GPUs lack."""
    from convt_tvm.target import Target
    from convt_tvm.workloads import adapted, resolve

    compiled_for = Target.parse(target)
    if channels_last and compiled_for.kind != "llvm":
        raise typer.BadParameter(f"kernels for {compiled_for.name} read and write NCHW; leave out --channels-last.")
    return adapted(resolve(workloads), dtype=dtype, channels_last=channels_last), compiled_for


def require_cores(threads: int | None) -> None:
    """Raise BadParameter for more threads than this process may run on."""
    from convt_tvm.machine import machine

    cores = machine().cores
    if threads is not None and threads > cores:
        raise typer.BadParameter(f"{threads} threads are more than the {cores} cores that this process may run on.")


def thread_counts(text: str, *, here: bool = True) -> list[int]:
    """The numbers that ``--threads`` lists, each once; raises BadParameter for no list, or too many `here`."""
    try:
        counts = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"--threads {text!r} is no list of numbers such as 1,2.")
    if here:
        require_cores(max(counts))
    return counts
