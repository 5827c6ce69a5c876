"""From generated CUDA C++ to machine code: finds nvcc, compiles for several architectures, reads what ptxas reports.

No TVM and no GPU is needed.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from convt_tvm.errors import BuildError

__all__ = ["Resources", "Toolkit", "compile_fatbin", "find_toolkit"]

_HEADERS = Path(__file__).parent / "cuda"
_INSTALL = (
    "install the CUDA toolkit 12.8 or newer and set CUDA_PATH to it, or `pip install nvidia-cuda-nvcc nvidia-cuda-crt "
    "nvidia-cuda-runtime nvidia-nvvm`"
)
_RESOURCE = re.compile(
    r"Compiling entry function '(?P<function>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, slots=True)
class Toolkit:
    """A CUDA toolkit: its compiler, its headers and its version."""

    nvcc: Path
    include: Path
    version: str


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel function takes on one architecture, as ptxas reports it.

    Attributes
    ----------
    function, arch
        Name of the function and architecture.
    registers
        Of a thread.
    shared_bytes
        Of a block.
    stack_bytes
        Of a thread, in local memory: arrays that did not become registers.
    spill_bytes
        Bytes stored to and loaded from local memory because registers did not suffice.
    """

    function: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def _candidates() -> Iterator[Path]:
    """Where nvcc may be, the likeliest first."""
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    yield from sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc"), reverse=True)
    yield Path("/usr/local/cuda/bin/nvcc")
    found = shutil.which("nvcc")
    if found:
        yield Path(found).resolve()


def find_toolkit() -> Toolkit:
    """The toolkit of $CUDA_PATH or $CUDA_HOME, of PyPI's packages, of /usr/local/cuda, or the one on the path.

    Raises
    ------
    BuildError
        If there is none.
    """
    for nvcc in _candidates():
        include = nvcc.parents[1] / "include"
        if nvcc.is_file() and (include / "cuda_runtime.h").is_file():
            done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
            version = re.search(r"release (\d+\.\d+)", done.stdout)
            if version:
                return Toolkit(nvcc, include, version[1])
    raise BuildError(f"compiling for CUDA needs nvcc, which was not found; {_INSTALL}.")


def compile_fatbin(code: str, archs: Sequence[str]) -> tuple[bytes, tuple[Resources, ...]]:
    """Machine code of CUDA C++ for each architecture, and PTX of the last for newer GPUs, in one fatbin.

    Without fast math: divisions, denormals and contractions are as in IEEE 754, except that multiply-adds are fused.

    Parameters
    ----------
    archs
        Such as ``("sm_80", "sm_90")``, ascending.

    Raises
    ------
    BuildError
        If there is no nvcc, or it refuses the code or an architecture.
    """
    toolkit = find_toolkit()
    virtual = [arch.replace("sm_", "compute_") for arch in archs]
    codes = [f"arch={compute},code={arch}" for compute, arch in zip(virtual, archs, strict=True)]
    codes.append(f"arch={virtual[-1]},code={virtual[-1]}")
    with TemporaryDirectory(prefix="convt-tvm-nvcc-") as directory:
        source, result = Path(directory, "kernel.cu"), Path(directory, "kernel.fatbin")
        source.write_text(code, encoding="utf-8")
        gencodes = [option for pair in codes for option in ("-gencode", pair)]
        options = ["--fatbin", "-O3", "-std=c++17", *gencodes, "-Xptxas", "-v", f"-I{_HEADERS}"]
        command: list[str | Path] = [toolkit.nvcc, *options, "-o", result, source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next(
                (line for line in done.stderr.splitlines() if "error" in line or "fatal" in line), done.stderr
            )
            raise BuildError(f"nvcc {toolkit.version} cannot compile for {', '.join(archs)}: {reason.strip()}")
        return result.read_bytes(), tuple(_read_report(done.stderr))


def _read_report(report: str) -> Iterable[Resources]:
    for found in _RESOURCE.finditer(report):
        shared = _SHARED.search(found["rest"])
        yield Resources(
            function=found["function"],
            arch=found["arch"],
            registers=int(found["registers"]),
            shared_bytes=int(shared[1]) if shared else 0,
            stack_bytes=int(found["stack"]),
            spill_bytes=int(found["stores"]) + int(found["loads"]),
        )
