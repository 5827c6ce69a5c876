"""Where conformance cases come from: torch's own samples, ONNX's node tests, and a seed.

Only their configurations are taken; the lab puts its own data through them, which tells more than a sample's.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from convt_tvm.errors import SpecError
from convt_tvm.fuzz import fuzzed_specs
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

__all__ = ["FAMILIES", "FUZZ", "Case", "OnnxNode", "missing_families", "onnx_nodes", "sampled_cases", "spec_of_onnx"]

FUZZ = "fuzz"


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration to try; without a spec it is out of scope, for the reason given."""

    name: str
    spec: ConvTranspose2dSpec | None
    reason: str = ""


def _spec_of_call(input: torch.Tensor, weight: torch.Tensor, bias: Any, **parameters: Any) -> ConvTranspose2dSpec:
    """The spec of a call of ``conv_transpose2d``; an input without a batch is a batch of one."""
    n, ci, ih, iw = input.shape if input.ndim == 4 else (1, *input.shape)
    groups = parameters.get("groups", 1)
    return ConvTranspose2dSpec(
        n=n,
        ci=ci,
        ih=ih,
        iw=iw,
        co=weight.shape[1] * groups,
        kernel_size=tuple(weight.shape[2:]),
        bias=bias is not None,
        dtype=str(input.dtype),
        **parameters,
    )


def _operator_samples() -> Iterator[Case]:
    """The samples of ``torch.nn.functional.conv_transpose2d``, in every dtype."""
    from torch.testing._internal.common_methods_invocations import op_db

    names = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    operator: Any
    (operator,) = [op for op in op_db if op.name == "nn.functional.conv_transpose2d"]
    for dtype in DTYPE_BYTES:
        for number, sample in enumerate(operator.sample_inputs("cpu", getattr(torch, dtype))):
            arguments = {"bias": None, **dict(zip(names, sample.args, strict=False)), **sample.kwargs}
            yield Case(f"{dtype} sample {number}", _spec_of_call(sample.input, **arguments))


def _module_samples() -> Iterator[Case]:
    """The inputs of the tests of ``torch.nn.ConvTranspose2d``, in every dtype."""
    from torch.testing._internal.common_modules import module_db

    (info,) = [info for info in module_db if info.module_cls is torch.nn.ConvTranspose2d]
    for dtype in DTYPE_BYTES:
        made = info.module_inputs_func(
            info, device="cpu", dtype=getattr(torch, dtype), requires_grad=False, training=False
        )
        for number, sample in enumerate(made):
            layer = torch.nn.ConvTranspose2d(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            (input,) = sample.forward_input.args
            yield Case(
                f"{dtype} module {number}",
                _spec_of_call(
                    input,
                    layer.weight,
                    layer.bias,
                    stride=layer.stride,
                    padding=layer.padding,
                    output_padding=layer.output_padding,
                    groups=layer.groups,
                    dilation=layer.dilation,
                ),
            )


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """A test case of ONNX's ConvTranspose node: its attributes, its inputs and the output it expects."""

    name: str
    attributes: dict[str, Any]
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


def onnx_nodes() -> Iterator[OnnxNode]:
    """ONNX's own test cases of the node; raises ImportError without onnx."""
    import onnx
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        # Collecting one node's cases computes those of all, some of which overflow on purpose.
        warnings.simplefilter("ignore")
        found = collect_testcases("ConvTranspose")
    for case in found:
        model: Any = case.model
        (node,) = model.graph.node
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        data: Any = case.data_sets
        ((inputs, outputs),) = data
        yield OnnxNode(case.name, attributes, tuple(map(torch.tensor, inputs)), torch.tensor(outputs[0]))


def spec_of_onnx(node: OnnxNode) -> ConvTranspose2dSpec:
    """The spec of a node test; an axis is added to a one-dimensional one.

    ONNX crops ``pads`` from both ends of an axis, torch ``padding`` from both and adds ``output_padding`` at the
    end: the same where the end loses no more than the beginning.

    Raises
    ------
    SpecError
        if torch's operator has no such thing.
    """
    input, weight = node.inputs[:2]
    axes = input.ndim - 2
    if axes > 2:
        raise SpecError(f"{axes} spatial axes; the operator has two.")

    def attribute(name: str, default: int) -> tuple[int, ...]:
        """By axis, those added in front; with a begin and an end where ONNX has both."""
        given = node.attributes.get(name) or [default] * axes
        return (default,) * (2 - axes) + tuple(given)

    stride, dilation, extra = attribute("strides", 1), attribute("dilations", 1), attribute("output_padding", 0)
    sizes, kernel = ((1,) * (2 - axes) + tuple(tensor.shape[2:]) for tensor in (input, weight))
    pads = list(node.attributes.get("pads", [0] * 2 * axes))
    crops = [(0, 0)] * (2 - axes) + list(zip(pads[:axes], pads[axes:], strict=True))
    wanted = node.attributes.get("output_shape")
    how = node.attributes.get("auto_pad", b"NOTSET").decode()
    if how.startswith("SAME"):
        wanted = [size * step for size, step in zip(sizes[2 - axes :], stride[2 - axes :], strict=True)]
    padding, output_padding = [], []
    for axis in range(2):
        begin, end = crops[axis]
        full = (sizes[axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 + extra[axis]
        if wanted and axis >= 2 - axes:
            total = full - wanted[axis - (2 - axes)]
            begin = max(0, total) // 2 if how != "SAME_LOWER" else -(-max(0, total) // 2)
            end = total - begin
        padding.append(begin)
        output_padding.append(extra[axis] + begin - end)
    if min(output_padding) < 0:
        raise SpecError(f"more is cropped from the end of an axis than from its beginning, by {-min(output_padding)}.")
    groups = node.attributes.get("group", 1)
    return ConvTranspose2dSpec(
        n=input.shape[0],
        ci=input.shape[1],
        ih=sizes[0],
        iw=sizes[1],
        co=weight.shape[1] * groups,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        bias=len(node.inputs) > 2,
    )


def _onnx_cases() -> Iterator[Case]:
    for node in onnx_nodes():
        try:
            yield Case(node.name, spec_of_onnx(node))
        except SpecError as error:
            yield Case(node.name, None, str(error))


Gather: TypeAlias = Callable[[], Iterator[Case]]

FAMILIES: dict[str, Gather] = {
    "torch operator samples": _operator_samples,
    "torch module tests": _module_samples,
    "ONNX node tests": _onnx_cases,
}
"""Cases by where they come from, apart from `FUZZ`."""


def missing_families() -> dict[str, str]:
    """The families whose cases cannot be had here, and what they lack."""
    found = {}
    for family, gather in FAMILIES.items():
        try:
            next(gather(), None)
        except ImportError as error:
            found[family] = f"no module {error.name}; pip install 'convt-tvm[peers]'"
    return found


def sampled_cases(family: str, seed: int, numbers: range) -> Sequence[Case]:
    """The numbered cases of a family; `seed` matters for `FUZZ` only, which has no end.

    Raises
    ------
    ImportError
        if the family's package is not installed.
    """
    if family == FUZZ:
        return [Case(f"{seed}/{number}", spec) for number, spec in fuzzed_specs(seed, numbers)]
    return list(itertools.islice(FAMILIES[family](), numbers.start, numbers.stop))
