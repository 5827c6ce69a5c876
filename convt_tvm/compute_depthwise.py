"""The phase form for one channel in each group: the arithmetic of `convt_tvm.compute` with groups side by side.

    partial += window[n, row, column, b*B + ob] * packed[b, ..., 0, ob]

A vector of groups of the input, not a value that is broadcast, meets a vector of weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from convt_tvm.compute import (
    Source,
    copied_window,
    create_function,
    finish_bands,
    parameters,
    phase_function,
    sum_products,
)
from convt_tvm.depthwise_layout import DepthwiseLayout, joined
from convt_tvm.layout import Band, reads_input
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["declare_depthwise_pack", "declare_depthwise_phases"]

Expr = Any


class _Places(Source):
    """A tensor of all groups, of which a place holds one value for each."""

    def at(self, n: Expr, c: Expr, h: Expr, w: Expr) -> Callable[[Expr], Expr]:
        """What gives the value of a group there."""
        return lambda group: Source.at(self, n, group, h, w)


def declare_depthwise_phases(spec: ConvTranspose2dSpec, layout: DepthwiseLayout, target: Target) -> tirx.PrimFunc:
    """The phase form of `spec` as a PrimFunc to schedule; parameters and blocks as of `compute.declare_phases`.

    Its spec, as far as schedules are concerned, is that of `joined` groups.
    """
    spec, data, packed, bias = parameters(spec, layout)
    source = data if reads_input(spec, layout) else copied_window(spec, layout, data)
    places, one = _Places(source.tensor, source.axes, source.origin), joined(spec)

    def multiply(value: Callable[[Expr], Expr], place: Sequence[Expr]) -> Expr:
        return value(place[0] * layout.co_block + place[-1]) * packed[tuple(place)]

    def accumulate(band: Band) -> Any:
        return sum_products(one, layout, band, places, multiply)

    outputs = finish_bands(one, layout, data.batch, bias, accumulate)
    return phase_function(one, layout, target, [data.tensor, packed, bias], outputs)


def declare_depthwise_pack(spec: ConvTranspose2dSpec, layout: DepthwiseLayout, target: Target) -> tirx.PrimFunc:
    """The packing of a plain weight: ``weight`` (groups, 1, kh, kw) to ``ordered``, as of `compute.declare_pack`."""
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")

    def order(block: Expr, y: Expr, x: Expr, ic: Expr, ob: Expr) -> Expr:
        return weight[block * layout.co_block + ob, ic, y, x].astype(spec.accumulator_dtype)

    function = create_function([weight, te.compute(layout.packed_shape(spec), order, name="ordered")])
    return function.with_attrs({"convt.spec": spec.name, "convt.layout": layout.to_json()})
