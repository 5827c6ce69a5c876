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
from pathlib import Path
from typing import Any

import numpy as np

from convt_tvm import artifact
from convt_tvm.arguments import NUMPY, Kind, torch_kind
from convt_tvm.artifact import KERNEL_FILE, RUNTIME_FILE, Manifest
from convt_tvm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactCorruptError,
    ArtifactError,
    ArtifactNotFoundError,
    IncompatibleMachineError,
)
from convt_tvm.threads import adopted, configure, get_num_threads, required, set_num_threads

__all__ = ["Kernel", "get_num_threads", "load", "set_num_threads"]

# A kernel with parallel loops or large workspaces has weak slots of these names, which libtvm_runtime.so fills; called
# with an empty slot it jumps to address 0.
_RUNTIME_SLOTS = b"__TVMBackend"

_lock = threading.Lock()
_opened: dict[str, str] = {}


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
        "_bias_types",
        "_convt",
        "_empty_like",
        "_fast_type",
        "_output",
        "_pack",
        "_parallel",
        "_tensor",
        "_torch",
        "directory",
        "manifest",
        "spec",
        "target",
    )

    def __init__(self, manifest: Manifest, directory: Path, module: Any, *, parallel: bool) -> None:
        spec = manifest.spec
        self.spec = spec
        self.target = manifest.target
        self.manifest = manifest
        self.directory = directory
        self._parallel = parallel
        try:
            self._convt = module.get_function("convt")
            self._pack = module.get_function("pack")
        except AttributeError as error:
            raise ArtifactCorruptError(f"{directory / KERNEL_FILE} is no kernel: {error}; build it again.") from error
        # apache-tvm-ffi has imported torch by now, if there is one.
        torch = sys.modules.get("torch")
        self._torch = None if torch is None else torch_kind(torch)
        self._tensor: Any = None if torch is None else torch.Tensor
        # With an empty batch there is nothing to call: a type that no argument has.
        self._fast_type = object() if spec.n == 0 else self._tensor
        self._bias_types = () if torch is None else (torch.Tensor, torch.nn.Parameter)
        # `empty_like` takes half the time of `new_empty`, which reads a shape. One element stands for all of them.
        self._empty_like: Any = None if torch is None else torch.empty_like
        self._output: Any = (
            None
            if torch is None
            else torch.empty(1, dtype=getattr(torch, spec.dtype), device="cpu").expand(spec.sized.output_shape)
        )

    def __repr__(self) -> str:
        return (
            f"<Kernel {self.spec.name} for {self.target.key}, schedule {self.manifest.schedule!r}, packed weight "
            f"{self.manifest.packed_dtype}{list(self.manifest.packed_shape)}, from {str(self.directory)!r}>"
        )

    def __call__(self, input: Any, weight: Any, bias: Any = None, *, out: Any = None) -> Any:
        """Convolve; all arguments are torch tensors on the CPU, or all are numpy arrays.

        Nothing is copied that is contiguous (row-major), wherever it starts; what is not is copied first.
        Gradients are not recorded: each argument is taken as its ``detach()``.

        Parameters
        ----------
        input
            ``spec.input_shape`` (NCHW), ``spec.dtype``; with any number of images where ``spec.n`` is None.
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
        # The compiled entry checks number, type, dtype, shape, strides, device and overlap of its arguments before it
        # writes anything. What it cannot see is tested here: that they are torch's own tensors, and that no negation is
        # still to be done (`is_neg`). A test costs 30 to 100 ns; whatever fails is sorted out by `_call_checked`.
        fast = self._fast_type
        if (
            type(input) is fast
            and type(weight) is fast
            and (type(out) is fast or out is None)
            and weight.dim() == 5
            and not (input.is_neg() or weight.is_neg())
        ):
            try:
                if out is not None:
                    result = out
                elif self.spec.n is None:
                    result = input.new_empty((input.size(0), *self._output.shape[1:]))
                else:
                    result = self._empty_like(self._output)
                if out is None or not out.is_neg():
                    if adopted.setting != required.setting and self._parallel:
                        configure()
                    if bias is None:
                        self._convt(input, weight, result)
                        return result
                    if type(bias) in self._bias_types and not bias.is_neg():
                        self._convt(input, weight, bias, result)
                        return result
            except (BufferError, IndexError, RuntimeError, TypeError, ValueError):
                pass
        return self._call_checked(input, weight, bias, out)

    def _call_checked(self, input: Any, weight: Any, bias: Any, out: Any) -> Any:
        spec = self.spec
        kind = self._kind(input=input, weight=weight, bias=bias, out=out)
        if spec.bias and bias is None:
            raise ArgumentError(f"bias is missing: the kernel adds one of shape {spec.bias_shape}; it is {spec.name}.")
        if not spec.bias and bias is not None:
            raise ArgumentError(
                f"bias is superfluous: the kernel adds none; it is {spec.name}. Build one with bias=True, or pass None."
            )
        if spec.n is None:
            spec = spec.with_batch(input.shape[0] if input.ndim else 1)
        kind.check("input", input, spec.input_shape, spec.dtype, self.spec)
        packed = weight.ndim == 5
        if packed:
            kind.check("packed weight", weight, self.manifest.packed_shape, self.manifest.packed_dtype, self.spec)
        else:
            kind.check("weight", weight, spec.weight_shape, spec.dtype, self.spec)
        if bias is not None:
            kind.check("bias", bias, spec.bias_shape, spec.dtype, self.spec)
        if out is not None:
            kind.check("out", out, spec.output_shape, spec.dtype, self.spec)
            kind.check_writable("out", out)
        if not spec.n:
            return kind.empty(spec.output_shape, spec.dtype, input) if out is None else out
        read = [kind.ready(input), kind.ready(weight) if packed else self._packed(kind, weight)]
        if bias is not None:
            read.append(kind.ready(bias))
        direct = out is not None and kind.is_direct(out) and not any(kind.overlaps(out, other) for other in read)
        result = out if direct else kind.empty(spec.output_shape, spec.dtype, input)
        if self._parallel and adopted.setting != required.setting:
            configure()
        try:
            self._convt(*map(kind.pass_on, read), kind.pass_on(result))
        except ValueError as error:
            raise ArgumentError(f"the kernel {self.spec.name} refuses the arguments: {error}.") from error
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

    def _packed(self, kind: Kind, weight: Any) -> Any:
        packed = kind.empty(self.manifest.packed_shape, self.manifest.packed_dtype, weight)
        if self._parallel and adopted.setting != required.setting:
            configure()
        self._pack(kind.pass_on(kind.ready(weight)), kind.pass_on(packed))
        return packed

    def _kind(self, **arguments: Any) -> Kind:
        """Which of the two kinds the arguments are; None counts as neither, except for input and weight."""
        kinds: dict[str, Kind] = {}
        for name, value in arguments.items():
            if value is None and name in ("bias", "out"):
                continue
            if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
                kinds[name] = NUMPY
            elif self._torch is not None and isinstance(value, self._tensor):
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
        extra = {RUNTIME_FILE: find_runtime(self.directory)} if with_runtime else {}
        artifact.copy(self.directory, Path(directory), extra=extra)


def load(directory: str | os.PathLike[str]) -> Kernel:
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
    try:
        manifest.target.require_host()
    except IncompatibleMachineError as error:
        raise IncompatibleMachineError(f"the artifact {path} cannot run here: {error}") from error
    if manifest.target.kind != "llvm":
        raise ArtifactError(f"the artifact {path} is for GPUs; load it with convt_tvm.gpu_kernel.load_gpu.")
    kernel = content[KERNEL_FILE]
    parallel = _RUNTIME_SLOTS in kernel
    with _lock:
        if parallel:
            _open_runtime(path)
        module = _open(path / KERNEL_FILE, kernel, manifest.files[KERNEL_FILE])
    return Kernel(manifest, path, module, parallel=parallel)


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
        reason = str(error).strip().splitlines()[-1]
        raise ArtifactError(f"{path} cannot be opened: {reason}; build it on this machine.") from error


def find_runtime(directory: Path) -> Path:
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
    path = find_runtime(directory)
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be opened: {error}.") from error
