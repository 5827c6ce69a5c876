"""``torch.nn.functional.conv_transpose2d`` on compiled kernels, as a function and as a torch operator."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from convt_tvm.errors import ArgumentError, ArgumentTypeError
from convt_tvm.plan import (
    Array,
    Parameters,
    Plan,
    as_count,
    as_pair,
    check_dtypes,
    check_not_empty,
    check_parameters,
    check_shapes,
    empty_batch_shape,
    find_array_plan,
    find_plan,
    output_shape_of,
    returns_channels_last,
)

__all__ = ["conv_transpose2d"]

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
        ``(n, ci, ih, iw)`` or ``(ci, ih, iw)``; ``n`` may be 0. A torch tensor on the CPU or a CUDA GPU, or a numpy
        array, of float32, float64, float16 or bfloat16. Any strides.
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
        (a ValueError and a RuntimeError) for tensors that do not fit each other, or are on different devices.
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
    device = input.device.type if isinstance(input, Tensor) and input.is_cuda else "cpu"
    if torch.is_autocast_enabled(device):
        input, weight, bias = (_autocast(value, device) for value in (input, weight, bias))
    return torch.ops.convt_tvm.conv_transpose2d.default(input, weight, bias, *parameters)


# Ways in: plain tensors, numpy arrays, and everything else through torch's dispatcher.


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def is_plain_call(input: Any, weight: Any, bias: Any) -> bool:
    """Whether these are ordinary tensors on CPU or GPU, with nothing of torch's watching that must see the operator.

    What might be watching: a compiler or tracer, a transform of `torch.func`, a dispatch mode such as a FLOP counter,
    autocast, forward-mode differentiation. The dispatcher would find out too, for some ten microseconds.
    """
    return (
        not torch.compiler.is_compiling()
        and type(input) in _PLAIN_TYPES
        and type(weight) in _PLAIN_TYPES
        and (bias is None or (type(bias) in _PLAIN_TYPES and bias.is_cpu is input.is_cpu and not bias.is_neg()))
        and ((input.is_cpu and weight.is_cpu) or (input.is_cuda and weight.is_cuda))
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
    if value.device.type not in ("cpu", "cuda", "meta"):
        raise ArgumentError(
            f"{name} is on {value.device}; the kernels run on CPUs and CUDA GPUs: move it with .cpu() or .cuda()."
        )
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
    plan = find_array_plan(input, weight, bias, parameters)
    if plan.kernel is None:
        return np.empty(plan.output_shape, input.dtype)
    output: Array = plan.kernel(input[None] if plan.unbatched else input, weight, bias)
    return output[0] if plan.unbatched else output


def _autocast(value: Tensor | None, device: str) -> Tensor | None:
    # Of the dtypes it meets, torch.autocast leaves float64 alone.
    if value is None or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(torch.get_autocast_dtype(device))


@torch.library.custom_op("convt_tvm::conv_transpose2d", mutates_args=(), device_types=("cpu", "cuda"))
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
    check_dtypes(input, weight, bias)
    check_shapes(input.shape, weight.shape, None if bias is None else bias.shape, parameters)
    options: Any = {"dtype": input.dtype, "device": input.device}
    if type(input.shape[0]) is int and input.dim() == 4 and input.shape[0] == 0:
        return torch.empty(empty_batch_shape(input.shape, weight.shape, str(input.dtype), parameters), **options)
    # Sizes not known yet stand for any; int() would fix them.
    ci, co_per_group, kh, kw = (size if type(size) is int else None for size in weight.shape)
    check_parameters(
        groups if ci is None else ci,
        groups if co_per_group is None else co_per_group * groups,
        (1 if kh is None else kh, 1 if kw is None else kw),
        parameters,
        str(input.dtype),
    )
    shape = output_shape_of(input.shape, weight.shape, parameters)
    check_not_empty(input.shape, shape, parameters)
    batched = shape if input.dim() == 4 else (1, *shape)
    channels_last = returns_channels_last(input, weight)
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
