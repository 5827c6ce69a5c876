"""The shared libraries that kernels need besides themselves: found, and opened once a process.

None is linked: a kernel takes what is in the process when it is loaded.
"""

import ctypes
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from convt_tvm.errors import ArtifactError, ArtifactNotFoundError
from convt_tvm.manifest import RUNTIME_FILE

__all__ = ["CUDA_RUNTIME_FILE", "carried", "find_runtime", "open_cuda", "open_runtime"]

CUDA_RUNTIME_FILE = "libtvm_runtime_cuda.so"
"""TVM's part for GPUs, beside `convt_tvm.artifact.RUNTIME_FILE`."""
_NVIDIA_RUNTIME_FILE = "libcudart.so.13"


def carried() -> Path:
    """Where a copy of this package has TVM's runtime libraries with it, as that of a bundle does."""
    return Path(__file__).parent / "lib"


def _places(directory: Path) -> list[Path]:
    """Folders of TVM's runtime libraries: the installed apache-tvm, this package, beside the kernel."""
    package = importlib.util.find_spec("tvm")
    installed = [Path(place) / "lib" for place in (package.submodule_search_locations or ())] if package else []
    return [*installed, carried(), directory]


def find_runtime(directory: Path) -> Path:
    """Where TVM's runtime library is: in the installed apache-tvm, or else beside the kernel."""
    for place in _places(directory):
        if (place / RUNTIME_FILE).is_file():
            return place / RUNTIME_FILE
    raise ArtifactNotFoundError(
        f"the kernel {directory} needs {RUNTIME_FILE}, which is neither beside it nor in an installed apache-tvm; "
        "install apache-tvm, or save the kernel with with_runtime=True where it is installed."
    )


def open_runtime(directory: Path) -> None:
    """Open TVM's thread pool and allocator, unless the process has them; raises as `find_runtime` and ArtifactError."""
    import tvm_ffi

    if tvm_ffi.get_global_func("runtime.NumThreads", allow_missing=True) is not None:
        return
    path = find_runtime(directory)
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be opened: {error}.") from error


def _nvidia_places() -> Iterator[Path]:
    yield from Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib")
    yield Path("/usr/local/cuda/lib64")


def open_cuda(directory: Path) -> None:
    """Open NVIDIA's runtime library (torch's own where there is torch) and TVM's for CUDA; raises ArtifactError."""
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    if importlib.util.find_spec("torch") is not None and "torch" not in sys.modules:
        importlib.import_module("torch")
    ours = _places(directory)
    for name, places in (
        (_NVIDIA_RUNTIME_FILE, _nvidia_places()),
        (RUNTIME_FILE, ours),
        (CUDA_RUNTIME_FILE, ours),
    ):
        found = next((place / name for place in places if (place / name).is_file()), Path(name))
        try:
            ctypes.CDLL(str(found), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ArtifactError(
                f"the kernel {directory} needs {name}, which cannot be opened ({error}); install torch for CUDA 13 or "
                "nvidia-cuda-runtime, and apache-tvm."
            ) from error
