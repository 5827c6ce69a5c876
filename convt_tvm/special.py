"""NaN, infinities, signed zeros and overflow: where they may go, and where they must not.

The rule is that of the definition: an output is the sum of the products of the taps that reach it, so a special value
goes to the outputs whose sum has it and to no other. The oracle is torch's float64 path, which forms those products and
no others; all other values are integers, so that every output without a special value has one right answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

from convt_tvm.check import Operator
from convt_tvm.reference import Inputs, integer_inputs, reference
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["SPECIAL_CASES", "SpecialCase", "SpecialResult", "judge_special", "special_inputs"]

Change: TypeAlias = Callable[[ConvTranspose2dSpec, torch.Tensor, torch.Tensor, torch.Tensor | None], None]


@dataclass(frozen=True, slots=True)
class SpecialCase:
    """A way to plant special values.

    ``in_weight`` marks those where a weight is not finite: README says of our kernels that such a weight may meet the
    zeros around the image.
    """

    name: str
    plant: Change
    in_weight: bool = False


@dataclass(frozen=True, slots=True)
class SpecialResult:
    """How outputs with special values compare with the definition.

    Attributes
    ----------
    wrong
        Outputs that are not what they should be, apart from ``border``.
    border
        Outputs that became NaN because a weight that is not finite met a zero of the border around the image.
    reason
        What is wrong, in words; empty if nothing is.
    """

    wrong: int
    border: int
    reason: str


def _centre(size: int) -> int:
    return size // 2


def _in_input(value: float) -> Change:
    def plant(spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        input[-1, 0, _centre(spec.ih), _centre(spec.iw)] = value

    return plant


def _in_weight(value: float) -> Change:
    def plant(spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        weight[0, 0, _centre(spec.kernel_size[0]), _centre(spec.kernel_size[1])] = value

    return plant


def _in_bias(value: float) -> Change:
    def plant(spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        if bias is not None:
            bias[-1] = value

    return plant


def _both_infinities(
    spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Side by side, so that somewhere one meets the other and somewhere it does not."""
    row, column = _centre(spec.ih), _centre(spec.iw)
    input[-1, 0, row, column] = torch.inf
    input[-1, 0, row, column - 1] = -torch.inf


def _infinity_times_zero(
    spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """One tap's weight is zero: NaN there, infinities at the others."""
    input[-1, 0, _centre(spec.ih), _centre(spec.iw)] = torch.inf
    weight[:, :, 0, 0] = 0


def _overflow(spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Products beyond the largest finite number of the dtype, of one sign in each output, so that no order matters."""
    input[-1, 0] = input[-1, 0].abs() * (torch.finfo(input.dtype).max / 16)
    weight[0] = 64
    weight[0, 1::2] = -64


def _negative_zeros(
    spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Every product is -0.0; a sum that starts from +0.0 is +0.0, one that does not is -0.0, and both equal 0."""
    input.fill_(-0.0)
    weight.abs_()
    if bias is not None:
        bias.fill_(-0.0)


SPECIAL_CASES = (
    SpecialCase("NaN in the input", _in_input(torch.nan)),
    SpecialCase("+Inf in the input", _in_input(torch.inf)),
    SpecialCase("-Inf in the input", _in_input(-torch.inf)),
    SpecialCase("+Inf beside -Inf", _both_infinities),
    SpecialCase("Inf times zero", _infinity_times_zero),
    SpecialCase("NaN in a weight", _in_weight(torch.nan), in_weight=True),
    SpecialCase("Inf in a weight", _in_weight(torch.inf), in_weight=True),
    SpecialCase("NaN in the bias", _in_bias(torch.nan)),
    SpecialCase("overflow", _overflow),
    SpecialCase("-0.0", _negative_zeros),
)


def special_inputs(spec: ConvTranspose2dSpec, seed: int) -> Iterator[tuple[SpecialCase, Inputs]]:
    """Integers with special values planted, for every case that the spec has room for."""
    for case in SPECIAL_CASES:
        inputs = integer_inputs(spec, seed)
        if case.plant is _both_infinities and spec.iw == 1:
            continue
        if spec.n == 0 or (inputs[2] is None and "bias" in case.name):
            continue
        case.plant(spec, *inputs)
        yield case, inputs


def judge_special(spec: ConvTranspose2dSpec, case: SpecialCase, inputs: Inputs, operator: Operator) -> SpecialResult:
    """Run the operator on special values and compare it with the definition, element by element."""
    input, weight, _ = inputs
    output = operator(*inputs)
    expected = reference(spec, *inputs).to(input.dtype)
    same = torch.where(expected.isnan(), output.isnan(), output == expected)
    border = torch.zeros_like(same)
    if case.in_weight:
        # With an input of ones everywhere, border included, NaN goes to all outputs whose phase has the tap.
        border = ~same & output.isnan() & _phase_of_the_weight(spec, weight)
    wrong = ~same & ~border
    reason = ""
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        reason = (
            f"{int(wrong.sum())} of {wrong.numel()} outputs are wrong; at {first} it is {float(output[first])} instead "
            f"of {float(expected[first])}"
        )
    elif border.any():
        reason = (
            f"{int(border.sum())} outputs at the border are NaN, where that weight meets the zeros around the image"
        )
    return SpecialResult(int(wrong.sum()), int(border.sum()), reason)


def _phase_of_the_weight(spec: ConvTranspose2dSpec, weight: torch.Tensor) -> torch.Tensor:
    """Where the weight that is not finite would be read if the image went on for ever, as a mask of the outputs."""
    ci, local, row, column = (~weight.isfinite()).nonzero()[0].tolist()
    mask = torch.zeros(spec.output_shape, dtype=torch.bool)
    start = [
        (tap * dilation - padding) % stride
        for tap, dilation, padding, stride in zip((row, column), spec.dilation, spec.padding, spec.stride, strict=True)
    ]
    channel = ci // (spec.ci // spec.groups) * (spec.co // spec.groups) + local
    mask[:, channel, start[0] :: spec.stride[0], start[1] :: spec.stride[1]] = True
    return mask
