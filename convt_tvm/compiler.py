"""From a spec to a compiled kernel."""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.support import cc
from tvm_ffi import structural_hash

from convt_tvm.artifact import publish
from convt_tvm.backends import code_generator, get_backend
from convt_tvm.batches import join_kernels
from convt_tvm.cpu_code import compile_library
from convt_tvm.database import find_result
from convt_tvm.entry import guard_arguments, take_shapes
from convt_tvm.errors import BuildError
from convt_tvm.fingerprint import source_fingerprint
from convt_tvm.layout import Layout
from convt_tvm.machine import package_versions
from convt_tvm.manifest import KERNEL_FILE, Manifest
from convt_tvm.records import Candidate, Result
from convt_tvm.runtime import Kernel, load
from convt_tvm.space import Choice, declared, default_choice, find_choice, rest_choices
from convt_tvm.spec import CONTIGUOUS, MEMORY_ORDER, ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = [
    "Lowered",
    "Stored",
    "best_choice",
    "build",
    "build_artifact",
    "compile_module",
    "find_stored",
    "lower_choice",
    "lower_schedule",
    "schedule_choice",
    "trace_json",
    "trace_text",
]

MAX_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class Lowered:
    """A scheduled kernel and its packing, ready to compile.

    Attributes
    ----------
    module
        The functions ``convt`` and ``pack``.
    trace
        Instructions and decisions of the schedule, as MetaSchedule writes them.
    code
        Sixteen digits that are equal where the same code would be compiled.
    """

    module: tvm.IRModule
    trace: list[Any]
    code: str


def build(
    spec: ConvTranspose2dSpec, target: str | Target = "llvm", *, choice: Choice | None = None, tuned: bool = True
) -> Kernel:
    """A kernel for `spec`, compiled now and loaded; its files live in a temporary directory as long as it does.

    Parameters
    ----------
    target
        ``llvm`` for this processor, or what else `Target.parse` reads. The kernel of a target with features that this
        machine lacks cannot be loaded here; compile it with `build_artifact`.
    choice, tuned
        As for `build_artifact`.

    Raises
    ------
    TargetError
        If `target` names nothing this package compiles for.
    IncompatibleMachineError
        If this machine lacks a feature of `target`.
    BuildError
        If compiling or linking fails.

    Examples
    --------
    >>> import numpy as np
    >>> spec = ConvTranspose2dSpec(n=1, ci=2, ih=2, iw=2, co=1, kernel_size=2, stride=2, bias=False)
    >>> kernel = build(spec)
    >>> kernel(np.ones((1, 2, 2, 2), "float32"), np.ones((2, 1, 2, 2), "float32"))[0, 0, 0]
    array([2., 2., 2., 2.], dtype=float32)
    """
    resolved = Target.parse(target).for_dtype(spec.dtype)
    resolved.require_host()
    directory = Path(tempfile.mkdtemp(prefix="convt-tvm-"))
    try:
        build_artifact(spec, resolved, directory / spec.name, choice=choice, tuned=tuned, lasting=False)
        kernel = load(directory / spec.name)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    weakref.finalize(kernel, shutil.rmtree, directory, ignore_errors=True)
    return kernel


def build_artifact(
    spec: ConvTranspose2dSpec,
    target: str | Target,
    directory: Path,
    *,
    choice: Choice | None = None,
    tuned: bool = True,
    lasting: bool = True,
) -> Manifest:
    """Compile `spec` for `target` and publish it as `directory`.

    `convt_tvm.artifact.publish` says what that promises. Runs without loading what it compiled, so `target` need not
    be this machine.

    Parameters
    ----------
    choice
        The schedule and layout. By default those of the stored tuning result, if `tuned`, there is one for this
        machine and its schedule is still the same code; otherwise what the cost rule finds cheapest. The manifest's
        ``tuning`` names the result, or says why one does not apply.
    lasting
        False for a directory that this process, or who started it, removes again; see `convt_tvm.artifact.publish`.

    Raises
    ------
    TargetError, BuildError, ArtifactError
        Before anything is written to `directory`.
    """
    resolved = Target.parse(target).for_dtype(spec.dtype)
    # An empty batch computes nothing, but its kernel packs weights like any other.
    filled = replace(spec, n=1) if spec.n == 0 else spec
    if spec.n is None and resolved.kind != "llvm":
        raise BuildError(f"{spec.name}: kernels for {resolved.kind} are for one batch size; give n.")
    if spec.is_channels_last and resolved.kind != "llvm":
        raise BuildError(
            f"{spec.name}: kernels for {resolved.kind} read and write NCHW; give memory_format={CONTIGUOUS!r}."
        )
    with tempfile.TemporaryDirectory(prefix="convt-tvm-") as scratch:
        library = Path(scratch) / KERNEL_FILE
        try:
            stored = Stored()
            if choice is None and tuned and spec.n is not None:
                stored = find_stored(filled, resolved)
            choice = choice or stored.choice or default_choice(filled, resolved)
            _check_indexable(declared(filled, resolved).sized, choice.layout)
            lowered = stored.lowered or lower_choice(filled, resolved, choice)
            resources = compile_module(lowered.module, resolved, library)
        except BuildError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise BuildError(f"{spec.name} could not be built for {resolved.name}: {reason}") from error
        return publish(
            directory,
            spec=spec,
            target=resolved,
            schedule=choice.space.name,
            layout=choice.layout.to_json(),
            trace=lowered.trace,
            packed_shape=choice.layout.packed_shape(spec),
            packed_dtype=choice.layout.packed_dtype(spec),
            versions=package_versions(),
            fingerprint=source_fingerprint(),
            tuning={"code": lowered.code, **stored.summary()},
            resources=resources,
            files={KERNEL_FILE: library},
            lasting=lasting,
        )


@dataclass(frozen=True)
class Stored:
    """The stored tuning result that `build` would use, its schedule lowered, and why others do not apply."""

    result: Result | None = None
    choice: Choice | None = None
    lowered: Lowered | None = None
    ignored: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """What the manifest says; empty where nothing is stored."""
        if self.result is not None:
            return {"result": self.result.summary(), "ignored": list(self.ignored)}
        return {"ignored": list(self.ignored)} if self.ignored else {}


def find_stored(
    spec: ConvTranspose2dSpec, target: Target, *, threads: int | None = None, logs: Path | None = None
) -> Stored:
    """What `convt_tvm.database.find_result` finds, as long as its schedule still lowers to the code measured."""
    found = find_result(spec, target, threads=threads, logs=logs)
    result = found.result
    if result is None:
        return Stored(ignored=found.ignored)
    choice = find_choice(spec, target, result.candidate)
    lowered = None if choice is None else lower_choice(spec, target, choice)
    if lowered is not None and lowered.code == result.digest:
        return Stored(result, choice, lowered, found.ignored)
    why = "is no candidate any more" if lowered is None else "is other code by now"
    return Stored(
        ignored=(*found.ignored, f"the result of session {result.session} is for {result.candidate}, which {why}")
    )


def best_choice(spec: ConvTranspose2dSpec, target: Target, *, threads: int, logs: Path) -> Choice:
    """What `build` would take with so many threads and these logs; raises BuildError if no space applies."""
    return find_stored(spec, target, threads=threads, logs=logs).choice or default_choice(spec, target)


def _check_indexable(spec: ConvTranspose2dSpec, layout: Layout) -> None:
    """Raise BuildError if a tensor or a buffer has more elements than a 32-bit index can tell apart."""
    elements = _elements(spec, layout) | {"packed weight": prod(layout.packed_shape(spec))}
    for name, count in elements.items():
        if count > MAX_ELEMENTS:
            raise BuildError(
                f"the {name} of {spec.name} has {count} elements; kernels count to {MAX_ELEMENTS}: split the batch or "
                f"the channels."
            )


def _elements(spec: ConvTranspose2dSpec, layout: Layout) -> dict[str, int]:
    """How large everything is that grows with the batch."""
    return {
        "input": prod(spec.input_shape),
        "window of the input": layout.window_elements(spec),
        "output": prod(spec.output_shape),
    }


def lower_choice(spec: ConvTranspose2dSpec, target: Target, choice: Choice) -> Lowered:
    """Declare `spec` in the layout of `choice`, schedule and lower it; TVM's own errors pass through.

    For any batch size along with `rest_choices`, which have no part in the trace.
    """
    rest = [(each.layout, schedule_choice(spec, target, each)) for each in rest_choices(spec, target, choice)]
    return lower_schedule(schedule_choice(spec, target, choice), spec, choice.layout, target, rest)


def schedule_choice(spec: ConvTranspose2dSpec, target: Target, choice: Choice) -> Schedule:
    """The phase form declared in the layout of `choice` and scheduled; TVM's own errors pass through."""
    sch = Schedule(get_backend(choice.layout).declare_phases(declared(spec, target), choice.layout, target))
    choice.space.space(sch)
    return sch


def trace_text(spec: ConvTranspose2dSpec, target: Target, candidate: Candidate) -> str:
    """The steps of a stored candidate's schedule as Python, or a line that says why there are none."""
    choice = find_choice(spec, target, candidate)
    if choice is None:
        return f"{candidate} is no candidate of this version."
    return f"# {candidate}\n{schedule_choice(spec, target, choice).trace}"


def lower_schedule(
    sch: Schedule,
    spec: ConvTranspose2dSpec,
    layout: Layout,
    target: Target,
    rest: Sequence[tuple[Layout, Schedule]] = (),
) -> Lowered:
    """A scheduled phase form and the packing of its layout, lowered; TVM's own errors pass through.

    With those for the `rest` of a batch of any size, see `convt_tvm.batches`.
    """
    backend, own = get_backend(layout), declared(spec, target)
    pack = Schedule(backend.declare_pack(own, layout, target))
    backend.schedule_pack(pack)
    kernels = {each.image_block: backend.lower_kernel(one.mod["main"]) for each, one in [(layout, sch), *rest]}
    kernel = join_kernels(kernels) if rest else kernels[layout.image_block]
    module = tvm.IRModule({**kernel.functions, **backend.lower_pack(pack.mod["main"]).functions})
    if own != spec:
        shapes = _shapes(spec, layout)
        module = tvm.IRModule({name: take_shapes(function, shapes) for name, function in module.functions.items()})
    code = f"{structural_hash(module) % 2**64:016x}"
    if target.kind == "llvm":
        # A tile that is not filled counts like one that is.
        images = layout.image_block
        max_batch = MAX_ELEMENTS // max(_elements(own.with_batch(images), layout).values()) * images
        guarded = {name: guard_arguments(function, max_batch) for name, function in module.functions.items()}
        module = tvm.IRModule(guarded)
    return Lowered(module, trace_json(sch), code)


def _shapes(spec: ConvTranspose2dSpec, layout: Layout) -> dict[str, Sequence[int]]:
    """Shapes of what a kernel and its packing take, axes in the order of memory; of any batch size for one image."""
    one = spec.sized
    images = {"input": (one.input_axes, one.input_shape), "output": (one.output_axes, one.output_shape)}
    return {
        **{name: [shape[axis] for axis in MEMORY_ORDER[axes]] for name, (axes, shape) in images.items()},
        "weight": spec.weight_shape,
        "packed": layout.packed_shape(spec),
    }


def compile_module(
    module: tvm.IRModule, target: Target, library: Path, *, emulated: bool = False
) -> list[dict[str, Any]]:
    """Compile and link a lowered module into the shared object `library`.

    Parameters
    ----------
    emulated
        For `convt_tvm.emulator` instead of GPUs; for the target kind ``cuda`` only.

    Returns
    -------
    list
        What each function takes of each GPU architecture (`convt_tvm.cuda_toolkit.Resources`), as JSON values; empty
        for processors.

    Raises
    ------
    BuildError
        If there is no linker, or no CUDA compiler for GPUs; TVM's own errors pass through.
    """
    if cc.get_cc() is None:
        raise BuildError("linking needs a C++ compiler; install g++ or clang, for example `apt-get install g++`.")
    if target.kind == "llvm":
        compile_library(module, target, library)
        return []
    tvm_target = target.to_tvm()
    with code_generator(target, emulated) as resources, tvm_target:
        tvm.compile(module, target=tvm_target).export_library(str(library))
        return [found.to_json() for found in resources]


def trace_json(sch: Schedule) -> list[Any]:
    """Instructions and decisions of the schedule, as MetaSchedule writes them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [plain(item) for item in value]
        if isinstance(value, tirx.IntImm | tirx.FloatImm):
            return value.value
        return value if value is None or isinstance(value, int | float | str) else str(value)

    trace: list[Any] = plain(sch.trace.as_json())
    return trace
