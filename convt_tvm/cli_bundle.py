"""The command `bundle`: kernels, and all that measures them, in one file for another machine."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from convt_tvm.cli_options import FAILED, Json, TargetName, Workloads, print_json

__all__ = ["bundle"]

MANY = 16
"""Kernels that take longer to compile than further processes take to start."""


def bundle(
    workloads: Workloads,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The bundle, such as kit.pyz.")],
    target: TargetName = "llvm",
    precisions: Annotated[
        str,
        typer.Option(metavar="NAME,...", help="float32, tf32, float16, bfloat16, float64; by default the workload's."),
    ] = "",
    candidates: Annotated[
        int, typer.Option(min=0, metavar="N", help="Schedules of each workload to compile for tuning there.")
    ] = 0,
    wheels: Annotated[
        list[Path] | None,
        typer.Option("--wheel", metavar="FILE", help="A package for the Python there, to be carried."),
    ] = None,
    limit: Annotated[float, typer.Option(min=0, metavar="MIB", help="Fail rather than make a larger bundle.")] = 64,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="For a rehearsal: kernels of a cuda target for the emulator.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile kernels and put them into one file that checks, times and tunes them on another machine.

    There, `python3 FILE` needs torch, numpy and apache-tvm-ffi, neither network nor compiler, and leaves its results in
    one file too; `python3 FILE --help` says more. Rows go to `report`, logs to `tune --merge`. Exits with 1 if a kernel
    could not be compiled; the bundle has the others.
    """
    from convt_tvm.target import Target
    from convt_tvm.workloads import resolve

    chosen, compiled_for = resolve(workloads), Target.parse(target)
    from convt_tvm.bundle import make_bundle, variants
    from convt_tvm.machine import machine
    from convt_tvm.terminal import progress

    named = [name for name in precisions.split(",") if name]
    wanted = [variant for workload in chosen for variant in variants(workload, compiled_for, named)]
    with ExitStack() as stack:
        if emulate:
            from convt_tvm.emulated_torch import emulated_gpu

            if compiled_for.kind != "cuda":
                raise typer.BadParameter(f"the emulator runs code for GPUs, not for {compiled_for.name}.")
            stack.enter_context(emulated_gpu())
        begin = stack.enter_context(progress(len(wanted), quiet=as_json and sys.stdout.isatty()))
        made = make_bundle(
            output,
            wanted,
            candidates=candidates,
            wheels=wheels or [],
            limit_bytes=int(limit * 2**20),
            processes=1 if len(wanted) * (1 + candidates) < MANY else machine().cores,
            begin=begin,
        )
    carried = sum(len(entry.candidates) for entry in made.entries)
    size = output.stat().st_size
    for line in made.failed:
        print("error:", " ".join(line.split()), file=sys.stderr)
    if as_json:
        entries = [
            {"workload": each.workload, "spec": each.spec.name, "target": each.target.name} for each in made.entries
        ]
        print_json({"path": str(output), "size_bytes": size, "candidates": carried, "entries": entries})
    else:
        print(f"{output}  ({len(made.entries)} kernels, {carried} candidates, {size / 2**20:.1f} MiB)")
    if made.failed:
        raise typer.Exit(FAILED)
