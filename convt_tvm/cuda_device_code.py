"""What TVM compiles device code with: for GPUs with nvcc, or for the emulator."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tvm
import tvm_ffi

from convt_tvm.cuda_toolkit import Resources, compile_fatbin
from convt_tvm.emulator import compile_emulated, load_stand_ins, shows_gpu
from convt_tvm.errors import BuildError
from convt_tvm.target import Target
from convt_tvm.tensor_intrinsics import use_instructions

__all__ = ["device_compiler"]

_CREATE = "ffi.Module.create.cuda"
_CALLBACK = "tvm_callback_cuda_compile"


def _require_device_modules() -> None:
    """See to it that TVM makes modules of machine code, for which it needs its CUDA runtime library loaded.

    That library needs NVIDIA's driver and runtime; where they are missing, TVM has silently gone on without it and
    would put source code into a kernel. Stand-ins are good enough for compiling.
    """
    if tvm.get_global_func(_CREATE, allow_missing=True) is not None:
        return
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    load_stand_ins()
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BuildError(f"{library} cannot be opened: {error}; reinstall apache-tvm.") from error


@contextmanager
def device_compiler(target: Target, emulated: bool) -> Iterator[list[Resources]]:
    """Within this context TVM compiles CUDA C++ for the GPUs of `target`; the list fills with what ptxas reports.

    Parameters
    ----------
    emulated
        Compile for the emulator instead, which reports nothing; so does a process that sees the emulated GPU.

    Raises
    ------
    BuildError
        If nvcc, its headers or g++ are missing.
    """
    _require_device_modules()
    resources: list[Resources] = []

    def compile_code(generated: str) -> bytearray:
        code = use_instructions(generated)
        if emulated or shows_gpu():
            return bytearray(compile_emulated(code))
        content, found = compile_fatbin(code, target.gpu_archs)
        resources.extend(found)
        return bytearray(content)

    before: Callable[[str], bytearray] | None = tvm.get_global_func(_CALLBACK, allow_missing=True)
    tvm_ffi.register_global_func(_CALLBACK, compile_code, override=True)
    try:
        yield resources
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(_CALLBACK)
        else:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)
