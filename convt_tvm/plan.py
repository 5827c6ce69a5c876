"""From the arguments of one call to the kernel that computes it: validated once, then looked up."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from convt_tvm.cache import cached_kernel
from convt_tvm.errors import ArgumentError, ArgumentTypeError, IncompatibleMachineError, SpecError
from convt_tvm.gpu import ARCHITECTURES, Gpu, capability, newest_architecture
from convt_tvm.layout import prefers_channels_last
from convt_tvm.phases import Axis
from convt_tvm.runtime import Kernel
from convt_tvm.spec import CHANNELS_LAST, ConvTranspose2dSpec, Pair
from convt_tvm.target import Target

__all__ = [
    "Array",
    "Parameters",
    "Plan",
    "as_count",
    "as_pair",
    "check_dtypes",
    "check_not_empty",
    "check_parameters",
    "check_shapes",
    "empty_batch_shape",
    "find_array_plan",
    "find_plan",
    "output_shape_of",
    "returns_channels_last",
]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Parameters: TypeAlias = tuple[Pair, Pair, Pair, int, Pair]
"""stride, padding, output_padding, groups, dilation: in the order of the function's arguments."""


def as_count(name: str, value: object) -> int:
    """Return `value` as an int; raises ArgumentTypeError for what is none, booleans and floats too."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}.")
    return value.__index__()  # type: ignore[no-any-return]


def as_pair(name: str, value: object) -> Pair:
    """Return an int, or one or two of them, as (height, width); raises ArgumentTypeError or SpecError."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    if not isinstance(value, Sequence) or isinstance(value, str):
        both = as_count(name, value)
        return both, both
    if len(value) not in (1, 2):
        raise SpecError(f"{name}={value!r} must be an integer or two of them, (height, width).")
    return as_count(name, value[0]), as_count(name, value[-1])


@dataclass(frozen=True, slots=True)
class Plan:
    """How to compute one combination of shapes, strides, dtypes and parameters.

    ``kernel`` is None where nothing is to be computed: the batch is empty. ``packing`` tells apart the orders in which
    kernels want their weights. ``output_shape`` is 4-D, also for one image without a batch.
    """

    kernel: Kernel | None
    packing: str
    output_shape: tuple[int, ...]
    unbatched: bool
    channels_last: bool

    def run(self, input: Tensor, bias: Tensor | None, *, weight: Tensor) -> Tensor:
        """Compute the output; the weight may be a packed one."""
        if self.kernel is None:
            return input.new_empty(self.output_shape)
        # Given a packed weight the kernel takes its shortest path, some 20 us below the longest.
        if weight.dim() == 4:
            weight = self.kernel.pack(weight)
        output: Tensor = self.kernel(input.unsqueeze(0) if self.unbatched else input, weight, bias)
        if self.channels_last and not self.kernel.spec.is_channels_last:
            output = torch.empty_like(output, memory_format=torch.channels_last).copy_(output)
        return output.squeeze(0) if self.unbatched else output


_plans: dict[tuple[object, ...], Plan] = {}
_PLANS_KEPT = 4096


def find_plan(input: Tensor, weight: Tensor, bias: Tensor | None, parameters: Parameters) -> Plan:
    """Return the plan for these tensors; validates, and builds the kernel, if they are the first of their kind."""
    key = (
        input.get_device() if input.is_cpu else (input.get_device(), torch.backends.cudnn.allow_tf32),
        input.shape,
        input.stride(),
        input.dtype,
        weight.shape,
        weight.stride(),
        weight.dtype,
        None if bias is None else (bias.shape, bias.dtype),
        parameters,
    )
    plan = _plans.get(key)
    if plan is None:
        check_dtypes(input, weight, bias)
        channels_last = returns_channels_last(input, weight)
        bias_shape = None if bias is None else tuple(bias.shape)
        plan = _make_plan(
            tuple(input.shape),
            tuple(weight.shape),
            bias_shape,
            str(input.dtype),
            parameters,
            channels_last,
            _gpu_target(input.get_device(), input.dtype) if input.is_cuda else "llvm",
        )
        _keep_plan(key, plan)
    return plan


def find_array_plan(input: Array, weight: Array, bias: Array | None, parameters: Parameters) -> Plan:
    """Return what `find_plan` does, for numpy arrays."""
    bias_shape = None if bias is None else bias.shape
    bias_dtype = None if bias is None else bias.dtype
    key = (input.shape, input.dtype, weight.shape, weight.dtype, bias_shape, bias_dtype, parameters)
    plan = _plans.get(key)
    if plan is None:
        check_dtypes(input, weight, bias)
        plan = _make_plan(input.shape, weight.shape, bias_shape, str(input.dtype), parameters, False, "llvm")
        _keep_plan(key, plan)
    return plan


def _keep_plan(key: tuple[object, ...], plan: Plan) -> None:
    if len(_plans) >= _PLANS_KEPT:
        _plans.clear()
    _plans[key] = plan


def _gpu_target(index: int, dtype: torch.dtype) -> str:
    """What to compile for the GPU ``cuda:<index>``; raises IncompatibleMachineError if it is too old.

    float32 may be multiplied as tf32 where torch lets cuDNN do so.
    """
    gpu = Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
    arch = newest_architecture(gpu)
    if arch is None:
        raise IncompatibleMachineError(
            f"cuda:{index}, {gpu.name}, has compute capability {gpu.capability[0]}.{gpu.capability[1]}, and kernels "
            f"need {'.'.join(map(str, capability(next(iter(ARCHITECTURES)))))}; compute on the CPU."
        )
    tf32 = dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and gpu.capability >= (8, 0)
    return f"cuda:{arch}+tf32" if tf32 else f"cuda:{arch}"


def _make_plan(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    dtype: str,
    parameters: Parameters,
    channels_last: bool,
    target: str,
) -> Plan:
    check_shapes(input_shape, weight_shape, bias_shape, parameters)
    unbatched = len(input_shape) == 3
    n = 1 if unbatched else input_shape[0]
    ih, iw = input_shape[-2:]
    stride, padding, output_padding, groups, dilation = parameters
    ci, co_per_group = weight_shape[:2]
    if n == 0:
        shape = empty_batch_shape(input_shape, weight_shape, dtype, parameters)
        return Plan(kernel=None, packing="", output_shape=shape, unbatched=False, channels_last=False)
    spec = ConvTranspose2dSpec(
        n=n,
        ci=ci,
        ih=ih,
        iw=iw,
        co=co_per_group * groups,
        kernel_size=weight_shape[2:],
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        bias=bias_shape is not None,
        dtype=dtype,
    )
    if channels_last and prefers_channels_last(spec) and Target.parse(target).for_dtype(spec.dtype).keeps_channels_last:
        spec = replace(spec, memory_format=CHANNELS_LAST)
    kernel = cached_kernel(spec, target)
    manifest = kernel.manifest
    packing = json.dumps([manifest.layout, list(manifest.packed_shape), manifest.packed_dtype], sort_keys=True)
    return Plan(kernel, packing, spec.output_shape, unbatched, channels_last)


def empty_batch_shape(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: str, parameters: Parameters
) -> tuple[int, ...]:
    """Return the output shape of an empty batch; raises SpecError as PyTorch would."""
    # PyTorch accepts any output_padding here, and images and outputs of size 0.
    stride, padding, output_padding, groups, dilation = parameters
    allowed = [min(op, max(0, max(s, d) - 1)) for op, s, d in zip(output_padding, stride, dilation, strict=True)]
    check_parameters(
        weight_shape[0],
        weight_shape[1] * groups,
        weight_shape[2:],
        (stride, padding, (allowed[0], allowed[1]), groups, dilation),
        dtype,
    )
    shape = output_shape_of(input_shape, weight_shape, parameters)
    check_not_empty(input_shape, shape, parameters, least=0)
    return shape


def check_not_empty(
    input_shape: Sequence[int], output_shape: Sequence[int], parameters: Parameters, least: int = 1
) -> None:
    """Raise SpecError for an output with a side below `least`."""
    # Not min(): a compiler would remember which of two unknown sizes was the smaller one.
    if output_shape[-2] < least or output_shape[-1] < least:
        raise SpecError(
            f"the output would be {output_shape[-2]}x{output_shape[-1]}: input {input_shape[-2]}x{input_shape[-1]} is "
            f"smaller than what padding={parameters[1]} crops; lower the padding."
        )


def check_parameters(ci: int, co: int, kernel_size: Sequence[int], parameters: Parameters, dtype: str) -> None:
    """Raise SpecError or UnsupportedDtypeError for what no image size would make valid."""
    stride, padding, output_padding, groups, dilation = parameters
    ConvTranspose2dSpec(
        n=1,
        ci=ci,
        # (side-1)*stride - 2*padding is not negative, so some output is left.
        ih=2 * abs(padding[0]) + 1,
        iw=2 * abs(padding[1]) + 1,
        co=co,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        dtype=dtype,
    )


def check_dtypes(input: Any, weight: Any, bias: Any) -> None:
    """Raise ArgumentError unless all have the dtype of the input."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != input.dtype:
            raise ArgumentError(
                f"{name} is {value.dtype} and input {input.dtype}; convert them to one dtype, as in "
                f"{name}.{'astype' if isinstance(value, np.ndarray) else 'to'}(input.dtype)."
            )


def check_shapes(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    parameters: Parameters,
) -> None:
    """Raise ArgumentError or SpecError for tensors that do not fit each other."""
    groups = parameters[3]
    if len(input_shape) not in (3, 4):
        raise ArgumentError(
            f"input of shape {tuple(input_shape)} must be (n, ci, ih, iw), or (ci, ih, iw) without a batch."
        )
    if len(weight_shape) != 4:
        raise ArgumentError(f"weight of shape {tuple(weight_shape)} must be (ci, co/groups, kh, kw).")
    if groups < 1:
        raise SpecError(f"groups={groups} must be at least 1.")
    if input_shape[-3] != weight_shape[0]:
        raise ArgumentError(
            f"input of shape {tuple(input_shape)} has {input_shape[-3]} channels and weight of shape "
            f"{tuple(weight_shape)} takes {weight_shape[0]}."
        )
    co = weight_shape[1] * groups
    if bias_shape is not None and (len(bias_shape) != 1 or bias_shape[0] != co):
        raise ArgumentError(
            f"bias of shape {tuple(bias_shape)} must be ({co},) for weight of shape {tuple(weight_shape)} and "
            f"groups={groups}."
        )


def output_shape_of(input_shape: Sequence[int], weight_shape: Sequence[int], parameters: Parameters) -> tuple[int, ...]:
    """Return the output shape, whatever it is, with or without a batch as the input."""
    stride, padding, output_padding, groups, dilation = parameters
    sizes = (
        Axis(input_shape[i - 2], weight_shape[2 + i], stride[i], padding[i], output_padding[i], dilation[i]).output_size
        for i in range(2)
    )
    return (*input_shape[:-3], weight_shape[1] * groups, *sizes)


def returns_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch returns channels_last: if the input or the weight is."""
    if input.dim() == 3:
        input = input.unsqueeze(0)
    return _is_channels_last(input.shape, input.stride()) or _is_channels_last(weight.shape, weight.stride())


def _is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    # Tensor::suggest_memory_format of ATen: strides grow in the order channel, column, row, image.
    if len(shape) != 4 or strides[1] == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(shape[axis], 1)
    return True
