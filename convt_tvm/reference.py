"""What a transposed convolution should answer, and how far from it a correct kernel may be.

The oracle is PyTorch's float64 path: its own column-to-image code, not oneDNN, which runs float32. Two kinds of input
go with it: integers, for which a kernel has to give the same bits as the oracle, and normal random numbers, for which
it has to stay within the error bound of a dot product.
"""

from dataclasses import dataclass
from math import inf, nan, sqrt
from typing import TypeAlias

import torch

from convt_tvm.errors import SpecError
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = [
    "TF32_UNIT",
    "Expected",
    "Inputs",
    "empty_output",
    "error_bound",
    "expect",
    "in_format",
    "integer_inputs",
    "integer_reference",
    "longest_reduction",
    "normal_inputs",
    "reference",
]

Inputs: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Input, weight and bias (None where the spec has none)."""

TF32_UNIT = 2.0**-11
"""By how much of its value a float32 changes when it is rounded to tf32, at most."""

_LARGEST_INTEGER = 8
_SPARSEST = 1 / 4096
# A zero-mean sum exceeds 4 standard deviations once in 16,000 outputs, so denser data is not worth trying.
_DEVIATIONS = 4.0


def _gather(
    spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int
) -> torch.Tensor:
    with torch.inference_mode():
        return torch.nn.functional.conv_transpose2d(
            input, weight, bias, spec.stride, spec.padding, spec.output_padding, groups, spec.dilation
        )


def reference(
    spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The output ``(n, co, oh, ow)`` in float64, whatever the dtype of the arguments.

    Exact for `integer_inputs`; otherwise within ``gamma_k(2**-53)`` of the exact one, which `error_bound` accounts for.
    """
    return _gather(spec, input.double(), weight.double(), None if bias is None else bias.double(), spec.groups)


def in_format(spec: ConvTranspose2dSpec, image: torch.Tensor) -> torch.Tensor:
    """The same values in the spec's memory format."""
    return image.contiguous(memory_format=getattr(torch, spec.memory_format))


def empty_output(spec: ConvTranspose2dSpec, like: torch.Tensor) -> torch.Tensor:
    """An output full of NaN for a kernel to write, in the spec's memory format, of the dtype and device of `like`."""
    memory_format: torch.memory_format = getattr(torch, spec.memory_format)
    output = torch.empty(spec.output_shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
    return output.fill_(nan)


def _reduction_lengths(spec: ConvTranspose2dSpec) -> torch.Tensor:
    """How many products each output sums, ``(1, 1, oh, ow)``: the taps that reach it times ``ci/groups``."""
    image = torch.ones((1, 1, spec.ih, spec.iw), dtype=torch.float64)
    kernel = torch.ones((1, 1, *spec.kernel_size), dtype=torch.float64)
    return _gather(spec, image, kernel, None, 1) * (spec.ci // spec.groups)


def longest_reduction(spec: ConvTranspose2dSpec) -> int:
    """The largest number of products that any one output sums."""
    return int(_reduction_lengths(spec).max())


def _integers(
    spec: ConvTranspose2dSpec, largest: int, density: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        magnitude = torch.randint(1, largest + 1, shape, generator=generator)
        sign = 2 * torch.randint(0, 2, shape, generator=generator) - 1
        return (magnitude * sign).double()

    input, weight = draw(spec.input_shape), draw(spec.weight_shape)
    if density < 1:
        weight *= torch.rand(weight.shape, generator=generator) < density
    return input, weight, draw(spec.bias_shape) if spec.bias else None


def integer_inputs(spec: ConvTranspose2dSpec, seed: int) -> Inputs:
    """Integer-valued inputs on which a correct kernel gives the bits of `reference`, in whatever order it adds.

    All values are drawn from ``-m .. m`` without 0, with equal chances for both signs, where ``m`` is the largest of
    8, 4, 2 and 1 that satisfies both conditions:

    - every partial sum in any order is an integer that the accumulator holds: ``k * m * m + m <= 2**24`` (float32) or
      ``2**53`` (float64) for the longest reduction ``k``. This is a bound, not a guess.
    - every output is exact in ``spec.dtype``. For float32 and float64 this follows from the first condition; for
      float16 (integers up to 2048) and bfloat16 (up to 256) it is tested on the reference itself.

    Where not even ``m = 1`` satisfies them, half of the weights are set to zero, then three quarters, and so on, at
    random; input and bias stay free of zeros. In float16 that starts at about 260,000 products an output, in bfloat16
    at about 4,000.

    Returns
    -------
    Inputs
        Tensors of ``spec.dtype`` on the CPU, the input in the spec's memory format, the others contiguous; the same for
        the same spec and seed.

    Raises
    ------
    SpecError
        if a reduction is too long for any of this (above 16 million products in float32).
    """
    dtype: torch.dtype = getattr(torch, spec.dtype)
    limit = 2 / torch.finfo(getattr(torch, spec.accumulator_dtype)).eps
    output_limit = 2 / torch.finfo(dtype).eps
    length = longest_reduction(spec)
    largest, density = _LARGEST_INTEGER, 1.0
    while density >= _SPARSEST:
        mean_square = (largest + 1) * (2 * largest + 1) / 6
        deviation = mean_square * sqrt(length * density)
        if length * largest * largest + largest <= limit and _DEVIATIONS * deviation <= output_limit:
            generator = torch.Generator().manual_seed(seed)
            input, weight, bias = _integers(spec, largest, density, generator)
            narrow = spec.dtype != spec.accumulator_dtype
            if not narrow or bool((reference(spec, input, weight, bias).abs() <= output_limit).all()):
                return in_format(spec, input.to(dtype)), weight.to(dtype), None if bias is None else bias.to(dtype)
        if largest > 1:
            largest //= 2
        else:
            density /= 2
    raise SpecError(
        f"no integer inputs are exact for {spec.name}: an output sums {length} products, and the accumulator "
        f"({spec.accumulator_dtype}) and output ({spec.dtype}) hold integers up to {limit:.0f} and {output_limit:.0f}; "
        f"use fewer input channels, a smaller kernel or a wider dtype."
    )


def normal_inputs(spec: ConvTranspose2dSpec, seed: int) -> Inputs:
    """Normally distributed inputs, with weights scaled by ``1/sqrt(k)`` so that outputs are of order 1.

    ``k`` is the longest reduction. Tensors as of `integer_inputs`.
    """
    dtype: torch.dtype = getattr(torch, spec.dtype)
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    scale = 1 / sqrt(max(1, longest_reduction(spec)))
    input, weight = draw(spec.input_shape), draw(spec.weight_shape, scale)
    return in_format(spec, input), weight, draw(spec.bias_shape) if spec.bias else None


@dataclass(frozen=True, slots=True)
class Expected:
    """What outputs should be, and how far from it a correct kernel may be.

    Attributes
    ----------
    exact
        `reference`, ``(n, co, oh, ow)`` in float64.
    bound
        Largest permitted distance from it, of the same shape; see `expect`.
    lengths
        How many products each output sums, ``(1, 1, oh, ow)``.
    """

    exact: torch.Tensor
    bound: torch.Tensor
    lengths: torch.Tensor

    def ratio(self, output: torch.Tensor) -> torch.Tensor:
        """Each output's distance over its bound: infinite for NaN, and where a bound of 0 is not met."""
        error = (output.double() - self.exact).abs()
        return torch.where(error == 0, 0.0, error / self.bound).nan_to_num(nan=inf, posinf=inf)


def integer_reference(
    spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The output in int64, ``(n, co, oh, ow)``, of integer values in any dtype."""
    return _gather(spec, input.long(), weight.long(), None if bias is None else bias.long(), spec.groups)


def expect(
    spec: ConvTranspose2dSpec,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    operand_unit: float = 0.0,
) -> Expected:
    r"""The float64 reference and how far from it each output of a correct kernel may be.

    For a sum of ``k`` products (the bias counts as one more) evaluated in any order, with or without fused
    multiply-adds, N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.1, equation
    (3.5), gives

    .. math:: |fl(x^T w) - x^T w| \le \gamma_k |x|^T |w|, \qquad \gamma_k = \frac{k u}{1 - k u},

    with ``u`` half the spacing of the accumulator's floats at 1. To that come

    - the smallest subnormal for each product, which may underflow (Higham, section 2.2, equation (2.8); half of it
      would do but is not a float64);
    - where the output dtype is narrower than the accumulator, one rounding: ``u_out`` times the largest magnitude the
      accumulator may have, plus half of the smallest subnormal of the output dtype;
    - where inputs and weights are rounded to a narrower type before they are multiplied, by ``operand_unit`` of their
      value at most (`TF32_UNIT` for tf32), that share of either;
    - in bfloat16, what is lost where a subnormal input, weight, product or sum counts as zero, as in x86's instructions
      for it and in what PyTorch does with them: twice the smallest normal number times ``(|x| + 1)(|w| + 1)``;
    - the oracle's own ``gamma_k`` with ``u = 2**-53``.

    ``k`` is each output's own count, smaller at the borders. Where no tap reaches an output it is exactly the bias
    and its bound is 0; but in bfloat16 it may be zero for a subnormal bias.
    """
    accumulator = torch.finfo(getattr(torch, spec.accumulator_dtype))
    output = torch.finfo(getattr(torch, spec.dtype))
    products = _reduction_lengths(spec)
    terms = torch.where(products > 0, products + int(spec.bias), 0.0)
    exact = reference(spec, input, weight, bias)
    magnitude = reference(spec, input.abs(), weight.abs(), None if bias is None else bias.abs())

    def gamma(unit: float) -> torch.Tensor:
        return terms * unit / (1 - terms * unit)

    rounded = (1 + operand_unit) ** 2
    bound = (gamma(accumulator.eps / 2) * rounded + (rounded - 1)) * magnitude
    bound = bound + products * (accumulator.smallest_normal * accumulator.eps)
    if spec.dtype == "bfloat16":
        bound = bound + 2 * accumulator.smallest_normal * reference(spec, input.abs() + 1, weight.abs() + 1, None)
        subnormal = exact.abs() < accumulator.smallest_normal
        bound = bound + torch.where((products == 0) & subnormal, exact.abs(), 0.0)
    if spec.dtype != spec.accumulator_dtype:
        rounding = (output.eps / 2) * (exact.abs() + bound) + output.smallest_normal * output.eps / 2
        bound = bound + torch.where(products > 0, rounding, 0.0)
    bound = bound + gamma(torch.finfo(torch.float64).eps / 2) * magnitude
    return Expected(exact, bound, products)


def error_bound(
    spec: ConvTranspose2dSpec,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    operand_unit: float = 0.0,
) -> torch.Tensor:
    """How far each output of a correct kernel may be from `reference`: the bound of `expect` alone."""
    return expect(spec, input, weight, bias, operand_unit=operand_unit).bound
