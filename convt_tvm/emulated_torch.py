"""Torch's CUDA tensors where there is no GPU: a build of torch without CUDA sees the GPU of `convt_tvm.emulator`.

The tensors are torch's own, their memory is the emulator's, and kernels take them the way they take those of a GPU:
through DLPack's exchange, with torch's current stream, by TVM's CUDA runtime. What torch itself computes on them is
computed by its kernels for the CPU. Times say nothing.
"""

import ctypes
import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_map

from convt_tvm.emulator import compile_stand_in, load_stand_ins, show_gpu
from convt_tvm.errors import IncompatibleMachineError
from convt_tvm.gpu import EMULATED, find_driver

__all__ = ["emulated_gpu", "last_stream", "launches"]

_DEVICE_OFFSET = 8 + 8 + 8 + 8 + 8
"""Of the device in DLPack's DLManagedTensorVersioned: after version, context, deleter, flags and data."""
_CUDA = 2
_OVERRIDDEN = ("copy_", "fill_.Scalar", "zero_", "convolution", "_to_copy", "eq.Tensor", "ne.Tensor", "sub.Tensor")
"""Operators of torch that would go on with a kernel for CUDA, of which there is none, before the fallback is asked."""


def launches() -> int:
    """How many launches the emulator has seen."""
    return int(load_stand_ins().emu_launches())


def last_stream() -> int:
    """The stream of the last of them."""
    function = load_stand_ins().emu_last_stream
    function.restype = ctypes.c_void_p
    return function() or 0


class _Stream:
    """Stands in for torch.cuda.Stream."""

    _count = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        _Stream._count += 1
        self.cuda_stream = 16 * _Stream._count

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


class _Event:
    """Stands in for torch.cuda.Event: everything is done when it is recorded."""

    replayed_secs = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self._secs = 0.0

    def record(self, stream: Any = None) -> None:
        self._secs = perf_counter() + _Event.replayed_secs

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_Event") -> float:
        return (end._secs - self._secs) * 1e3


class _Graph:
    """Stands in for torch.cuda.CUDAGraph: what is captured runs then, and a replay passes the time that it took."""

    secs = 0.0

    def replay(self) -> None:
        _Event.replayed_secs += self.secs


@contextmanager
def emulated_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within this context torch, the driver and TVM see one GPU of this compute capability, named ``emulated``.

    Raises
    ------
    IncompatibleMachineError
        If torch is built for CUDA: it would ask a driver for more than there is.
    BuildError
        If there is no CUDA toolkit, whose headers the stand-ins need, or no g++.
    """
    if torch.version.cuda is not None:
        raise IncompatibleMachineError(
            f"a GPU is emulated for builds of torch without CUDA only, and this is {torch.__version__}; run without "
            "--emulate, or install torch from https://download.pytorch.org/whl/cpu."
        )
    load_stand_ins()
    extension = _extend_torch()
    current = [0]

    def set_stream(stream: Any) -> None:
        current[0] = stream
        extension.emu_set_stream(ctypes.c_void_p(stream.cuda_stream if stream else 0))

    default = _Stream()
    default.cuda_stream = 0

    @contextmanager
    def use_stream(stream: Any) -> Iterator[None]:
        before = current[0]
        set_stream(stream)
        try:
            yield
        finally:
            set_stream(before)

    @contextmanager
    def capture(graph: Any, stream: Any = None, **options: Any) -> Iterator[None]:
        runtime = ctypes.CDLL("libcudart.so.13")
        with use_stream(stream or _Stream()):
            runtime.cuda_emu_set_capturing(1)
            start = perf_counter()
            try:
                yield
            finally:
                graph.secs = perf_counter() - start
                runtime.cuda_emu_set_capturing(0)

    stand_ins: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_device_name": lambda device=None: EMULATED,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: SimpleNamespace(L2_cache_size=1 << 10),
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: current[0] or default,
        "stream": use_stream,
        "graph": capture,
        "Stream": _Stream,
        "Event": _Event,
        "CUDAGraph": _Graph,
    }
    with ExitStack() as stack:
        for name, value in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch._C, "_cuda_getDevice", lambda: 0, create=True))
        show_gpu(capability)
        stack.callback(find_driver.cache_clear)
        stack.callback(show_gpu, None)
        find_driver.cache_clear()
        yield


@functools.cache
def _extend_torch() -> ctypes.CDLL:
    """Give torch a guard, operators and an exchange of tensors for CUDA devices, once and for as long as it lives."""
    home = Path(torch.__file__).parent
    with TemporaryDirectory(prefix="convt-tvm-emulator-") as directory:
        path = Path(directory, "torch.so")
        compile_stand_in(
            "torch.cpp", path, "-O1", f"-I{home / 'include'}", "-Wl,--no-as-needed", f"-L{home / 'lib'}", "-lc10"
        )
        extension = ctypes.CDLL(str(path))
    pythonapi = ctypes.pythonapi
    pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
    pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    tensor: Any = torch.Tensor
    address = pythonapi.PyCapsule_GetPointer(tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    if extension.emu_take_exchange(ctypes.c_void_p(address)) != 0:
        raise OSError("the memory of torch's table of DLPack functions cannot be written to")

    library: Any = torch.library.Library
    fallback = library("_", "IMPL")
    fallback.fallback(_compute_on_cpu, "CUDA")
    operators = library("aten", "IMPL")
    operators.impl("empty.memory_format", _empty, "CUDA")
    operators.impl("empty_strided", _empty_strided, "CUDA")
    for overload in _OVERRIDDEN:
        packet, _, suffix = overload.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), suffix or "default")
        operators.impl(overload, functools.partial(_compute_on_cpu, operator), "CUDA")
    _KEPT.extend([fallback, operators])
    return extension


_KEPT: list[Any] = []
"""Registrations end with the objects that made them."""


def _compute_on_cpu(operator: Any, *arguments: Any, **options: Any) -> Any:
    """An operator of torch on tensors of the emulated GPU: the CPU's, on the same memory."""

    def here(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return _view(value.data_ptr(), value.shape, value.stride(), value.dtype, owner=value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def there(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        copy = _empty_strided(value.shape, value.stride(), dtype=value.dtype)
        here(copy).copy_(value)
        return copy

    result = operator(*tree_map(here, arguments), **tree_map(here, options))
    alias = next((returned.alias_info for returned in operator._schema.returns), None)
    if alias is not None:
        return arguments[0] if alias.is_write else tree_map(_on_gpu, result)
    wanted = options.get("device")
    return result if wanted is not None and wanted.type == "cpu" else tree_map(there, result)


def _empty(size: Sequence[int], *, dtype: Any = None, memory_format: Any = None, **options: Any) -> torch.Tensor:
    like = torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format, device="meta")
    return _empty_strided(size, like.stride(), dtype=like.dtype)


def _empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **options: Any) -> torch.Tensor:
    dtype = dtype or torch.get_default_dtype()
    address = ctypes.c_void_p()
    runtime = ctypes.CDLL("libcudart.so.13")
    # Torch's own allocator, unlike cudaMalloc, goes on while a graph is captured.
    runtime.cuda_emu_allocate(ctypes.byref(address), ctypes.c_size_t(_span(size, stride) * dtype.itemsize or 1))
    if address.value is None:
        raise torch.OutOfMemoryError(f"the emulated GPU has no memory left for a tensor of shape {tuple(size)}")
    owner = _Memory()
    weakref.finalize(owner, runtime.cudaFree, address)
    return _on_gpu(_view(address.value, size, stride, dtype, owner))


class _Memory:
    """Lives as long as some tensor over an allocation."""


def _span(size: Sequence[int], stride: Sequence[int]) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0


def _view(address: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, owner: Any) -> torch.Tensor:
    """A CPU tensor over memory of the emulated GPU, which keeps its owner alive."""
    span = _span(size, stride)
    if not span:
        return torch.empty_strided(size, stride, dtype=dtype)
    memory: Any = (ctypes.c_byte * (span * dtype.itemsize)).from_address(address)
    memory.owner = owner
    return torch.frombuffer(memory, dtype=dtype, count=span).as_strided(size, stride)


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor on cuda:0."""
    capsule = tensor.__dlpack__(max_version=(1, 0))
    address = ctypes.pythonapi.PyCapsule_GetPointer(capsule, b"dltensor_versioned")
    ctypes.c_int32.from_address(address + _DEVICE_OFFSET).value = _CUDA
    return torch._C._from_dlpack(capsule)
