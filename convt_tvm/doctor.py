"""What this machine has, what it lacks, and whether the compiler in it computes the right thing."""

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

from convt_tvm.cuda_toolkit import find_toolkit
from convt_tvm.errors import BuildError, TargetError
from convt_tvm.gpu import OLDEST_CUDA_DRIVER, find_driver
from convt_tvm.machine import machine
from convt_tvm.target import Target

__all__ = ["PINS", "Finding", "Status", "diagnose"]

Status: TypeAlias = Literal["ok", "note", "bad"]

PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
"""The versions that are known to work together."""

_OLDEST_TVM = (0, 27)
_CRASHING_FFI = ("0.1.15.post1", "0.1.15.post2")
_RUNTIME_LIBRARY = "libtvm_runtime.so"
_COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")
_REPLAY_TIMEOUT_SECS = 180


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    name
        What it is.
    status
        ``ok``; ``note``: worth knowing, but what is installed works; ``bad``: something that matters is broken.
    found
        What was found, with values.
    advice
        What to do about it; empty if there is nothing to do.
    """

    name: str
    status: Status
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        """The fields as JSON values."""
        return asdict(self)


def diagnose(cache_directory: Path) -> Iterator[Finding]:
    """Look at one thing after the other; nothing is created outside a temporary directory.

    The compiler runs in a process of its own, so that its crash is a finding too.

    Parameters
    ----------
    cache_directory
        Where compiled kernels are kept.
    """
    here = machine()
    versions = here.versions
    yield Finding("python", "ok", f"{here.python} on {here.os}")
    yield _examine_processor(f"{here.cpu}, {here.cores} core{'s' if here.cores > 1 else ''}")
    yield from _examine_versions(versions)
    yield _examine_runtime_library(versions["apache-tvm"] is not None)
    yield _examine_linker()
    yield from _examine_cuda()
    yield _examine_cache(cache_directory)
    if versions["apache-tvm"] is not None:
        yield from _replay_in_a_child()


def _examine_processor(description: str) -> Finding:
    try:
        target = Target.parse("llvm")
    except TargetError as error:
        return Finding("processor", "bad", f"{description}: {error}")
    found = f"{description}; kernels use {', '.join(target.features) or 'the baseline instructions only'}"
    if target.arch == "x86_64" and target.vector_bytes < 32:
        return Finding("processor", "note", found, "Kernels use 128-bit vectors; a processor with AVX2 is much faster.")
    return Finding("processor", "ok", found)


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 27) of 0.27.0.post1."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _examine_versions(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    for name, pin in PINS.items():
        install = f"pip install {name}=={pin}"
        version = versions[name]
        if version == pin:
            yield Finding(name, "ok", version)
        elif version is None:
            if name == "apache-tvm":
                consequence = "saved kernels load and run, but none can be built"
                yield Finding(name, "note", f"not installed: {consequence}", f"To build kernels: {install}")
            else:
                yield Finding(name, "bad", "not installed: no kernel can be loaded", install)
        elif name == "apache-tvm" and _release(version) < _OLDEST_TVM:
            reason = "before 0.27 it compiles floordiv and floormod indices to wrong code (apache/tvm#19524)"
            yield Finding(name, "bad", f"{version}: {reason}", install)
        elif name == "apache-tvm-ffi" and version in _CRASHING_FFI:
            yield Finding(name, "bad", f"{version}: tvm.ir.save_json of a function crashes with it", install)
        else:
            yield Finding(name, "note", f"{version}: not tried; {pin} is known to work", install)
    if versions["numpy"] is None:
        yield Finding("numpy", "bad", "not installed: no kernel can be loaded", "pip install numpy")
    else:
        yield Finding("numpy", "ok", versions["numpy"])
    if versions["torch"] is None:
        consequence = "kernels take numpy arrays, but there is no check, no functional and no nn"
        yield Finding("torch", "note", f"not installed: {consequence}", "pip install 'torch>=2.6,<2.14'")
    else:
        yield Finding("torch", "ok", versions["torch"])


def _examine_runtime_library(has_tvm: bool) -> Finding:
    """The library that kernels with parallel loops need; without apache-tvm an artifact may bring its own."""
    package = importlib.util.find_spec("tvm") if has_tvm else None
    places = package.submodule_search_locations or [] if package is not None else []
    found = next((path for place in places if (path := Path(place) / "lib" / _RUNTIME_LIBRARY).is_file()), None)
    if found is not None:
        return Finding(_RUNTIME_LIBRARY, "ok", str(found))
    consequence = "kernels that use threads load only if it lies beside them"
    if has_tvm:
        install = f"pip install --force-reinstall apache-tvm=={PINS['apache-tvm']}"
        return Finding(_RUNTIME_LIBRARY, "bad", f"missing from the installed apache-tvm: {consequence}", install)
    advice = "Build with `convt-tvm build --with-runtime`, or install apache-tvm."
    return Finding(_RUNTIME_LIBRARY, "note", f"not installed: {consequence}", advice)


def _examine_linker() -> Finding:
    """The program that TVM calls to link kernel.so: $CXX, $CC, or the first compiler on the path."""
    wanted = os.environ.get("CXX") or os.environ.get("CC")
    path = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, _COMPILERS)), None)
    if path is not None:
        return Finding("linker", "ok", path)
    missing = f"$CXX or $CC names {wanted!r}, which is not there" if wanted else f"none of {', '.join(_COMPILERS)}"
    return Finding(
        "linker", "bad", f"{missing}: kernels cannot be linked", "apt-get install gcc, or set CXX to a compiler"
    )


def _examine_cuda() -> Iterator[Finding]:
    """What compiling for NVIDIA GPUs and running there need; nobody has to have either."""
    try:
        toolkit = find_toolkit()
        yield Finding("cuda toolkit", "ok", f"nvcc {toolkit.version}: {toolkit.nvcc}")
    except BuildError as error:
        yield Finding("cuda toolkit", "note", "none: kernels for GPUs cannot be built", str(error))
    driver = find_driver()
    if driver is None or not driver.gpus:
        lacks = "no driver" if driver is None else "a driver and no GPU"
        yield Finding("gpu", "note", f"{lacks}: kernels for GPUs run on the emulator only (check --emulate)")
        return
    gpus = ", ".join(f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})" for gpu in driver.gpus)
    found = f"{gpus}, driver for CUDA {driver.cuda[0]}.{driver.cuda[1]}"
    if driver.cuda < OLDEST_CUDA_DRIVER:
        yield Finding("gpu", "bad", f"{found}: kernels need 13.0", "Install NVIDIA's driver 580 or newer.")
    else:
        yield Finding("gpu", "ok", found)


def _examine_cache(directory: Path) -> Finding:
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        return Finding(
            "cache", "note", f"{directory} cannot be written", "Set CONVT_TVM_CACHE_DIR to a directory that can."
        )
    if nearest != directory:
        return Finding("cache", "ok", f"{directory} (not created yet)")
    kernels = [path for path in directory.iterdir() if path.is_dir()]
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    count = f"{len(kernels)} kernel{'' if len(kernels) == 1 else 's'}"
    return Finding("cache", "ok", f"{directory}: {count}, {size / 2**20:.1f} MiB")


def _replay_in_a_child() -> Iterator[Finding]:
    """Run `replay` in a process of its own and pass its findings on; a crash becomes one."""
    command = [sys.executable, "-c", "from convt_tvm.doctor import replay; replay()"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_REPLAY_TIMEOUT_SECS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding(
            "compiler", "bad", f"no answer within {_REPLAY_TIMEOUT_SECS} s", "Run it again on an idle machine."
        )
        return
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield Finding(**json.loads(line))
    if done.returncode < 0:
        crash = f"crashed with {signal.Signals(-done.returncode).name}"
    elif done.returncode > 0:
        crash = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    else:
        return
    yield Finding("compiler", "bad", crash, f"pip install {' '.join(f'{name}=={pin}' for name, pin in PINS.items())}")


def replay() -> None:
    """Print one finding a line, as JSON, for each known defect of the compiler; imports it.

    Each case is one that compiled to wrong code, or crashed, in some version of TVM.
    """
    cases: dict[str, Callable[[], Finding]] = {
        "conv2d_transpose with output_padding": _replay_output_padding,
        "iter_map_simplify": _replay_simplifier,
        "link and load": _replay_link,
        "save_json": _replay_save_json,
    }
    for name, case in cases.items():
        try:
            finding = case()
        except Exception as error:  # recorded as this case's status
            text = " ".join(str(error).split())[-300:]
            finding = Finding(name, "bad", f"{type(error).__name__}: {text}")
        print(json.dumps(finding.to_json()), flush=True)


def _declare_output_padding() -> Any:
    """Declare the layer of apache/tvm#19524 with TVM's own operator library."""
    from tvm import te, topi

    input = te.placeholder((1, 16, 7, 7), "float32", name="input")
    weight = te.placeholder((16, 3, 3, 3), "float32", name="weight")
    output = topi.nn.conv2d_transpose_nchw(input, weight, (2, 2), (1, 1), "float32", (1, 1))
    return te.create_prim_func([input, weight, output]).with_attr("global_symbol", "main")


def _fuse_and_split(function: Any) -> Any:
    """Schedule it as the report did, with the grid of a GPU as a parallel loop."""
    import tvm
    from tvm import s_tir

    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    for name in ("data_dilate", "data_pad", "kernel_transform"):
        schedule.compute_inline(schedule.get_sblock(name))
    block = schedule.get_sblock("compute")
    # 64 does not divide the 588 outputs, so the index is predicated, which is where the simplifier went wrong.
    outer, _ = schedule.split(schedule.fuse(*schedule.get_loops(block)[:4]), [None, 64])
    schedule.parallel(outer)
    schedule.decompose_reduction(block, schedule.get_loops(block)[2])
    return schedule.mod["main"]


def _replay_output_padding() -> Finding:
    import numpy as np
    import tvm

    values = np.random.default_rng(0)
    input = values.integers(-4, 5, (1, 16, 7, 7)).astype("float32")
    weight = values.integers(-4, 5, (16, 3, 3, 3)).astype("float32")
    full = np.zeros((1, 3, 16, 16), "float32")
    for row in range(3):
        for column in range(3):
            taps = np.einsum("nihw,io->nohw", input, weight[:, :, row, column])
            full[:, :, row : row + 13 : 2, column : column + 13 : 2] += taps
    expected = full[:, :, 1:15, 1:15]

    plain = _declare_output_padding()
    wrong = {}
    for name, function in {"unscheduled": plain, "fused and split": _fuse_and_split(plain)}.items():
        library = tvm.compile(tvm.IRModule({"main": function}), target=Target.parse("llvm").to_tvm())
        output = tvm.runtime.tensor(np.full_like(expected, np.nan))
        library["main"](tvm.runtime.tensor(input), tvm.runtime.tensor(weight), output)
        wrong[name] = int((output.numpy() != expected).sum())
    title = "apache/tvm#19524"
    if any(wrong.values()):
        counts = ", ".join(f"{count} of {expected.size} outputs {name}" for name, count in wrong.items())
        return Finding(title, "bad", f"wrong code: {counts}", f"pip install apache-tvm=={PINS['apache-tvm']}")
    return Finding(title, "ok", "conv2d_transpose with output_padding is right, unscheduled and fused")


def _replay_simplifier() -> Finding:
    from tvm import tirx
    from tvm.ir import Range
    from tvm.sym import Analyzer, iter_map_simplify

    n = tirx.Var("n", "int32")
    (simplified,) = iter_map_simplify([tirx.floordiv(n % 4 + 2, 4)], {n: Range(0, 16)})
    wrong = 0
    for value in range(16):
        analyzer = Analyzer()
        analyzer.bind(n, tirx.const(value, "int32"))
        wrong += int(analyzer.simplify(simplified)) != (value % 4 + 2) // 4
    title = "iter_map_simplify"
    if wrong:
        found = f"(n % 4 + 2) // 4 becomes {simplified}, wrong for {wrong} of 16 values: known, worked around"
        return Finding(title, "note", found)
    return Finding(title, "ok", "(n % 4 + 2) // 4 is simplified to the same values")


def _replay_link() -> Finding:
    import tvm
    import tvm_ffi

    library = tvm.compile(tvm.IRModule({"main": _declare_output_padding()}), target=Target.parse("llvm").to_tvm())
    with TemporaryDirectory(prefix="convt-tvm-doctor-") as directory:
        path = Path(directory) / "kernel.so"
        library.export_library(str(path))
        tvm_ffi.load_module(str(path))
        size = path.stat().st_size
    return Finding("link and load", "ok", f"a library of {size / 1024:.0f} KiB for {platform.machine()}")


def _replay_save_json() -> Finding:
    import tvm
    import tvm_ffi

    function = _declare_output_padding()
    restored = tvm.ir.load_json(tvm.ir.save_json(function))
    same = bool(tvm_ffi.structural_equal(function, restored))
    found = "a function survives the round trip" if same else "a function changes in the round trip"
    return Finding("save_json", "ok" if same else "bad", found)
