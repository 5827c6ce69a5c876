"""What a kernel needs to know and do about its arguments: one class for torch tensors, one for numpy arrays."""

import ctypes
from math import prod
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from convt_tvm.errors import ArgumentError
from convt_tvm.huge_pages import anonymous_memory
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

__all__ = ["NUMPY", "Kind", "torch_kind"]

# The struct DLManagedTensorVersioned of DLPack 1: two 32-bit version numbers, context, deleter, flags; then DLTensor:
# data, device (type, id), number of dimensions, dtype (code, bits, lanes).
_DTYPE_CODE_OFFSET = 8 + 8 + 8 + 8 + 8 + 8 + 4
_BFLOAT = 4


class Kind(Protocol):
    """One kind of argument; tensors handed to the methods after `check` are of this kind."""

    name: str

    def check(self, name: str, tensor: Any, shape: tuple[int, ...], dtype: str, spec: ConvTranspose2dSpec) -> None:
        """Raise ArgumentError unless the tensor has this shape and dtype and is in the memory that the kernel reads."""

    def check_writable(self, name: str, tensor: Any) -> None:
        """Raise ArgumentError unless results can be written to the tensor."""

    def is_direct(self, tensor: Any) -> bool:
        """Whether the memory holds the values row-major, and starts where the kernel can read."""

    def ready(self, tensor: Any) -> Any:
        """The same values for which `is_direct` holds: the tensor's own memory where possible, else a copy."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Make a new one, row-major; ``like`` tells how the kind names the dtype."""

    def lasting(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """As `empty`, for what many calls will read."""

    def permuted(self, tensor: Any, axes: tuple[int, ...]) -> Any:
        """View it with its axes in this order."""

    def overlaps(self, first: Any, second: Any) -> bool:
        """Whether two for which `is_direct` holds may share memory."""

    def copy(self, source: Any, out: Any) -> None:
        """Write the values of one to the memory of the other, whatever its strides."""

    def pass_on(self, tensor: Any) -> Any:
        """View memory for which `is_direct` holds in the form that compiled functions take."""


def _found(
    name: str, wanted: tuple[int, ...], dtype: str, found: str, spec: ConvTranspose2dSpec, device: str = "cpu"
) -> ArgumentError:
    return ArgumentError(
        f"{name} must be {dtype} of shape {wanted} on {device}; found {found}. The kernel was built for {spec.name}; "
        "build one for these arguments."
    )


class _TorchTensors:
    name = "torch tensor"

    def __init__(self, torch: ModuleType, device: str, alignment: int) -> None:
        self.torch = torch
        self.device = device
        self.alignment = alignment

    def check(self, name: str, tensor: Any, shape: tuple[int, ...], dtype: str, spec: ConvTranspose2dSpec) -> None:
        torch = self.torch
        if tensor.layout is not torch.strided:
            raise _found(name, shape, dtype, f"a tensor of layout {tensor.layout}", spec, self.device)
        same = tuple(tensor.shape) == shape and tensor.dtype is getattr(torch, dtype)
        if not same or tensor.device.type != self.device:
            found = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)} on {tensor.device}"
            raise _found(name, shape, dtype, found, spec, self.device)
        try:
            memory = tensor.untyped_storage().device.type
        except RuntimeError:
            memory = "none"
        if memory != self.device:
            raise ArgumentError(
                f"{name} has no memory: it is a {type(tensor).__name__} inside a torch.func transform, a fake tensor "
                "mode or a compiler's trace; call the kernel on ordinary tensors."
            )

    def check_writable(self, name: str, tensor: Any) -> None:
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ArgumentError(
                f"{name} has strides {tuple(tensor.stride())}: several elements share one place in memory; pass a "
                "tensor that is not expanded."
            )

    def is_direct(self, tensor: Any) -> bool:
        return bool(tensor.is_contiguous() and not tensor.is_neg() and tensor.data_ptr() % self.alignment == 0)

    def ready(self, tensor: Any) -> Any:
        tensor = tensor.detach()
        if self.is_direct(tensor):
            return tensor
        return tensor.clone(memory_format=self.torch.contiguous_format)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=like.device)

    def lasting(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        memory = anonymous_memory(prod(shape) * DTYPE_BYTES[dtype]) if self.device == "cpu" else None
        if memory is None:
            return self.empty(shape, dtype, like)
        return self.torch.frombuffer(memory, dtype=getattr(self.torch, dtype)).view(shape)

    def permuted(self, tensor: Any, axes: tuple[int, ...]) -> Any:
        return tensor.permute(axes)

    def overlaps(self, first: Any, second: Any) -> bool:
        start, other = first.data_ptr(), second.data_ptr()
        return bool(start < other + second.nbytes and other < start + first.nbytes)

    def copy(self, source: Any, out: Any) -> None:
        out.detach().copy_(source)

    def pass_on(self, tensor: Any) -> Any:
        return tensor


_NAMES = {np.dtype(name): name for name in ("float32", "float64", "float16")}


def _dtype_name(array: Any) -> str | None:
    """`ConvTranspose2dSpec`'s name of the dtype, None if it has none; byte-swapped ones have none."""
    dtype = array.dtype
    return _NAMES.get(dtype) or ("bfloat16" if dtype.name == "bfloat16" and dtype.isnative else None)


def _numpy_dtype(name: str, like: Any) -> Any:
    """The dtype of the name; numpy has none for bfloat16 but that of an array."""
    return like.dtype if _dtype_name(like) == name else np.dtype(name)


class _NumpyArrays:
    name = "numpy array"

    def check(self, name: str, array: Any, shape: tuple[int, ...], dtype: str, spec: ConvTranspose2dSpec) -> None:
        if array.shape != shape or _dtype_name(array) != dtype:
            swapped = "" if array.dtype.isnative else " (byte-swapped)"
            raise _found(name, shape, dtype, f"{array.dtype.name}{swapped} of shape {array.shape} on cpu", spec)

    def check_writable(self, name: str, array: Any) -> None:
        if not array.flags.writeable:
            raise ArgumentError(f"{name} is a read-only array; pass one that can be written to.")

    def is_direct(self, array: Any) -> bool:
        return bool(array.flags.c_contiguous)

    def ready(self, array: Any) -> Any:
        return array if self.is_direct(array) else np.array(array, order="C", subok=False)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return np.empty(shape, dtype=_numpy_dtype(dtype, like))

    def lasting(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        memory = anonymous_memory(prod(shape) * DTYPE_BYTES[dtype])
        if memory is None:
            return self.empty(shape, dtype, like)
        return np.frombuffer(memory, dtype=_numpy_dtype(dtype, like)).reshape(shape)

    def permuted(self, array: Any, axes: tuple[int, ...]) -> Any:
        return array.transpose(axes)

    def overlaps(self, first: Any, second: Any) -> bool:
        return np.may_share_memory(first, second)

    def copy(self, source: Any, out: Any) -> None:
        out[...] = source

    def pass_on(self, array: Any) -> Any:
        import tvm_ffi

        if array.dtype in _NAMES:
            return tvm_ffi.from_dlpack(array.__dlpack__(max_version=(1, 0)))
        # numpy exports no dtype that it does not define itself: export the bits, then name the dtype.
        capsule = array.view(np.uint16).__dlpack__(max_version=(1, 0))
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address = pointer(capsule, b"dltensor_versioned")
        ctypes.c_uint8.from_address(address + _DTYPE_CODE_OFFSET).value = _BFLOAT
        return tvm_ffi.from_dlpack(capsule)


NUMPY: Kind = _NumpyArrays()
"""Numpy arrays, those of ml_dtypes.bfloat16 included."""


def torch_kind(torch: ModuleType, device: str = "cpu", alignment: int = 1) -> Kind:
    """Torch tensors, of the module given: this one does not import it.

    Parameters
    ----------
    device
        Type of the devices whose memory the kernel reads and writes.
    alignment
        Bytes at whose multiples it wants tensors to start.
    """
    return _TorchTensors(torch, device, alignment)
