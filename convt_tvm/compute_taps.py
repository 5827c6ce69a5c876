"""The phase form with channels summed before taps: the arithmetic of `convt_tvm.compute` in another order.

    product[n, g, m, f] += panel[n, g, f / J, ic, f % J] * packed[g*T + m / R, 0, 0, ic, m % R]

over the input channels ``ic`` of a group, in parts, for each row ``m = (channel*KH + kh)*KW + kw`` of its weights and
each position ``f = row*iw + column`` of the image, in tiles of ``R`` rows and ``J`` positions (see `TapLayout`). Then

    acc[n, g, b, ph, qh, ob, pw, qw] += product[n, g, m, f]

over the taps ``th``, ``tw`` that read inside the image. No product is of the border.
"""

from collections.abc import Callable
from typing import Any

from tvm import ir, te, tirx

from convt_tvm.compute import SUMS, Source, create_function, finish_bands, parameters, phase_function, phase_value
from convt_tvm.layout import Band
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.tap_layout import TapLayout, summed_channels
from convt_tvm.target import Target

__all__ = [
    "PANEL",
    "PART",
    "PRODUCT",
    "declare_gathered",
    "declare_tap_pack",
    "declare_tap_phases",
    "tap_layout_of",
    "weight_at",
]

PANEL, PART, PRODUCT = "panel", "part", "product"
"""Names of blocks and buffers: positions of the image, sums of some channels, and of all."""

Expr = Any


def declare_tap_phases(spec: ConvTranspose2dSpec, layout: TapLayout, target: Target) -> tirx.PrimFunc:
    """The phase form of `spec` as a PrimFunc to schedule; parameters and bands as of `compute.declare_phases`."""
    return declare_gathered(spec, layout, target, _multiply)


def declare_gathered(
    spec: ConvTranspose2dSpec, layout: TapLayout, target: Target, multiply: Callable[..., Any]
) -> tirx.PrimFunc:
    """The phase form that gathers taps of sums over channels, which ``multiply(spec, layout, data, packed)`` gives."""
    spec, data, packed, bias = parameters(spec, layout)
    product = multiply(spec, layout, data, packed)

    def accumulate(band: Band) -> Any:
        return _gather(spec, layout, band, data.batch, product)

    outputs = finish_bands(spec, layout, data.batch, bias, accumulate)
    return phase_function(spec, layout, target, [data.tensor, packed, bias], outputs)


def _multiply(spec: ConvTranspose2dSpec, layout: TapLayout, data: Source, packed: Any) -> Any:
    """The sums over channels for each row of the weights and each position."""
    batch, channels, places = data.tensor.shape[0], spec.ci // spec.groups, spec.ih * spec.iw
    rows, columns = layout.weight_rows, layout.positions

    def read(n: Expr, g: Expr, tile: Expr, ic: Expr, j: Expr) -> Expr:
        f = tile * columns + j
        # A place counts the columns of all rows from the first one on.
        value = data.at(n, g * channels + ic, 0, f).astype(spec.accumulator_dtype)
        if places % columns == 0:
            return value
        return tirx.if_then_else(f < places, value, tirx.const(0, spec.accumulator_dtype))

    panel = te.compute((batch, spec.groups, layout.panels(spec), channels, columns), read, name=PANEL)
    size = summed_channels(spec)
    ic, parts = te.reduce_axis((0, size), name="ic"), te.reduce_axis((0, channels // size), name="ic_part")

    def part(n: Expr, g: Expr, m: Expr, f: Expr, k: Expr) -> Expr:
        channel = k * size + ic
        value = panel[n, g, tirx.indexdiv(f, columns), channel, tirx.indexmod(f, columns)]
        tile = g * layout.row_tiles(spec) + tirx.indexdiv(m, rows)
        return te.sum(value * packed[tile, 0, 0, channel, tirx.indexmod(m, rows)], axis=[ic])

    shape = batch, spec.groups, layout.matrix_rows(spec), layout.panels(spec) * columns
    sums = te.compute((*shape, channels // size), part, name=PART)
    if channels == size:
        return te.compute(shape, lambda *place: sums[(*place, 0)], name=PRODUCT)
    return te.compute(shape, lambda *place: te.sum(sums[(*place, parts)], axis=[parts]), name=PRODUCT)


def _gather(spec: ConvTranspose2dSpec, layout: TapLayout, band: Band, batch: Expr, product: Any) -> Any:
    """The sums of one band over taps."""
    column_phases = spec.axes[1].phases
    column_taps = [phase.taps for phase in column_phases]
    step_h, step_w = band.phases[0].input_step, column_phases[0].input_step
    tap_step_h, tap_step_w = band.phases[0].tap_step, column_phases[0].tap_step
    row_base, row_tap = [phase.base for phase in band.phases], [phase.first_tap for phase in band.phases]
    column_base = [phase.base if phase.taps else 0 for phase in column_phases]
    column_tap = [phase.first_tap if phase.taps else 0 for phase in column_phases]
    th = te.reduce_axis((0, band.taps), name="th")
    tw = te.reduce_axis((0, max(column_taps)), name="tw")
    kernel_height, kernel_width = spec.kernel_size

    def total(n: Expr, g: Expr, b: Expr, ph: Expr, qh: Expr, ob: Expr, pw: Expr, qw: Expr) -> Expr:
        row = qh + phase_value(row_base, ph) - th * step_h
        column = qw + phase_value(column_base, pw) - tw * step_w
        kh, kw = phase_value(row_tap, ph) + th * tap_step_h, phase_value(column_tap, pw) + tw * tap_step_w
        m = ((b * layout.co_block + ob) * kernel_height + kh) * kernel_width + kw
        checks = [row >= 0, row < spec.ih, column >= 0, column < spec.iw]
        checks += [tw < phase_value(column_taps, pw)] if min(column_taps) < max(column_taps) else []
        value = product[n, g, m, row * spec.iw + column]
        return te.sum(tirx.if_then_else(tirx.all(*checks), value, tirx.const(0, spec.accumulator_dtype)), axis=[th, tw])

    lead = batch, spec.groups, layout.blocks(spec), len(band.phases), layout.rows(band)
    tile = layout.co_block, len(column_phases), layout.columns(spec)
    return te.compute((*lead, *tile), total, name=f"{SUMS}{band.index}")


def declare_tap_pack(spec: ConvTranspose2dSpec, layout: TapLayout, target: Target) -> tirx.PrimFunc:
    """The packing of a plain weight: ``weight`` (ci, co/groups, kh, kw) to ``ordered``, of `TapLayout.packed_shape`.

    ``ordered[tile, 0, 0, ic, r]`` is that of row ``tile*R + r`` of its group; rows that fill up a tile are zero.
    """
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")

    def order(block: Expr, y: Expr, x: Expr, ic: Expr, r: Expr) -> Expr:
        return weight_at(spec, layout, weight, block, r, ic).astype(spec.accumulator_dtype)

    function = create_function([weight, te.compute(layout.packed_shape(spec), order, name="ordered")])
    return function.with_attrs({"convt.spec": spec.name, "convt.layout": layout.to_json()})


def weight_at(spec: ConvTranspose2dSpec, layout: TapLayout, weight: Any, block: Expr, row: Expr, ic: Expr) -> Expr:
    """The weight of input channel `ic` of a group for a `row` of a tile, whose `block` counts those of all groups.

    Zero where there is no such row.
    """
    in_channels, out_channels = spec.ci // spec.groups, spec.co // spec.groups
    tiles, (kernel_height, kernel_width) = layout.row_tiles(spec), spec.kernel_size
    taps = kernel_height * kernel_width
    group, m = tirx.indexdiv(block, tiles), tirx.indexmod(block, tiles) * layout.weight_rows + row
    channel, tap = tirx.indexdiv(m, taps), tirx.indexmod(m, taps)
    place = group * in_channels + ic, channel, tirx.indexdiv(tap, kernel_width), tirx.indexmod(tap, kernel_width)
    if out_channels * taps == layout.matrix_rows(spec):
        return weight[place]
    return tirx.if_then_else(m < out_channels * taps, weight[place], tirx.const(0, spec.dtype))


def tap_layout_of(function: ir.BaseFunc) -> TapLayout:
    """The layout that `function` was declared with."""
    return TapLayout.from_json(function.attrs["convt.layout"])
