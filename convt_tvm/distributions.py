"""Inputs that bring out one kind of error each, and a guard against inputs that would bring out none.

Every distribution keeps outputs within the range of the spec's dtype. ``k`` below is the longest reduction.
"""

from collections.abc import Callable
from itertools import product
from math import ceil, log2
from typing import TypeAlias

import torch

from convt_tvm.errors import InputsError
from convt_tvm.reference import Inputs, integer_inputs, longest_reduction, normal_inputs
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["DISTRIBUTIONS", "require_telling", "telling_integers"]

Draw: TypeAlias = Callable[[ConvTranspose2dSpec, int], Inputs]

_ATTEMPTS = 64
_LOWEST_EXPONENT = {"float16": -10, "bfloat16": -40, "float32": -40, "float64": -300}
_HIGHEST_EXPONENT = 3
_RIPPLE = 2.0**-7


def _finish(spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Inputs:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return input.to(dtype), weight.to(dtype), bias.to(dtype) if spec.bias else None


def _shapes(spec: ConvTranspose2dSpec) -> tuple[tuple[int, ...], ...]:
    return spec.input_shape, spec.weight_shape, spec.bias_shape


def _uniform(spec: ConvTranspose2dSpec, seed: int) -> Inputs:
    """Everything from 0 to 1, weights divided by ``k``: no sign changes, so that rounding errors add up."""
    generator = torch.Generator().manual_seed(seed)
    input, weight, bias = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in _shapes(spec))
    return _finish(spec, input, weight / max(1, longest_reduction(spec)), bias)


def _cancellation(spec: ConvTranspose2dSpec, seed: int) -> Inputs:
    """Inputs near 1 and weights that add up to nearly 0 over the taps and channels of every phase; no bias to speak of.

    Away from the borders outputs are about a hundred times smaller than the sum of their products' magnitudes. A phase
    with a single product has nothing to cancel with and keeps its weight.
    """
    generator = torch.Generator().manual_seed(seed)
    input, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in _shapes(spec))
    input = 1 + _RIPPLE * input
    bias = _RIPPLE * bias
    per_group = spec.ci // spec.groups
    grouped = weight.view(spec.groups, per_group, *weight.shape[1:])
    for row, column in product(*(axis.phases for axis in spec.axes)):
        if row.taps * column.taps * per_group > 1:
            rows, columns = (
                slice(taps.start, taps.stop, taps.step) for taps in (row.kernel_indices, column.kernel_indices)
            )
            grouped[..., rows, columns] -= grouped[..., rows, columns].mean(dim=(1, 3, 4), keepdim=True)
    return _finish(spec, input, weight / max(1, longest_reduction(spec)), bias)


def _wide(spec: ConvTranspose2dSpec, seed: int) -> Inputs:
    """Magnitudes over the dtype's range of exponents, all exponents equally likely, weights divided by ``k``.

    The few largest products decide an output; the others must neither be lost nor spoil it.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = _LOWEST_EXPONENT[spec.dtype], _HIGHEST_EXPONENT

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        exponent = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = 2.0 * torch.randint(0, 2, shape, generator=generator) - 1
        return sign * torch.exp2(exponent)

    input, weight, bias = map(draw, _shapes(spec))
    return _finish(spec, input, weight * 2.0 ** -ceil(log2(max(1, longest_reduction(spec)))), bias)


def _subnormal(spec: ConvTranspose2dSpec, seed: int) -> Inputs:
    """Weights and bias below the dtype's smallest normal number: a flush to zero loses them whole."""
    tiny = torch.finfo(getattr(torch, spec.dtype)).smallest_normal / 8
    generator = torch.Generator().manual_seed(seed)
    input, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in _shapes(spec))
    return _finish(spec, input, weight * tiny, bias * tiny)


DISTRIBUTIONS: dict[str, Draw] = {
    "normal": normal_inputs,
    "uniform": _uniform,
    "cancellation": _cancellation,
    "wide": _wide,
    "subnormal": _subnormal,
}
"""Real data by name; each is a function of spec and seed, and always gives the same for the same."""


def require_telling(
    spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise InputsError for data on which a wrong kernel could be right.

    That is, where

    - an input or a bias is zero: nobody would miss it;
    - some tap's weights are zero for some output channel, or some input channel's: it could be left out;
    - a tensor is constant along an axis: an index off by one there would not show.
    """
    given = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name in given.keys() - {"weight"}:
        if (zeros := int((given[name] == 0).sum())) > 0:
            raise InputsError(
                f"{zeros} of {given[name].numel()} values of the {name} are zero; draw values without zeros."
            )
    grouped = (weight != 0).view(spec.groups, spec.ci // spec.groups, *weight.shape[1:])
    if not (used := grouped.any(dim=1)).all():
        raise InputsError(
            f"{int((~used).sum())} of {used.numel()} taps of the output channels have no weight other than zero; draw "
            "denser weights."
        )
    if not (reached := (weight != 0).flatten(1).any(dim=1)).all():
        raise InputsError(
            f"{int((~reached).sum())} of {spec.ci} input channels have no weight other than zero; draw denser weights."
        )
    for name, tensor in given.items():
        for axis, size in enumerate(tensor.shape):
            if size > 1 and torch.equal(tensor.narrow(axis, 0, size - 1), tensor.narrow(axis, 1, size - 1)):
                raise InputsError(
                    f"the {name} is constant along axis {axis}: an index off by one would not show; draw other values."
                )


def telling_integers(spec: ConvTranspose2dSpec, seed: int) -> Inputs:
    """`integer_inputs` of the first seed from `seed` on that `require_telling` accepts.

    Raises
    ------
    InputsError
        if 64 seeds give none.
    SpecError
        if no integer inputs are exact for the spec.
    """
    for attempt in range(_ATTEMPTS):
        inputs = integer_inputs(spec, seed + attempt)
        try:
            require_telling(spec, *inputs)
        except InputsError as error:
            reason = str(error)
        else:
            return inputs
    raise InputsError(f"none of {_ATTEMPTS} seeds from {seed} on gives integers that tell for {spec.name}: {reason}")
