"""Kernels for NVIDIA GPUs, called with torch's CUDA tensors: without copies, on torch's current stream."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

from convt_tvm.arguments import NUMPY, Kind, torch_kind
from convt_tvm.errors import ArgumentError, ArgumentTypeError, ArtifactError, IncompatibleMachineError
from convt_tvm.gpu import Gpu
from convt_tvm.kernel import Kernel
from convt_tvm.manifest import Manifest
from convt_tvm.spec import DTYPE_BYTES

__all__ = ["GpuKernel"]

_ALIGNMENT = 16
"""Bytes of the widest load; torch's own allocations have it, views into them may not."""


class GpuKernel(Kernel):
    """A `Kernel` for GPUs: made, packed, saved and called as any other, with torch tensors on one CUDA device.

    A call enqueues its launches on torch's current stream of that device and returns, as torch's operators do. It
    allocates through torch alone and waits for nothing, so CUDA graphs capture it; pack the weight, or call once,
    before the capture begins, as the first use of a device loads the code there. All tensors are on one device, and
    what does not start at a multiple of 16 bytes is copied first.
    """

    __slots__ = ("_accepted", "_cuda", "_sizes")

    def __init__(self, manifest: Manifest, directory: Path, module: Any) -> None:
        super().__init__(manifest, directory, module, parallel=False)
        if self._torch is None:
            raise ArtifactError(
                f"{directory} is for GPUs, and its kernel is called with torch's tensors; install torch."
            )
        torch = importlib.import_module("torch")
        self._torch = torch_kind(torch, "cuda", _ALIGNMENT)
        self._cuda = torch.cuda
        self._accepted: set[int] = set()
        spec = self.spec
        read = (
            (spec.input_shape, spec.dtype),
            (manifest.packed_shape, manifest.packed_dtype),
            (spec.bias_shape, spec.dtype),
            (spec.output_shape, spec.dtype),
        )
        self._sizes = tuple(prod(shape or (0,)) * DTYPE_BYTES[dtype] for shape, dtype in read)

    def __call__(self, input: Any, weight: Any, bias: Any = None, *, out: Any = None) -> Any:
        """Convolve on the GPU that holds the tensors; see `Kernel`."""
        with self._on_device_of(input):
            # As in `Kernel.__call__`; what the compiled entry cannot see here is alignment and overlap.
            fast = self._fast_type
            if (
                type(input) is fast
                and type(weight) is fast
                and (type(out) is fast or out is None)
                and (bias is None or type(bias) in self._bias_types)
                and weight.dim() == 5
                and not (input.is_neg() or weight.is_neg() or (out is not None and out.is_neg()))
                and not (bias is not None and bias.is_neg())
            ):
                arguments = (input, weight) if bias is None else (input, weight, bias)
                try:
                    result = input.new_empty(self.spec.output_shape) if out is None else out
                    if self._are_apart(arguments, result):
                        self._convt(*arguments, result)
                        return result
                except (BufferError, IndexError, RuntimeError, TypeError, ValueError):
                    pass
            return self._call_checked(input, weight, bias, out)

    def pack(self, weight: Any) -> Any:
        """Repack a weight on its GPU; see `Kernel`."""
        with self._on_device_of(weight):
            return super().pack(weight)

    def _are_apart(self, arguments: tuple[Any, ...], result: Any) -> bool:
        """Whether all start at multiples of the alignment and none shares memory with the result."""
        start: int = result.data_ptr()
        bits = start
        end = start + self._sizes[3]
        for tensor, size in zip(arguments, self._sizes, strict=False):
            address = tensor.data_ptr()
            bits |= address
            if address < end and start < address + size:
                return False
        return bits % _ALIGNMENT == 0

    def _on_device_of(self, tensor: Any) -> AbstractContextManager[Any]:
        """A context in which the tensor's GPU, which has to run the code, is torch's current one."""
        if not isinstance(tensor, self._tensor) or not tensor.is_cuda:
            # `check` of the kind says what is wrong.
            return nullcontext()
        index = tensor.get_device()
        if index not in self._accepted:
            self._accept(index)
        if index == self._cuda.current_device():
            return nullcontext()
        device: AbstractContextManager[Any] = self._cuda.device(index)
        return device

    def _accept(self, index: int) -> None:
        gpu = Gpu(self._cuda.get_device_name(index), self._cuda.get_device_capability(index))
        if not gpu.runs(self.target.gpu_archs):
            major, minor = gpu.capability
            raise IncompatibleMachineError(
                f"the kernel is for {', '.join(self.target.gpu_archs)}, and cuda:{index}, {gpu.name}, is "
                f"sm_{major}{minor}; build one for that."
            )
        self._accepted.add(index)

    def _kind(self, **arguments: Any) -> Kind:
        kind = super()._kind(**arguments)
        if kind is NUMPY:
            raise ArgumentTypeError(
                f"the arguments are numpy arrays, and the kernel for {self.target.name} takes torch tensors on cuda; "
                "pass torch.from_numpy(array).cuda()."
            )
        devices = {str(tensor.device) for tensor in arguments.values() if tensor is not None}
        if len(devices) > 1:
            raise ArgumentError(f"the tensors are on {', '.join(sorted(devices))}; put them on one GPU.")
        return kind
