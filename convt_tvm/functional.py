"""``torch.nn.functional.conv_transpose2d`` on compiled kernels, as a function and as a torch operator."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from convt_tvm.cache import cached_kernel
from convt_tvm.errors import ArgumentError, ArgumentTypeError, SpecError
from convt_tvm.phases import Axis
from convt_tvm.runtime import Kernel
from convt_tvm.spec import ConvTranspose2dSpec, Pair

__all__ = ["conv_transpose2d"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Parameters: TypeAlias = tuple[Pair, Pair, Pair, int, Pair]
"""stride, padding, output_padding, groups, dilation: in the order of the function's arguments."""

_NO_GRADIENT = (
    "convt_tvm computes no derivatives of conv_transpose2d: train with torch.nn.ConvTranspose2d, or call this one "
    "under torch.no_grad() or torch.inference_mode()."
)


def conv_transpose2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Any:
    """Transposed convolution of an image: what `torch.nn.functional.conv_transpose2d` returns, from a compiled kernel.

    The first call with new shapes or parameters compiles a kernel, or finds it in the user's cache directory (see
    `cache.cached_kernel`); later ones go straight to it. Each call packs the weight; `nn.ConvTranspose2d` packs it
    once.

    No gradients are computed. The result of inputs that require grad requires grad, as everywhere in PyTorch, and
    its backward pass raises NotImplementedError; forward-mode differentiation raises at once.

    Parameters
    ----------
    input
        ``(n, ci, ih, iw)`` or ``(ci, ih, iw)``; ``n`` may be 0. A torch tensor on the CPU or a numpy array, of float32,
        float64, float16 or bfloat16. Any strides.
    weight
        ``(ci, co/groups, kh, kw)``; of the same kind and dtype, like ``bias``.
    bias
        ``(co,)`` or None.
    stride, padding, output_padding, dilation
        An integer or two, (height, width).
    groups
        Number of blocked connections from input to output channels.

    Returns
    -------
    Tensor or numpy.ndarray
        ``(n, co, oh, ow)`` or ``(co, oh, ow)``, newly allocated; channels_last when the input or the weight is, as in
        PyTorch. Under `torch.autocast` in the dtype that PyTorch would return.

    Raises
    ------
    SpecError
        (a ValueError and a RuntimeError) if the parameters are not valid or the output would be empty. PyTorch returns
        an output with no rows or no columns on one of its back ends and raises on the other; this always raises, but
        for an empty batch.
    UnsupportedDtypeError
        (also a NotImplementedError) for other dtypes; PyTorch computes int64 and complex ones too.
    ArgumentError
        (a ValueError and a RuntimeError) for tensors that do not fit each other, or are not on the CPU.
    ArgumentTypeError
        (a TypeError) for other types, or tensors and arrays in one call.

    Examples
    --------
    >>> import torch
    >>> conv_transpose2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), stride=2).shape
    torch.Size([1, 1, 4, 4])
    """
    parameters = (
        as_pair("stride", stride),
        as_pair("padding", padding),
        as_pair("output_padding", output_padding),
        as_count("groups", groups),
        as_pair("dilation", dilation),
    )
    if is_plain_call(input, weight, bias):
        plan = find_plan(input, weight, bias, parameters)
        return call_plan(plan, partial(plan.run, weight=weight), input, weight, bias)
    if isinstance(input, np.ndarray):
        return _call_with_arrays(input, weight, bias, parameters)
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if value is not None or name != "bias":
            _check_tensor(name, value)
    if torch.is_autocast_enabled("cpu"):
        input, weight, bias = (_autocast(value) for value in (input, weight, bias))
    return torch.ops.convt_tvm.conv_transpose2d.default(input, weight, bias, *parameters)


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


# What the operator does for given shapes, strides and dtypes.


@dataclass(frozen=True, slots=True)
class Plan:
    """How to compute one combination of shapes, strides, dtypes and parameters.

    ``kernel`` is None where nothing is to be computed: the batch is empty. ``packing`` tells apart the orders in which
    kernels want their weights.
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
        # Given `out`, the kernel takes its shortest path.
        output = torch.empty(self.kernel.spec.output_shape, dtype=input.dtype)
        self.kernel(input.unsqueeze(0) if self.unbatched else input, weight, bias, out=output)
        if self.channels_last:
            output = torch.empty_like(output, memory_format=torch.channels_last).copy_(output)
        return output.squeeze(0) if self.unbatched else output


_plans: dict[tuple[object, ...], Plan] = {}
_PLANS_KEPT = 4096


def find_plan(input: Tensor, weight: Tensor, bias: Tensor | None, parameters: Parameters) -> Plan:
    """Return the plan for these tensors; validates, and builds the kernel, if they are the first of their kind."""
    key = (
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
        _check_dtypes(input, weight, bias)
        channels_last = _returns_channels_last(input, weight)
        bias_shape = None if bias is None else tuple(bias.shape)
        dtype = str(input.dtype)
        plan = _make_plan(tuple(input.shape), tuple(weight.shape), bias_shape, dtype, parameters, channels_last)
        _keep_plan(key, plan)
    return plan


def _keep_plan(key: tuple[object, ...], plan: Plan) -> None:
    if len(_plans) >= _PLANS_KEPT:
        _plans.clear()
    _plans[key] = plan


def _make_plan(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    dtype: str,
    parameters: Parameters,
    channels_last: bool,
) -> Plan:
    _check_shapes(input_shape, weight_shape, bias_shape, parameters)
    unbatched = len(input_shape) == 3
    n = 1 if unbatched else input_shape[0]
    ih, iw = input_shape[-2:]
    stride, padding, output_padding, groups, dilation = parameters
    ci, co_per_group = weight_shape[:2]
    if n == 0:
        shape = _empty_batch_shape(input_shape, weight_shape, dtype, parameters)
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
    kernel = cached_kernel(spec)
    manifest = kernel.manifest
    packing = json.dumps([manifest.layout, list(manifest.packed_shape), manifest.packed_dtype], sort_keys=True)
    shape = spec.output_shape[1:] if unbatched else spec.output_shape
    return Plan(kernel=kernel, packing=packing, output_shape=shape, unbatched=unbatched, channels_last=channels_last)


def _empty_batch_shape(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: str, parameters: Parameters
) -> tuple[int, ...]:
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
    shape = _output_shape(input_shape, weight_shape, parameters)
    _check_not_empty(input_shape, shape, parameters, least=0)
    return shape


def _check_not_empty(
    input_shape: Sequence[int], output_shape: Sequence[int], parameters: Parameters, least: int = 1
) -> None:
    if min(output_shape[-2:]) < least:
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


def _check_dtypes(input: Any, weight: Any, bias: Any) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != input.dtype:
            raise ArgumentError(
                f"{name} is {value.dtype} and input {input.dtype}; convert them to one dtype, as in "
                f"{name}.{'astype' if isinstance(value, np.ndarray) else 'to'}(input.dtype)."
            )


def _check_shapes(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    parameters: Parameters,
) -> None:
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


def _output_shape(input_shape: Sequence[int], weight_shape: Sequence[int], parameters: Parameters) -> tuple[int, ...]:
    stride, padding, output_padding, groups, dilation = parameters
    sizes = (
        Axis(input_shape[i - 2], weight_shape[2 + i], stride[i], padding[i], output_padding[i], dilation[i]).output_size
        for i in range(2)
    )
    return (*input_shape[:-3], weight_shape[1] * groups, *sizes)


def _returns_channels_last(input: Tensor, weight: Tensor) -> bool:
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


# Ways in: plain tensors, numpy arrays, and everything else through torch's dispatcher.


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def is_plain_call(input: Any, weight: Any, bias: Any) -> bool:
    """Whether these are ordinary CPU tensors, with nothing of torch's watching that must see the operator.

    What might be watching: a compiler or tracer, a transform of `torch.func`, a dispatch mode such as a FLOP counter,
    autocast, forward-mode differentiation. The dispatcher would find out too, for some ten microseconds.
    """
    return (
        not torch.compiler.is_compiling()
        and type(input) in _PLAIN_TYPES
        and type(weight) in _PLAIN_TYPES
        and (bias is None or (type(bias) in _PLAIN_TYPES and bias.is_cpu and not bias.is_neg()))
        and input.is_cpu
        and weight.is_cpu
        and input.layout is torch.strided
        and weight.layout is torch.strided
        and not input.is_neg()
        and not weight.is_neg()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._is_any_autocast_enabled()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def call_plan(
    plan: Plan, run: Callable[[Tensor, Tensor | None], Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return ``run(input, bias)``, tied to the inputs by a backward pass that raises where grad mode asks for one."""
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _NoBackward.apply(run, input, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    return run(input, bias)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, Tensor | None], Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        return run(input, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _no_backward(ctx, *gradients)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        # A torch.fx proxy is no tensor but stands for one, and says so like this.
        if hasattr(type(value), "__torch_function__"):
            return
        raise ArgumentTypeError(
            f"{name} is a {type(value).__name__}; pass input, weight and bias as torch tensors, or all as numpy arrays."
        )
    if value.device.type not in ("cpu", "meta"):
        raise ArgumentError(f"{name} is on {value.device}; the kernels run on the CPU: move it with .cpu().")
    if value.layout != torch.strided:
        raise ArgumentError(f"{name} has the layout {value.layout}; convert it with .to_dense().")
    # The operator would raise for neither: it would drop the tangent, or name one of torch's internals.
    transformed = not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(value)
    if transformed or _has_tangent(value):
        raise NotImplementedError(f"{name} is being differentiated; {_NO_GRADIENT}")


def _has_tangent(value: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def _call_with_arrays(input: Array, weight: Any, bias: Any, parameters: Parameters) -> Array:
    for name, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, np.ndarray) and not (name == "bias" and value is None):
            raise ArgumentTypeError(
                f"{name} is a {type(value).__name__} and input a numpy array; pass all of them as torch tensors or all "
                "as numpy arrays."
            )
    bias_shape = None if bias is None else bias.shape
    bias_dtype = None if bias is None else bias.dtype
    key = (input.shape, input.dtype, weight.shape, weight.dtype, bias_shape, bias_dtype, parameters)
    plan = _plans.get(key)
    if plan is None:
        _check_dtypes(input, weight, bias)
        plan = _make_plan(input.shape, weight.shape, bias_shape, str(input.dtype), parameters, channels_last=False)
        _keep_plan(key, plan)
    if plan.kernel is None:
        return np.empty(plan.output_shape, input.dtype)
    output: Array = plan.kernel(input[None] if plan.unbatched else input, weight, bias)
    return output[0] if plan.unbatched else output


def _autocast(value: Tensor | None) -> Tensor | None:
    # Of the dtypes it meets, torch.autocast leaves float64 alone.
    if value is None or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(torch.get_autocast_dtype("cpu"))


@torch.library.custom_op("convt_tvm::conv_transpose2d", mutates_args=(), device_types="cpu")
def _operator(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    parameters = _parameters(stride, padding, output_padding, groups, dilation)
    return find_plan(input, weight, bias, parameters).run(input, bias, weight=weight)


@_operator.register_fake
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    parameters = _parameters(stride, padding, output_padding, groups, dilation)
    _check_dtypes(input, weight, bias)
    _check_shapes(input.shape, weight.shape, None if bias is None else bias.shape, parameters)
    options: Any = {"dtype": input.dtype, "device": input.device}
    if type(input.shape[0]) is int and input.dim() == 4 and input.shape[0] == 0:
        return torch.empty(_empty_batch_shape(input.shape, weight.shape, str(input.dtype), parameters), **options)
    # Sizes not known yet stand for any; int() would fix them.
    ci, co_per_group, kh, kw = (size if type(size) is int else None for size in weight.shape)
    check_parameters(
        groups if ci is None else ci,
        groups if co_per_group is None else co_per_group * groups,
        (1 if kh is None else kh, 1 if kw is None else kw),
        parameters,
        str(input.dtype),
    )
    shape = _output_shape(input.shape, weight.shape, parameters)
    _check_not_empty(input.shape, shape, parameters)
    batched = shape if input.dim() == 4 else (1, *shape)
    channels_last = _returns_channels_last(input, weight)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    output = torch.empty(batched, memory_format=memory_format, **options)
    return output if input.dim() == 4 else output.squeeze(0)


def _parameters(
    stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int], groups: int, dilation: Sequence[int]
) -> Parameters:
    return (
        as_pair("stride", stride),
        as_pair("padding", padding),
        as_pair("output_padding", output_padding),
        groups,
        as_pair("dilation", dilation),
    )


def _no_backward(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(_NO_GRADIENT)


_operator.register_autograd(_no_backward)
