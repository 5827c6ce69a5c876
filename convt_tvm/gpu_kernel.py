"""Kernels for NVIDIA GPUs, called with torch's CUDA tensors: without copies, on torch's current stream."""

import ctypes
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convt_tvm import artifact
from convt_tvm.artifact import KERNEL_FILE, Manifest
from convt_tvm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactCorruptError,
    ArtifactError,
    IncompatibleMachineError,
)
from convt_tvm.gpu import Gpu

__all__ = ["GpuKernel", "load_gpu"]

_LIBRARIES = ("libcudart.so.13", "libtvm_runtime.so", "libtvm_runtime_cuda.so")
_VECTOR_BYTES = 16
"""Alignment of packed weights; those of `GpuKernel.pack` have it."""


class GpuKernel:
    """One compiled transposed convolution for GPUs, made by `load_gpu`.

    Attributes
    ----------
    spec, target, manifest, directory
        As of `convt_tvm.runtime.Kernel`.
    """

    __slots__ = ("__weakref__", "_convt", "_pack", "directory", "manifest", "spec", "target")

    def __init__(self, manifest: Manifest, directory: Path, module: Any) -> None:
        self.spec, self.target, self.manifest, self.directory = manifest.spec, manifest.target, manifest, directory
        try:
            self._convt, self._pack = module.get_function("convt"), module.get_function("pack")
        except AttributeError as error:
            raise ArtifactCorruptError(f"{directory / KERNEL_FILE} is no kernel: {error}; build it again.") from error

    def __repr__(self) -> str:
        return f"<GpuKernel {self.spec.name} for {self.target.key}, schedule {self.manifest.schedule!r}>"

    def __call__(self, input: Any, weight: Any, bias: Any = None, *, out: Any = None) -> Any:
        """Convolve on the GPU that holds the tensors; returns before it is done, as torch's operators do.

        Nothing is copied that is contiguous. Gradients are not recorded.

        Parameters
        ----------
        input, weight, bias, out
            As of `convt_tvm.runtime.Kernel`, on one GPU. A plain weight is packed first; ``out`` shares no memory with
            the others and is contiguous.

        Returns
        -------
        torch.Tensor
            ``out``, or a new one.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            For a tensor whose shape, dtype, device or layout is not what the kernel takes.
        IncompatibleMachineError
            If the tensors' GPU does not run the code.
        """
        import torch

        spec = self.spec
        if (bias is not None) != spec.bias:
            raise ArgumentError(f"bias is {'missing' if spec.bias else 'superfluous'}: the kernel is {spec.name}.")
        read = [self._ready("input", input, spec.input_shape, spec.dtype)]
        device = read[0].device
        self._require(device)
        with torch.cuda.device(device):
            if getattr(weight, "ndim", 0) == 5:
                packed = self._ready("packed weight", weight, self.manifest.packed_shape, self.manifest.packed_dtype)
                read.append(packed if packed.data_ptr() % _VECTOR_BYTES == 0 else packed.clone())
            else:
                read.append(self.pack(weight))
            if spec.bias:
                read.append(self._ready("bias", bias, spec.bias_shape, spec.dtype))
            if out is None:
                out = torch.empty(spec.output_shape, dtype=input.dtype, device=device)
            elif self._ready("out", out, spec.output_shape, spec.dtype).data_ptr() != out.data_ptr():
                raise ArgumentError(f"out has strides {tuple(out.stride())}; pass a contiguous tensor.")
            devices = {tensor.device for tensor in (*read, out)}
            if len(devices) > 1:
                raise ArgumentError(f"the tensors are on {', '.join(sorted(map(str, devices)))}; put them on one GPU.")
            if spec.n:
                self._convt(*read, out)
        return out

    def pack(self, weight: Any) -> Any:
        """Repack a plain weight on its GPU, once for many calls; a new tensor of ``manifest.packed_shape``."""
        import torch

        plain = self._ready("weight", weight, self.spec.weight_shape, self.spec.dtype)
        self._require(plain.device)
        with torch.cuda.device(plain.device):
            dtype = getattr(torch, self.manifest.packed_dtype)
            packed = torch.empty(self.manifest.packed_shape, dtype=dtype, device=plain.device)
            self._pack(plain, packed)
        return packed

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Publish a copy of the artifact, atomically."""
        artifact.copy(self.directory, Path(directory))

    def _ready(self, name: str, tensor: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """The same values, contiguous; raises for what the kernel does not take."""
        import torch

        if not isinstance(tensor, torch.Tensor):
            raise ArgumentTypeError(f"{name} must be a torch tensor on a GPU; found {type(tensor).__qualname__}.")
        found = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)} on {tensor.device}"
        if tuple(tensor.shape) != shape or tensor.dtype is not getattr(torch, dtype) or tensor.device.type != "cuda":
            raise ArgumentError(
                f"{name} must be {dtype} of shape {shape} on cuda; found {found}. The kernel was built for "
                f"{self.spec.name}; build one for these arguments."
            )
        return tensor.detach().resolve_neg().contiguous()

    def _require(self, device: Any) -> None:
        import torch

        gpu = Gpu(str(device), torch.cuda.get_device_capability(device))
        if not gpu.runs(self.target.gpu_archs):
            found = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
            raise IncompatibleMachineError(
                f"the kernel is for {', '.join(self.target.gpu_archs)}, and {device} is {found}; build it for that."
            )


def _places(directory: Path) -> Iterator[Path]:
    """Folders of the libraries: the installed apache-tvm, NVIDIA's packages, the toolkit, beside the kernel."""
    package = importlib.util.find_spec("tvm")
    yield from (Path(place) / "lib" for place in (package.submodule_search_locations or ())) if package else ()
    yield from Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib")
    yield from (Path("/usr/local/cuda/lib64"), directory)


def load_gpu(directory: str | os.PathLike[str]) -> GpuKernel:
    """Load an artifact for GPUs; needs no compiler, but torch for CUDA 13, and apache-tvm for its runtime libraries.

    Raises
    ------
    IncompatibleMachineError
        If there is no driver, too old a one, or no GPU that runs the code; before any library is opened.
    ArtifactError
        As `convt_tvm.artifact.verify`; if the artifact is not for GPUs; or if a library cannot be opened.
    """
    import tvm_ffi

    path = Path(directory).resolve()
    manifest = artifact.verify(path)
    if manifest.target.kind != "cuda":
        raise ArtifactError(f"the artifact {path} is for {manifest.target.name}; load it with convt_tvm.load.")
    try:
        manifest.target.require_host()
    except IncompatibleMachineError as error:
        raise IncompatibleMachineError(f"the artifact {path} cannot run here: {error}") from error
    _open_libraries(path)
    try:
        return GpuKernel(manifest, path, tvm_ffi.load_module(str(path / KERNEL_FILE)))
    except (RuntimeError, OSError) as error:
        raise ArtifactError(f"{path / KERNEL_FILE} cannot be opened: {str(error).strip().splitlines()[-1]}") from error


def _open_libraries(directory: Path) -> None:
    """Open NVIDIA's runtime (torch's own where there is torch) and TVM's for CUDA; raises ArtifactError."""
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    if importlib.util.find_spec("torch") is not None and "torch" not in sys.modules:
        importlib.import_module("torch")
    for name in _LIBRARIES:
        found = next((place / name for place in _places(directory) if (place / name).is_file()), Path(name))
        try:
            ctypes.CDLL(str(found), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ArtifactError(
                f"the kernel {directory} needs {name}, which cannot be opened ({error}); install torch for CUDA 13 or "
                "nvidia-cuda-runtime, and apache-tvm."
            ) from error
