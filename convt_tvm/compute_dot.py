"""The phase form for dot products of pairs of bfloat16: the arithmetic of `convt_tvm.compute` on pairs of channels.

A pair of input channels stands where a channel does there, as 32 bits, the first channel in the lower half:

    partial += low(window) * packed[..., pair, 2*ob] + high(window) * packed[..., pair, 2*ob + 1]

with products and sums in float32.
"""

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

from convt_tvm.bfloat16 import PAIR
from convt_tvm.compute import Source, create_function, finish_bands, parameters, phase_function, sum_products
from convt_tvm.dot_layout import DotLayout, paired, reads_pairs
from convt_tvm.layout import Band, Window
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["declare_dot_pack", "declare_dot_phases"]

Expr = Any


def declare_dot_phases(spec: ConvTranspose2dSpec, layout: DotLayout, target: Target) -> tirx.PrimFunc:
    """The phase form of `spec` as a PrimFunc to schedule; parameters and blocks as of `compute.declare_phases`."""
    spec, data, packed, bias = parameters(spec, layout)
    reads_them = reads_pairs(spec, layout)
    source = _Pairs(data.tensor, data.axes, images=data.images) if reads_them else _window(spec, layout, data)

    def multiply(pair: Expr, place: Sequence[Expr]) -> Expr:
        *lead, ob = place
        halves = (tirx.shift_left(pair, _bits(16)), tirx.bitwise_and(pair, _bits(0xFFFF0000)))
        low, high = (
            tirx.reinterpret(spec.accumulator_dtype, half) * packed[(*lead, 2 * ob + j)].astype(spec.accumulator_dtype)
            for j, half in enumerate(halves)
        )
        return low + high

    def accumulate(band: Band) -> Any:
        return sum_products(paired(spec), layout, band, source, multiply)

    outputs = finish_bands(spec, layout, data.batch, bias, accumulate)
    return phase_function(spec, layout, target, [data.tensor, packed, bias], outputs)


def _bits(value: int) -> Expr:
    return tirx.const(value, PAIR)


class _Pairs(Source):
    """The input itself, to be read by pairs of channels; in NHWC, where `lower_dot` makes one load of both."""

    def at(self, n: Expr, c: Expr, h: Expr, w: Expr) -> Expr:
        """The pair `c` of image `n` at row `h` and column `w`."""
        first, second = (_bits_of(Source.at(self, n, 2 * c + j, h, w)) for j in range(2))
        return tirx.bitwise_or(first, tirx.shift_left(second, _bits(16)))


def _bits_of(value: Expr) -> Expr:
    return tirx.reinterpret("uint16", value).astype(PAIR)


def _window(spec: ConvTranspose2dSpec, layout: DotLayout, data: Source) -> Source:
    """What the taps read, in NHWC, by pairs of channels; zeros fill up the border and the last pair of a group."""
    extent = Window.of(spec, layout)
    pairs = paired(spec).ci // spec.groups
    odd = spec.ci // spec.groups % 2
    (top, bottom), (left, right) = extent.rows_inside, extent.columns_inside

    def read(n: Expr, h: Expr, w: Expr, c: Expr) -> Expr:
        first = 2 * c - tirx.indexdiv(c, pairs) if odd else 2 * c

        def bits(channel: Expr) -> Expr:
            return _bits_of(data.at(n, channel, h + extent.first_row, w + extent.first_column))

        second = bits(first + 1)
        if odd:
            second = tirx.if_then_else(tirx.indexmod(c, pairs) < pairs - 1, second, _bits(0))
        value = tirx.bitwise_or(bits(first), tirx.shift_left(second, _bits(16)))
        if extent.is_inside:
            return value
        return tirx.if_then_else(tirx.all(h >= top, h < bottom, w >= left, w < right), value, _bits(0))

    window = te.compute((data.batch, extent.height, extent.width, spec.groups * pairs), read, name="window")
    return Source(window, "nhwc", (extent.first_row, extent.first_column))


def declare_dot_pack(spec: ConvTranspose2dSpec, layout: DotLayout, target: Target) -> tirx.PrimFunc:
    """The packing of a plain weight: ``weight`` (ci, co/groups, kh, kw) to ``ordered``.

    ``ordered[block, kh, kw, pair, k]`` is stored by `convt_tvm.lower` at the place of its kernel column; ``k = 2*ob +
    j`` is input channel ``2*pair + j`` for output channel ``ob``, and what fills up a pair or a block is zero.
    """
    in_channels, out_channels = spec.ci // spec.groups, spec.co // spec.groups
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")
    blocks = layout.blocks(spec)

    def order(block: Expr, y: Expr, x: Expr, pair: Expr, k: Expr) -> Expr:
        group = tirx.indexdiv(block, blocks)
        channel = tirx.indexmod(block, blocks) * layout.co_block + tirx.indexdiv(k, 2)
        source = 2 * pair + tirx.indexmod(k, 2)
        checks = [channel < out_channels] if out_channels % layout.co_block else []
        if in_channels % 2:
            checks.append(source < in_channels)
        value = weight[group * in_channels + source, channel, y, x]
        return tirx.if_then_else(tirx.all(*checks), value, tirx.const(0, spec.dtype)) if checks else value

    function = create_function([weight, te.compute(layout.packed_shape(spec), order, name="ordered")])
    return function.with_attrs({"convt.spec": spec.name, "convt.layout": layout.to_json()})
