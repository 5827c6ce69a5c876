"""Runs generated CUDA kernels on the CPU, thread by thread, to check them where there is no GPU.

The CUDA C++ that would go to nvcc is compiled as C++ instead (`compile_emulated`), and called through TVM's own host
code and CUDA runtime, under which lie stand-ins for NVIDIA's driver and runtime (`load_stand_ins`). ``driver.cpp`` says
what is emulated and which mistakes show. It is exact and slow: some 10 million multiply-adds a second, and more
on tensor cores.
"""

import atexit
import ctypes
import re
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from convt_tvm.cuda_toolkit import find_toolkit
from convt_tvm.errors import BuildError

__all__ = ["compile_emulated", "compile_stand_in", "load_stand_ins", "set_descending", "show_gpu", "shows_gpu"]

_SOURCES = Path(__file__).parent / "emulated"
_DEVICE_SOURCES = Path(__file__).parent / "cuda"
_TRAPS = ("-fsanitize=bounds", "-fsanitize-undefined-trap-on-error")
"""An index outside of an array of known size, on the stack or in shared memory, ends the launch."""
_DEVICE_OPTIONS = ("-O1", "-fno-strict-aliasing", *_TRAPS)
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(([^)]*)\)\s*\{')
_MAGIC = b"convt-tvm emulated kernel\0"


def _compile(source: Path, library: Path, *options: str | Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError("the CUDA stand-ins need g++; install it, for example `apt-get install g++`.")
    command: list[str | Path] = [compiler, "-w", "-std=c++17", "-fPIC", *options]
    command += [f"-I{path}" for path in (_SOURCES, _DEVICE_SOURCES, find_toolkit().include)]
    command += [source, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"g++ cannot compile {source.name}: {done.stderr.strip()[:1000]}")


def compile_stand_in(source: str, library: Path, *options: str) -> None:
    """Compile a file of ``emulated/`` as a library; raises BuildError."""
    _compile(_SOURCES / source, library, "-shared", *options)


@cache
def load_stand_ins() -> ctypes.CDLL:
    """Open stand-ins for libcuda.so.1 and libcudart.so.13, once a process; libraries opened later find them by name.

    Raises
    ------
    BuildError
        If there is no toolkit whose headers they need, or no g++.
    """
    with TemporaryDirectory(prefix="convt-tvm-emulator-") as directory:
        opened = []
        for source, name, *options in (
            ("driver.cpp", "libcuda.so.1", str(_SOURCES / "devices.cpp")),
            ("runtime.cpp", "libcudart.so.13", f"-Wl,--version-script={_SOURCES / 'runtime.map'}"),
        ):
            library = Path(directory, name)
            compile_stand_in(source, library, "-O2", f"-Wl,-soname,{name}", *options)
            opened.append(ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL))
    return opened[0]


_shown: list[tuple[int, int]] = []


def show_gpu(capability: tuple[int, int] | None) -> None:
    """Let the driver's stand-in show a GPU of this compute capability to whoever asks, or none, as at first."""
    load_stand_ins().emu_show_gpu(10 * capability[0] + capability[1] if capability else 0)
    _shown[:] = [capability] if capability else []


def shows_gpu() -> bool:
    """Whether this process sees the emulated GPU; what it compiles for GPUs is for that one then."""
    return bool(_shown)


@cache
def _device_header() -> str:
    """A directory, kept as long as this process, with ``device.h`` compiled: it takes longer than most kernels."""
    directory = tempfile.mkdtemp(prefix="convt-tvm-emulator-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    _compile(_SOURCES / "device.h", Path(directory, "device.h.gch"), *_DEVICE_OPTIONS, "-x", "c++-header")
    return directory


def set_descending(descending: bool) -> None:
    """Run the threads of a block in descending order, or in ascending one as at first."""
    load_stand_ins().emu_set_descending(int(descending))


def compile_emulated(code: str) -> bytes:
    """CUDA C++ as TVM generates it, compiled for the emulator.

    Raises
    ------
    BuildError
        If it holds what the emulator does not know.
    """
    with TemporaryDirectory(prefix="convt-tvm-emulated-") as directory:
        source, library = Path(directory, "kernel.cpp"), Path(directory, "kernel.so")
        source.write_text(_translate(code), encoding="utf-8")
        _compile(source, library, "-shared", *_DEVICE_OPTIONS, "-I", _device_header())
        content = library.read_bytes()
    return _MAGIC + struct.pack("<Q", len(content)) + content


def _translate(code: str) -> str:
    """C++ for g++: shared arrays are poisoned when a block begins, and each kernel gets an entry of one signature."""
    code = re.sub(r"#ifdef __CUDACC_RTC__.*?#else(.*?)#endif", r"\1", code, count=1, flags=re.DOTALL)
    code = re.sub(r"#if !defined\(__CUDA_ARCH__\).*?#endif // __CUDA_ARCH__ >= 530", "", code, flags=re.DOTALL)
    shared = r"__shared__\s+alignas\((\d+)\)\s+([\w ]+?)\s+(\w+)\[(\d+)\];"
    code = re.sub(shared, r"alignas(\1) static \2 \3[\4]; emu_poison(\3, sizeof(\3));", code)
    code = re.sub(r"\*\((\w+)\*\)\((\w+) \+ ", r"*emu_vector<\1>(\2, ", code)
    if re.search(r"\basm\b|__asm__|extern __shared__", code):
        raise BuildError("the emulator knows neither inline assembly nor shared memory sized at the launch.")
    entries = []
    for found in _KERNEL.finditer(code):
        parameters = [re.sub(r"__restrict__", "", text).strip() for text in found[2].split(",") if text.strip()]
        types = [re.sub(r"\s*\w+$", "", parameter) for parameter in parameters]
        values = ", ".join(f"*({type_}*)arguments[{index}]" for index, type_ in enumerate(types))
        entries.append(f'extern "C" void emu_{found[1]}(void** arguments) {{ {found[1]}({values}); }}')
    return "\n".join(['#include "device.h"', code, *entries, ""])
