"""A compiled kernel that is loaded: checks arguments, calls it without copies."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convt_tvm import artifact
from convt_tvm.arguments import NUMPY, Kind, torch_kind
from convt_tvm.errors import ArgumentError, ArgumentTypeError, ArtifactCorruptError
from convt_tvm.libraries import find_runtime
from convt_tvm.manifest import KERNEL_FILE, RUNTIME_FILE, Manifest
from convt_tvm.spec import MEMORY_ORDER, ConvTranspose2dSpec
from convt_tvm.threads import adopted, configure, required

__all__ = ["Kernel"]

_FROM_NHWC = tuple(MEMORY_ORDER["nhwc"].index(axis) for axis in range(4))


class Kernel:
    """One compiled transposed convolution, called with torch tensors or numpy arrays.

    Made by `convt_tvm.load` and `convt_tvm.build`. Calls are thread-safe; they release the interpreter lock while they
    compute.

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
        "_input_order",
        "_output",
        "_output_order",
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
        # None where a call needs no other view of a tensor.
        self._input_order = None if spec.input_axes == "nchw" else MEMORY_ORDER[spec.input_axes]
        self._output_order = None if spec.output_axes == "nchw" else MEMORY_ORDER[spec.output_axes]
        # `empty_like` takes half the time of `new_empty`, which reads a shape. One element stands for all of them.
        self._empty_like: Any = None
        self._output: Any = None
        if torch is not None:
            last = partial(torch.empty_like, memory_format=torch.channels_last)
            self._empty_like = last if spec.is_channels_last else torch.empty_like
            shape = spec.sized.output_shape
            self._output = torch.empty(1, dtype=getattr(torch, spec.dtype), device="cpu").expand(shape)

    def __repr__(self) -> str:
        return (
            f"<Kernel {self.spec.name} for {self.target.key}, schedule {self.manifest.schedule!r}, packed weight "
            f"{self.manifest.packed_dtype}{list(self.manifest.packed_shape)}, from {str(self.directory)!r}>"
        )

    def __call__(self, input: Any, weight: Any, bias: Any = None, *, out: Any = None) -> Any:
        """Convolve; all arguments are torch tensors on the CPU, or all are numpy arrays.

        Nothing is copied that is contiguous in the spec's memory format, wherever it starts; what is not is copied
        first. Gradients are not recorded: each argument is taken as its ``detach()``.

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
            ``out``, or a new one that the caller owns: ``spec.output_shape`` (NCHW) in the spec's memory format,
            ``spec.dtype``.

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
                    result = self._empty_like(self._output.expand(input.size(0), -1, -1, -1))
                else:
                    result = self._empty_like(self._output)
                if out is None or not out.is_neg():
                    read = input if self._input_order is None else input.permute(*self._input_order)
                    written = result if self._output_order is None else result.permute(*self._output_order)
                    if adopted.setting != required.setting and self._parallel:
                        configure()
                    if bias is None:
                        self._convt(read, weight, written)
                        return result
                    if type(bias) in self._bias_types and not bias.is_neg():
                        self._convt(read, weight, bias, written)
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
            return self._new_output(kind, spec, input) if out is None else out
        read = [
            kind.ready(_in_order(kind, input, self._input_order)),
            kind.ready(weight) if packed else self._packed(kind, weight, kind.empty),
        ]
        if bias is not None:
            read.append(kind.ready(bias))
        written = None if out is None else _in_order(kind, out, self._output_order)
        result = out
        if written is None or not kind.is_direct(written) or any(kind.overlaps(written, other) for other in read):
            result = self._new_output(kind, spec, input)
            written = _in_order(kind, result, self._output_order)
        if self._parallel and adopted.setting != required.setting:
            configure()
        try:
            self._convt(*map(kind.pass_on, read), kind.pass_on(written))
        except ValueError as error:
            raise ArgumentError(f"the kernel {self.spec.name} refuses the arguments: {error}.") from error
        if out is None or result is out:
            return result
        kind.copy(result, out)
        return out

    def _new_output(self, kind: Kind, spec: ConvTranspose2dSpec, like: Any) -> Any:
        """Make an output in the spec's memory format."""
        if not spec.is_channels_last:
            return kind.empty(spec.output_shape, spec.dtype, like)
        nhwc = tuple(spec.output_shape[axis] for axis in MEMORY_ORDER["nhwc"])
        return kind.permuted(kind.empty(nhwc, spec.dtype, like), _FROM_NHWC)

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
        return self._packed(kind, weight, kind.lasting)

    def _packed(self, kind: Kind, weight: Any, new: Callable[..., Any]) -> Any:
        packed = new(self.manifest.packed_shape, self.manifest.packed_dtype, weight)
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
        """Publish a copy of the artifact, atomically; `convt_tvm.load` takes it back, anywhere.

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


def _in_order(kind: Kind, image: Any, axes: tuple[int, ...] | None) -> Any:
    """View images with their axes in this order; None leaves them as they are."""
    return image if axes is None else kind.permuted(image, axes)
