"""The command ``convt-tvm``: parses, calls one function, prints.

Results go to stdout, errors and progress to stderr. Exit codes: 0 done, 1 failed work, 2 bad usage, 3 a regression, 130
interrupted. What a command needs is imported when it runs, so that help and mistakes are answered at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, NoReturn

import typer

from convt_tvm import cli_bench, cli_bundle, cli_check, cli_tune
from convt_tvm.cli_options import (
    FAILED,
    INTERRUPTED,
    USAGE,
    ChannelsLast,
    Dtype,
    Json,
    TargetName,
    Workloads,
    choose,
    each,
    print_json,
    stop_if_interrupted,
)
from convt_tvm.errors import BundleError, ConvTError, SpecError, TargetError, UnknownWorkloadError

__all__ = ["app", "main"]

_USAGE_ERRORS = (UnknownWorkloadError, TargetError, SpecError, BundleError)

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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code; an expected error is one line on stderr.

    Parameters
    ----------
    arguments
        Those of the process by default.
    """
    try:
        app(arguments, prog_name="convt-tvm")
    except ConvTError as error:
        _complain(str(error))
        raise SystemExit(USAGE if isinstance(error, _USAGE_ERRORS) else FAILED) from None
    except OSError as error:
        # Without the number that Python begins with.
        _complain(str(error).removeprefix(f"[Errno {error.errno}] "))
        raise SystemExit(FAILED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    raise SystemExit(0)


def _complain(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from convt_tvm.machine import package_versions

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


app.command(short_help="Build, run, compare with torch and float64.")(cli_check.check)


@app.command(short_help="Compile kernels ahead of time.")
def build(
    workloads: Workloads,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the artifact directories go.")],
    target: TargetName = "llvm",
    dtype: Dtype = None,
    channels_last: ChannelsLast = False,
    with_runtime: Annotated[
        bool, typer.Option("--with-runtime", help="Add TVM's runtime library, for machines without apache-tvm.")
    ] = False,
    test: Annotated[
        bool, typer.Option("--test", help="Record in the manifest that the same bits come out on every run.")
    ] = False,
    tuning_logs: Annotated[
        bool, typer.Option("--tuning-logs/--no-tuning-logs", help="Use what sessions on this machine found.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Compile kernels ahead of time, each to a directory of its own inside DIR.

    Prints the directory, its size and the build time of each. An artifact that is there already is replaced in one
    step. Exits with 1 if one could not be built; the others are. With --json, one line a workload.
    """
    chosen, compiled_for = choose(workloads, target, dtype=dtype, channels_last=channels_last)
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def work(workload: Any) -> None:
        spec = workload.spec
        row = {"workload": workload.name, "spec": spec.name, "target": compiled_for.for_dtype(spec.dtype).name}
        try:
            row |= _build_one(spec, compiled_for, output, with_runtime=with_runtime, tuned=tuning_logs, test=test)
        except Exception as error:  # recorded as this row's status, so that the others are still built
            text = " ".join(str(error).split())
            row["error"] = text if isinstance(error, ConvTError) else f"{type(error).__name__}: {text}"
        rows.append(row)
        if as_json:
            print_json(row)
        elif row["error"] is None:
            size = f"{row['size_bytes'] / 1024:.0f} KiB"
            print(f"{row['path']}  ({workload.name}, {size}, built in {row['build_secs']:.2f} s)", flush=True)

    finished = each(chosen, work, len(chosen), quiet=sys.stdout.isatty())
    failed = [row for row in rows if row["error"] is not None]
    for row in failed:
        _complain(f"{row['workload']}: {row['error']}")
    stop_if_interrupted(finished, len(rows), len(chosen))
    if failed:
        raise typer.Exit(FAILED)


def _build_one(spec: Any, target: Any, output: Path, *, with_runtime: bool, tuned: bool, test: bool) -> dict[str, Any]:
    """Publish one artifact, which need not run here unless it is tested; returns what is printed about it."""
    from convt_tvm import artifact, runtime
    from convt_tvm.compiler import build_artifact
    from convt_tvm.manifest import RUNTIME_FILE

    with TemporaryDirectory(prefix="convt-tvm-build-") as temporary:
        built, final = Path(temporary) / "built", Path(temporary) / "final"
        start = perf_counter()
        build_artifact(spec, target, built, tuned=tuned)
        build_secs = perf_counter() - start
        extra = {RUNTIME_FILE: runtime.find_runtime(built)} if with_runtime else {}
        # The runtime library and what was tested change the digest, and with it the name.
        tested = _test_repeats(built, tuned) if test else None
        directory = output / artifact.copy(built, final, extra=extra, tested=tested).name
        artifact.copy(final, directory)
    size = sum(path.stat().st_size for path in directory.iterdir())
    return {"path": str(directory), "size_bytes": size, "build_secs": build_secs, "error": None}


def _test_repeats(directory: Path, tuned: bool) -> dict[str, Any]:
    """What the manifest says of an artifact that gives the same bits again and again."""
    from functools import partial

    from convt_tvm import runtime
    from convt_tvm.compiler import build as build_kernel
    from convt_tvm.determinism import confirm_repeats
    from convt_tvm.machine import machine

    kernel = runtime.load(directory)
    make = partial(build_kernel, target=kernel.target, tuned=tuned)
    return confirm_repeats(kernel, make, threads=sorted({1, machine().cores}))


app.command(short_help="Search for the fastest schedules.")(cli_tune.tune)
app.command(short_help="Time kernels against other libraries.")(cli_bench.bench)
app.command(short_help="Turn stored rows into tables and plots.")(cli_bench.report)
app.command(short_help="Show phases, limits and the choice of a schedule.")(cli_bench.explain)


app.command(short_help="Pack kernels and their measurement for another machine.")(cli_bundle.bundle)


@app.command(short_help="Verify an artifact and show its manifest.")
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show an artifact's manifest, after verifying every file against it."""
    from convt_tvm import artifact
    from convt_tvm.manifest import MANIFEST_FILE
    from convt_tvm.store import SESSIONS
    from convt_tvm.terminal import print_facts

    if (directory / SESSIONS).is_file():
        raise typer.BadParameter(f"{directory} is a tuning log; `convt-tvm report --session {directory}` shows it.")
    manifest = artifact.verify(directory)
    sizes = {name: (directory / name).stat().st_size for name in (*manifest.files, MANIFEST_FILE)}
    try:
        manifest.target.require_host()
        obstacle = ""
    except ConvTError as error:
        obstacle = str(error)
    if as_json:
        values = {"path": str(directory), "runs_here": not obstacle, "size_bytes": sizes}
        print_json(values | {"manifest": manifest.to_json()})
        return
    spec, target = manifest.spec, manifest.target
    facts = {
        "artifact": manifest.name,
        "computes": f"{spec.shapes} {spec.dtype}",
        "spec": spec.name,
        "target": f"{target.kind} {target.arch}",
        "features": ", ".join(target.features) or "none",
        "runs here": f"no: {obstacle}" if obstacle else "yes",
        "schedule": manifest.schedule,
        "layout": ", ".join(f"{key}={value}" for key, value in manifest.layout.items()),
        "tuning": _describe_tuning(manifest.tuning),
        "tested": f"same bits: {', '.join(manifest.tested['same_bits'])}" if manifest.tested else "no",
        "packed": f"{'x'.join(map(str, manifest.packed_shape))} {manifest.packed_dtype}",
        "built with": ", ".join(f"{name} {version or '(none)'}" for name, version in manifest.versions.items()),
        "digest": manifest.digest,
    }
    for taken in manifest.resources:
        facts[f"{taken['function']} {taken['arch']}"] = (
            f"{taken['registers']} registers, {taken['shared_bytes']:,} bytes shared, {taken['stack_bytes']:,} stack, "
            f"{taken['spill_bytes']:,} spilled"
        )
    described = {**facts, **{name: f"{size:,} bytes, verified" for name, size in sizes.items()}}
    print_facts(described.items())


def _describe_tuning(tuning: Any) -> str:
    """Which stored result chose the schedule, and why others did not."""
    result = tuning.get("result")
    if result is None:
        lines = ["none: the cost rule chose the schedule"]
    else:
        lines = [
            f"session {result['session']} of {result['date'][:10]} on machine {result['machine']} with "
            f"{result['threads']} threads: {result['median_us']:.4g} us, the default {result['default_us']:.4g} us"
        ]
    return "\n".join([*lines, *(f"ignored: {reason}" for reason in tuning.get("ignored", []))])


@app.command(short_help="Look for what is missing or broken.")
def doctor(as_json: Json = False) -> None:
    """Look for what is missing, what is known to break, and whether the compiler computes the right thing.

    Exits with 1 if something that matters is broken.
    """
    from convt_tvm.cache import cache_directory
    from convt_tvm.doctor import diagnose
    from convt_tvm.terminal import print_findings, progress

    findings = []
    with progress(1, quiet=as_json and sys.stdout.isatty()) as begin:
        begin("looking at versions, then running the compiler")
        for finding in diagnose(cache_directory()):
            findings.append(finding)
    is_bad = any(finding.status == "bad" for finding in findings)
    if as_json:
        print_json({"healthy": not is_bad, "findings": [finding.to_json() for finding in findings]})
    else:
        print_findings(findings)
    if is_bad:
        raise typer.Exit(FAILED)
