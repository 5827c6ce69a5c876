"""A CUDA kernel as an operator on this processor: compiled, called and checked where there is no GPU."""

import ctypes
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import tvm

from convt_tvm.check import CheckRow, compare, operand_unit
from convt_tvm.compiler import compile_module, lower_choice
from convt_tvm.emulator import set_descending
from convt_tvm.errors import ConvTError, TargetError
from convt_tvm.space import Choice, default_choice
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

__all__ = ["EmulatedKernel", "check_emulated"]


class EmulatedKernel:
    """The kernel that a GPU would run, its threads run one after the other; see `convt_tvm.emulator`.

    Called with CPU tensors, a plain weight among them, it packs and convolves in the emulated GPU's memory, of which
    everything was NaN before. What went wrong there raises a RuntimeError that says what.

    Parameters
    ----------
    spec, target
        What to compile, and the GPU architectures it is for.
    choice
        The schedule and layout; by default what the cost rule finds cheapest.
    descending
        Run the threads of a block in descending order.

    Raises
    ------
    BuildError
        If there is no CUDA toolkit, whose headers are needed, or no g++.
    """

    def __init__(
        self, spec: ConvTranspose2dSpec, target: Target, choice: Choice | None = None, *, descending: bool = False
    ) -> None:
        self.spec = spec
        self.choice = choice or default_choice(spec, target)
        self.descending = descending
        lowered = lower_choice(spec, target, self.choice)
        with TemporaryDirectory(prefix="convt-tvm-emulate-") as directory:
            library = Path(directory, "kernel.so")
            compile_module(lowered.module, target, library, emulated=True)
            self._module = tvm.runtime.load_module(str(library))

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Pack and convolve; a new tensor."""
        set_descending(self.descending)
        spec = self.spec
        layout = self.choice.layout
        packed = _empty(layout.packed_shape(spec), layout.packed_dtype(spec))
        output = _empty(spec.output_shape, spec.dtype)
        self._module["pack"](_copy_in(weight), packed)
        self._module["convt"](_copy_in(input), packed, *([] if bias is None else [_copy_in(bias)]), output)
        return _copy_out(output, spec)


def _empty(shape: tuple[int, ...], dtype: str) -> Any:
    return tvm.runtime.empty(shape, dtype, tvm.cuda(0))


def _copy_in(tensor: torch.Tensor) -> Any:
    contiguous = tensor.contiguous()
    copy = _empty(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    ctypes.memmove(copy.data_ptr(), contiguous.data_ptr(), contiguous.nbytes)
    return copy


def _copy_out(output: Any, spec: ConvTranspose2dSpec) -> torch.Tensor:
    tensor = torch.empty(spec.output_shape, dtype=getattr(torch, spec.dtype))
    ctypes.memmove(tensor.data_ptr(), output.data_ptr(), tensor.nbytes)
    return tensor


def check_emulated(workload: Workload, target: Target, *, seed: int = 0) -> CheckRow:
    """What `convt_tvm.check.check` finds, but for times, of the kernel for GPUs run by the emulator in both orders.

    Raises
    ------
    TargetError
        If the target is not for GPUs.
    """
    if target.kind != "cuda":
        raise TargetError(f"the emulator runs code for GPUs, not for {target.name}; write --target cuda or cuda:sm_90.")
    spec, found = workload.spec, dict[str, Any]()
    try:
        start = perf_counter()
        kernel = EmulatedKernel(spec, target)
        found |= {"build_secs": perf_counter() - start, "schedule": kernel.choice.space.name}

        def descending(*tensors: Any) -> torch.Tensor:
            kernel.descending = True
            return kernel(*tensors)

        def ascending(*tensors: Any) -> torch.Tensor:
            kernel.descending = False
            return kernel(*tensors)

        unit = operand_unit(spec, target)
        found |= asdict(compare(spec, ascending, descending, seed=seed, operand_unit=unit))
        found["verdict"] = "bad" if found["reason"] else "good"
    except (ConvTError, RuntimeError) as error:  # recorded as this row's status
        found["reason"] = " ".join(str(error).split())
    return CheckRow(workload.name, spec.name, spec.output_shape, target.name, 1, seed, **found)
