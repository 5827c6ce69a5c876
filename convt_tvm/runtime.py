"""Loads an artifact, checks arguments, calls the kernel without copies.

Needs apache-tvm-ffi and numpy; imports no compiler. torch is used only if it is installed.
"""

import ctypes
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from convt_tvm import artifact
from convt_tvm.artifact import KERNEL_FILE, RUNTIME_FILE, Manifest
from convt_tvm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactCorruptError,
    ArtifactError,
    ArtifactNotFoundError,
    IncompatibleMachineError,
)
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import host_architecture

__all__ = ["Kernel", "get_num_threads", "load", "set_num_threads"]

# A kernel with parallel loops or large workspaces has weak slots of these names, which libtvm_runtime.so fills; called
# with an empty slot it jumps to address 0.
_RUNTIME_SLOTS = b"__TVMBackend"
_CPU = Path("/sys/devices/system/cpu")
_SHARE_ALL_CPUS = -3

# The struct DLManagedTensorVersioned of DLPack 1: two 32-bit version numbers, context, deleter, flags; then DLTensor:
# data, device (type, id), number of dimensions, dtype (code, bits, lanes).
_DLPACK_DTYPE_CODE_OFFSET = 8 + 8 + 8 + 8 + 8 + 8 + 4
_DLPACK_BFLOAT = 4

_lock = threading.Lock()
_opened: dict[str, str] = {}


def _found(name: str, wanted: tuple[int, ...], dtype: str, found: str, spec: ConvTranspose2dSpec) -> ArgumentError:
    return ArgumentError(
        f"{name} must be {dtype} of shape {wanted} on cpu; found {found}. The kernel was built for {spec.name}; build "
        "one for these arguments."
    )


class _Torch:
    """What a kernel needs to know and do about torch tensors."""

    name = "torch tensor"

    def __init__(self, torch: ModuleType) -> None:
        self.torch = torch

    def check(self, name: str, tensor: Any, shape: tuple[int, ...], dtype: str, spec: ConvTranspose2dSpec) -> None:
        torch = self.torch
        if tensor.layout is not torch.strided:
            raise _found(name, shape, dtype, f"a tensor of layout {tensor.layout}", spec)
        if tuple(tensor.shape) != shape or tensor.dtype is not getattr(torch, dtype) or tensor.device.type != "cpu":
            found = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)} on {tensor.device}"
            raise _found(name, shape, dtype, found, spec)
        try:
            address = tensor.data_ptr()
        except RuntimeError:
            address = 0
        if address == 0 and tensor.numel():
            raise ArgumentError(
                f"{name} has no memory: it is a {type(tensor).__name__} inside a torch.func transform, a fake tensor "
                "mode or a compiler's trace; call the kernel on ordinary tensors."
            )

    def check_writable(self, name: str, tensor: Any) -> None:
        if tensor.requires_grad:
            raise ArgumentError(f"{name} requires grad, and kernels record no gradients; pass {name}.detach().")
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ArgumentError(
                f"{name} has strides {tuple(tensor.stride())}: several elements share one place in memory; pass a "
                "tensor that is not expanded."
            )

    def is_direct(self, tensor: Any) -> bool:
        return bool(tensor.is_contiguous() and not tensor.is_neg() and tensor.data_ptr() % tensor.element_size() == 0)

    def ready(self, tensor: Any) -> Any:
        """The values as a contiguous, aligned tensor without gradient: the same memory where possible."""
        tensor = tensor.detach().resolve_neg()
        if self.is_direct(tensor):
            return tensor
        return tensor.clone(memory_format=self.torch.contiguous_format)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype))

    def overlaps(self, first: Any, second: Any) -> bool:
        start, other = first.data_ptr(), second.data_ptr()
        return bool(start < other + second.nbytes and other < start + first.nbytes)

    def copy(self, source: Any, out: Any) -> None:
        out.copy_(source)

    def pass_on(self, tensor: Any) -> Any:
        """The tensor in the form that the compiled function takes."""
        return tensor


class _Numpy:
    """What a kernel needs to know and do about numpy arrays."""

    name = "numpy array"

    def check(self, name: str, array: Any, shape: tuple[int, ...], dtype: str, spec: ConvTranspose2dSpec) -> None:
        if array.shape != shape or array.dtype.name != dtype or not array.dtype.isnative:
            found = array.dtype.name if array.dtype.isnative else f"{array.dtype.str} (byte-swapped)"
            raise _found(name, shape, dtype, f"{found} of shape {array.shape} on cpu", spec)

    def check_writable(self, name: str, array: Any) -> None:
        if not array.flags.writeable:
            raise ArgumentError(f"{name} is a read-only array; pass one that can be written to.")

    def is_direct(self, array: Any) -> bool:
        return bool(array.flags.c_contiguous and array.flags.aligned)

    def ready(self, array: Any) -> Any:
        return array if self.is_direct(array) else np.array(array, order="C", subok=False)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return np.empty(shape, dtype=like.dtype if like.dtype.name == dtype else np.dtype(dtype))

    def overlaps(self, first: Any, second: Any) -> bool:
        return np.may_share_memory(first, second)

    def copy(self, source: Any, out: Any) -> None:
        out[...] = source

    def pass_on(self, array: Any) -> Any:
        """A view of the memory that the compiled function takes, read-only arrays and bfloat16 included."""
        import tvm_ffi

        if array.dtype.name != "bfloat16":
            return tvm_ffi.from_dlpack(array.__dlpack__(max_version=(1, 0)))
        # numpy exports no dtype that it does not define itself: export the bits, then name the dtype.
        capsule = array.view(np.uint16).__dlpack__(max_version=(1, 0))
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address = pointer(capsule, b"dltensor_versioned")
        ctypes.c_uint8.from_address(address + _DLPACK_DTYPE_CODE_OFFSET).value = _DLPACK_BFLOAT
        return tvm_ffi.from_dlpack(capsule)


_NUMPY = _Numpy()


class Kernel:
    """One compiled transposed convolution, called with torch tensors or numpy arrays.

    Made by `load` and `convt_tvm.build`. Calls are thread-safe; they release the interpreter lock while they compute.

    Attributes
    ----------
    spec
        The `ConvTranspose2dSpec` it computes.
    target
        The `Target` it was compiled for.
    manifest
        The whole `Manifest`: schedule, trace, versions, digests.
    directory
        Where it was loaded from.
    """

    __slots__ = (
        "__weakref__",
        "_convt",
        "_fast_types",
        "_mask",
        "_owner",
        "_pack",
        "_parallel",
        "_shapes",
        "_sizes",
        "_tensor",
        "_torch",
        "directory",
        "manifest",
        "spec",
        "target",
    )

    def __init__(
        self, manifest: Manifest, directory: Path, module: Any, *, parallel: bool, owner: object = None
    ) -> None:
        spec = manifest.spec
        self.spec = spec
        self.target = manifest.target
        self.manifest = manifest
        self.directory = directory
        self._owner = owner
        self._parallel = parallel
        try:
            self._convt = module.get_function("convt")
            self._pack = module.get_function("pack")
        except AttributeError as error:
            raise ArtifactCorruptError(f"{directory / KERNEL_FILE} is no kernel: {error}; build it again.") from error
        shapes = spec.input_shape, manifest.packed_shape, spec.bias_shape, spec.output_shape
        dtypes = spec.dtype, manifest.packed_dtype, spec.dtype, spec.dtype
        self._shapes = shapes
        self._sizes = tuple(prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in zip(shapes, dtypes, strict=True))
        self._mask = DTYPE_BYTES[spec.dtype] - 1 | DTYPE_BYTES[manifest.packed_dtype] - 1
        # apache-tvm-ffi has imported torch by now, if there is one.
        torch = sys.modules.get("torch")
        self._torch = None if torch is None else _Torch(torch)
        self._tensor = None if torch is None else torch.Tensor
        self._fast_types = () if torch is None or not spec.n else (torch.Tensor, torch.nn.Parameter)

    def __repr__(self) -> str:
        return (
            f"<Kernel {self.spec.name} for {self.target.name}, schedule {self.manifest.schedule!r}, packed weight "
            f"{self.manifest.packed_dtype}{list(self.manifest.packed_shape)}, from {str(self.directory)!r}>"
        )

    def __call__(self, input: Any, weight: Any, bias: Any = None, *, out: Any = None) -> Any:
        """Convolve; all arguments are torch tensors on the CPU, or all are numpy arrays.

        Nothing is copied that is contiguous (row-major) and aligned to its element; what is not is copied first.
        Gradients are not recorded: an argument that requires them is read as its ``detach()``.

        Parameters
        ----------
        input
            ``spec.input_shape`` (NCHW), ``spec.dtype``.
        weight
            ``spec.weight_shape`` (IOHW), ``spec.dtype``, which is packed first, on each call; or what `pack` returned.
        bias
            ``spec.bias_shape``, ``spec.dtype``; given if and only if ``spec.bias``.
        out
            Where the result goes, ``spec.output_shape`` (NCHW), ``spec.dtype``; it may overlap the others or be
            strided, for the price of a temporary. Torch's version counter of it does not advance.

        Returns
        -------
        torch.Tensor or numpy.ndarray
            ``out``, or a new one that the caller owns: row-major, ``spec.output_shape``, ``spec.dtype``.

        Raises
        ------
        ArgumentError
            (a ValueError and a RuntimeError) for a wrong shape, dtype, device or layout, a bias missing or superfluous,
            or an ``out`` that cannot be written to.
        ArgumentTypeError
            (a TypeError) for anything that is neither tensor nor array, and for a mixture of both.
        """
        tensor = self._tensor
        if type(out) is tensor and type(input) is tensor and type(weight) in self._fast_types and weight.dim() == 5:
            result = self._call_fast(input, weight, bias, out)
            if result is not None:
                return result
        return self._call_checked(input, weight, bias, out)

    def _call_fast(self, input: Any, packed: Any, bias: Any, out: Any) -> Any:
        """Compute if all arguments can be passed as they are; otherwise return None, having written nothing.

        The compiled entry checks number, type, dtype, shape, strides and device of its arguments before it starts. What
        it cannot see is tested here: alignment, overlap, negation that is still to be done, gradients.
        """
        try:
            start, x, w = out.data_ptr(), input.data_ptr(), packed.data_ptr()
            x_size, w_size, b_size, size = self._sizes
            stop = start + size
            if (
                (x < stop and start < x + x_size)
                or (w < stop and start < w + w_size)
                or (start | x | w) & self._mask
                or out.requires_grad
                or input.is_neg()
                or packed.is_neg()
                or out.is_neg()
            ):
                return None
            if bias is None:
                if self._parallel and _pool.generation != _generation:
                    _configure_pool()
                self._convt(input, packed, out)
                return out
            b = bias.data_ptr()
            if (
                type(bias) not in self._fast_types
                or (b < stop and start < b + b_size)
                or b & self._mask
                or bias.is_neg()
            ):
                return None
            if self._parallel and _pool.generation != _generation:
                _configure_pool()
            self._convt(input, packed, bias, out)
            return out
        except (AttributeError, RuntimeError, TypeError, ValueError, BufferError):
            return None

    def _call_checked(self, input: Any, weight: Any, bias: Any, out: Any) -> Any:
        spec = self.spec
        kind = self._kind(input=input, weight=weight, bias=bias, out=out)
        if spec.bias and bias is None:
            raise ArgumentError(f"bias is missing: the kernel adds one of shape {spec.bias_shape}; it is {spec.name}.")
        if not spec.bias and bias is not None:
            raise ArgumentError(
                f"bias is superfluous: the kernel adds none; it is {spec.name}. Build one with bias=True, or pass None."
            )
        kind.check("input", input, spec.input_shape, spec.dtype, spec)
        packed = weight.ndim == 5
        if packed:
            kind.check("packed weight", weight, self.manifest.packed_shape, self.manifest.packed_dtype, spec)
        else:
            kind.check("weight", weight, spec.weight_shape, spec.dtype, spec)
        if bias is not None:
            kind.check("bias", bias, spec.bias_shape, spec.dtype, spec)
        if out is not None:
            kind.check("out", out, spec.output_shape, spec.dtype, spec)
            kind.check_writable("out", out)
        if not spec.n:
            return kind.empty(spec.output_shape, spec.dtype, input) if out is None else out
        read = [kind.ready(input), kind.ready(weight) if packed else self._packed(kind, weight)]
        if bias is not None:
            read.append(kind.ready(bias))
        direct = out is not None and kind.is_direct(out) and not any(kind.overlaps(out, other) for other in read)
        result = out if direct else kind.empty(spec.output_shape, spec.dtype, input)
        self._configure()
        self._convt(*map(kind.pass_on, read), kind.pass_on(result))
        if out is None or direct:
            return result
        kind.copy(result, out)
        return out

    def pack(self, weight: Any) -> Any:
        """Repack a weight to the order in which the kernel reads it, once for many calls.

        Parameters
        ----------
        weight
            ``spec.weight_shape`` (IOHW), ``spec.dtype``; a torch tensor on the CPU or a numpy array.

        Returns
        -------
        torch.Tensor or numpy.ndarray
            A new one of ``manifest.packed_shape`` (always 5-D, which is how a call tells it from a plain weight) and
            ``manifest.packed_dtype``. Good for kernels whose manifest has the same ``layout`` only.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            As for a call.
        """
        kind = self._kind(weight=weight)
        kind.check("weight", weight, self.spec.weight_shape, self.spec.dtype, self.spec)
        return self._packed(kind, weight)

    def _packed(self, kind: "_Torch | _Numpy", weight: Any) -> Any:
        packed = kind.empty(self.manifest.packed_shape, self.manifest.packed_dtype, weight)
        self._configure()
        self._pack(kind.pass_on(kind.ready(weight)), kind.pass_on(packed))
        return packed

    def _configure(self) -> None:
        if self._parallel and _pool.generation != _generation:
            _configure_pool()

    def _kind(self, **arguments: Any) -> "_Torch | _Numpy":
        """Which of the two kinds the arguments are; None counts as neither, except for input and weight."""
        kinds: dict[str, _Torch | _Numpy] = {}
        for name, value in arguments.items():
            if value is None and name in ("bias", "out"):
                continue
            if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
                kinds[name] = _NUMPY
            elif self._torch is not None and isinstance(value, self._torch.torch.Tensor):
                kinds[name] = self._torch
            else:
                raise ArgumentTypeError(
                    f"{name} must be a torch tensor or a numpy array; found {type(value).__module__}."
                    f"{type(value).__qualname__}."
                )
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{name} is a {kind.name}" for name, kind in kinds.items())
            raise ArgumentTypeError(f"the arguments must all be torch tensors or all be numpy arrays; {found}.")
        return next(iter(kinds.values()))

    def save(self, directory: str | os.PathLike[str], *, with_runtime: bool = False) -> None:
        """Publish a copy of the artifact, atomically; `load` takes it back, in another process or on another machine.

        Parameters
        ----------
        directory
            Made if need be. An artifact that is there is replaced; anything else is refused.
        with_runtime
            Also copy TVM's small runtime library (3.4 MB), so that a machine with only numpy and apache-tvm-ffi can
            load it. Kernels that run on one thread and need no workspace do without.

        Raises
        ------
        ArtifactError
            As `artifact.copy`; or if the runtime library is asked for and found nowhere.
        """
        extra = {RUNTIME_FILE: _find_runtime(self.directory)} if with_runtime else {}
        artifact.copy(self.directory, Path(directory), extra=extra)


def load(directory: str | os.PathLike[str], *, owner: object = None) -> Kernel:
    """Load an artifact; needs no compiler and imports none.

    The manifest, the digest of every file, the architecture and the CPU features are verified before the library is
    opened. A kernel that uses threads or workspaces needs ``libtvm_runtime.so``: one that the process has already is
    used; else that of the installed apache-tvm, which is not imported (but must be the one that a later ``import tvm``
    opens: two copies in one process abort it); else one beside ``kernel.so``. Idempotent; libraries stay open as long
    as the process lives, also when the directory is replaced or removed.

    Parameters
    ----------
    directory
        What `Kernel.save` wrote.
    owner
        An object that lives as long as the kernel, for example the temporary directory it is in.

    Raises
    ------
    ArtifactNotFoundError
        (a FileNotFoundError) if the directory or one of its files, or the runtime library, does not exist.
    ArtifactCorruptError
        If the content is not what the manifest says.
    IncompatibleMachineError
        If the kernel was compiled for another architecture or for features this processor lacks.
    ArtifactError
        If the format is another version's, or the library cannot be opened.
    """
    path = Path(directory).resolve()
    manifest, content = artifact.read(path)
    _check_machine(path, manifest)
    kernel = content[KERNEL_FILE]
    parallel = _RUNTIME_SLOTS in kernel
    with _lock:
        if parallel:
            _open_runtime(path)
        module = _open(path / KERNEL_FILE, kernel, manifest.files[KERNEL_FILE])
    return Kernel(manifest, path, module, parallel=parallel, owner=owner)


def _check_machine(directory: Path, manifest: Manifest) -> None:
    target = manifest.target
    here = host_architecture()
    if target.arch != here:
        raise IncompatibleMachineError(
            f"the artifact {directory} was compiled for {target.arch}, this machine is {here}; build it for this one."
        )
    missing = target.missing_features
    if missing:
        raise IncompatibleMachineError(
            f"the artifact {directory} needs CPU features that this machine lacks: {', '.join(missing)}; build it here "
            "(target 'llvm'), or for a lower level such as 'llvm:x86-64-v2'."
        )


def _open(path: Path, data: bytes, digest: str) -> Any:
    """Open the library whose content was verified.

    The dynamic loader goes by names: asked for a name it has opened before, it gives the old library, whatever the file
    holds by now. So a name that has stood for other content is not used again; a private copy is.
    """
    name = str(path)
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
        raise ArtifactError(
            f"{path} cannot be opened: {str(error).strip().splitlines()[-1]}; build it here."
        ) from error


def _find_runtime(directory: Path) -> Path:
    """Where TVM's runtime library is: in the installed apache-tvm, or else beside the kernel."""
    package = importlib.util.find_spec("tvm")
    places = [Path(place) / "lib" for place in (package.submodule_search_locations or ())] if package else []
    for place in (*places, directory):
        if (place / RUNTIME_FILE).is_file():
            return place / RUNTIME_FILE
    raise ArtifactNotFoundError(
        f"the kernel {directory} needs {RUNTIME_FILE}, which is neither beside it nor in an installed apache-tvm; "
        "install apache-tvm, or save the kernel with with_runtime=True where it is installed."
    )


def _open_runtime(directory: Path) -> None:
    import tvm_ffi

    if tvm_ffi.get_global_func("runtime.NumThreads", allow_missing=True) is not None:
        return
    path = _find_runtime(directory)
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be opened: {error}.") from error


class _Pool(threading.local):
    """Which configuration the calling thread's pool has."""

    generation = -1


_pool = _Pool()
_generation = 0
_num_threads: int | None = None


def _usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _default_num_threads(cpus: list[int]) -> int:
    for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(variable, "")
        if value.isdecimal() and int(value) > 0:
            return min(int(value), len(cpus))
    cores = set()
    for cpu in cpus:
        try:
            cores.add((_CPU / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _configure_pool() -> None:
    """Give the calling thread a pool of `get_num_threads` threads that may run on the CPUs that this thread may run on.

    TVM's own default is half as many threads as there are CPUs on x86, and it binds the calling thread and each worker
    to CPUs counted from 0, whatever the thread was bound to before. A pool never grows; it is made as large as can be
    asked for, and then told how much of it to use: threads that are not used sleep.
    """
    import tvm_ffi

    global _generation
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    cpus = _usable_cpus()
    names = [str(cpu) for cpu in cpus]
    configure(_SHARE_ALL_CPUS, _num_threads or _default_num_threads(cpus), names)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    _pool.generation = _generation


def set_num_threads(n: int) -> None:
    """Set how many threads, the calling one included, each later kernel call in this process may use.

    Every thread that calls kernels has a pool of its own, as TVM has it, which adopts the number at its next call;
    torch's own threads are not affected. Results do not depend on it. Without a call to this, the number is that of
    ``TVM_NUM_THREADS`` or ``OMP_NUM_THREADS``, read at a thread's first call, or else of the physical cores that the
    process may run on. A thread in which TVM itself has run before keeps the pool it got then and can use fewer
    threads, not more.

    Raises
    ------
    ArgumentError
        If ``n`` is below 1 or above the number of CPUs that the process may run on.
    """
    global _generation, _num_threads
    limit = len(_usable_cpus())
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= limit:
        raise ArgumentError(f"n={n!r} must be from 1 to {limit}, the number of CPUs that this process may run on.")
    with _lock:
        _num_threads = n
        _generation += 1


def get_num_threads() -> int:
    """How many threads a kernel call in the calling thread uses; see `set_num_threads`."""
    return _num_threads or _default_num_threads(_usable_cpus())
