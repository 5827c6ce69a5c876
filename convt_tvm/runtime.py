"""Loads an artifact, checks arguments, calls the kernel without copies.

Needs apache-tvm-ffi and numpy; imports no compiler. torch is used only if it is installed.
"""

import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from convt_tvm import artifact
from convt_tvm.errors import ArtifactError, IncompatibleMachineError
from convt_tvm.gpu_kernel import GpuKernel
from convt_tvm.kernel import Kernel
from convt_tvm.libraries import find_runtime, open_cuda, open_runtime
from convt_tvm.manifest import KERNEL_FILE, Manifest
from convt_tvm.processor import TILE_FEATURES
from convt_tvm.threads import get_num_threads, set_num_threads
from convt_tvm.tile_unit import require_tiles

__all__ = ["GpuKernel", "Kernel", "find_runtime", "get_num_threads", "load", "set_num_threads"]

# A kernel with parallel loops or large workspaces has weak slots of these names, which libtvm_runtime.so fills; called
# with an empty slot it jumps to address 0.
_RUNTIME_SLOTS = b"__TVMBackend"

_lock = threading.Lock()
_opened: dict[str, str] = {}


def load(directory: str | os.PathLike[str]) -> Kernel:
    """Load an artifact; needs no compiler and imports none.

    The manifest, the digest of every file, the architecture and the CPU features are verified before the library is
    opened. A kernel that uses threads or workspaces needs ``libtvm_runtime.so``: one that the process has already is
    used; else that of the installed apache-tvm, which is not imported (but must be the one that a later ``import tvm``
    opens: two copies in one process abort it); else one beside ``kernel.so``. Idempotent; libraries stay open as long
    as the process lives, also when the directory is replaced or removed.

    A kernel for GPUs is a `GpuKernel`. It needs torch, TVM's runtime libraries from the same places, and NVIDIA's
    ``libcudart.so.13``, which torch for CUDA 13 brings.

    Parameters
    ----------
    directory
        What `Kernel.save` wrote.

    Raises
    ------
    ArtifactNotFoundError
        (a FileNotFoundError) if the directory or one of its files, or the runtime library, does not exist.
    ArtifactCorruptError
        If the content is not what the manifest says.
    IncompatibleMachineError
        If the kernel was compiled for another architecture or for features this processor lacks; if there is no
        NVIDIA driver, too old a one, or no GPU that runs it. Before any library is opened.
    ArtifactError
        If the format is another version's, or a library cannot be opened.
    """
    path = Path(directory).resolve()
    manifest, content = artifact.read(path)
    try:
        manifest.target.require_host()
        if not TILE_FEATURES.isdisjoint(manifest.target.features):
            require_tiles()
    except IncompatibleMachineError as error:
        raise IncompatibleMachineError(f"the artifact {path} cannot run here: {error}") from error
    kernel = content[KERNEL_FILE]
    if manifest.target.kind == "cuda":
        with _lock:
            open_cuda(path)
            module = _open(path / KERNEL_FILE, kernel, manifest)
        return GpuKernel(manifest, path, module)
    parallel = _RUNTIME_SLOTS in kernel
    with _lock:
        if parallel:
            open_runtime(path)
        module = _open(path / KERNEL_FILE, kernel, manifest)
    return Kernel(manifest, path, module, parallel=parallel)


def _open(path: Path, data: bytes, manifest: Manifest) -> Any:
    """Open the library whose content was verified.

    The dynamic loader goes by names: asked for a name it has opened before, it gives the old library, whatever the file
    holds by now. So a name that has stood for other content is not used again; a private copy is.
    """
    name, digest = str(path), manifest.files[KERNEL_FILE]
    if name not in _opened:
        module = _dlopen(path)
        unchanged = path.is_file() and path.read_bytes() == data
        _opened[name] = digest if unchanged else ""
        if unchanged:
            return module
    elif _opened[name] == digest:
        return _dlopen(path)
    private = Path(tempfile.mkdtemp(prefix="convt_tvm_"))
    try:
        copy = private / KERNEL_FILE
        copy.write_bytes(data)
        return _dlopen(copy)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _dlopen(path: Path) -> Any:
    import tvm_ffi

    try:
        return tvm_ffi.load_module(str(path))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ArtifactError(f"{path} cannot be opened: {reason}; build it on this machine.") from error
