"""The phase form with channels summed before taps in a tile unit: `convt_tvm.compute_taps` on pairs of channels.

    product[n, g, m, f] += panel[n, g, f / J, ks*K + kp, f % J, j] * packed[g*T + m / R, 0, 0, ks, (m % R, kp, j)]

over ``ks``, ``kp``, ``j``: the input channel ``2*(ks*K + kp) + j`` in steps of ``K`` pairs, as tiles multiply them.
"""

from typing import Any

from tvm import ir, te, tirx

from convt_tvm.compute import Source, create_function
from convt_tvm.compute_taps import PANEL, PRODUCT, declare_gathered, weight_at
from convt_tvm.compute_tiles import BITS
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tile_tap_layout import TileTapLayout

__all__ = ["declare_tile_tap_pack", "declare_tile_tap_phases", "tile_tap_layout_of"]

Expr = Any


def declare_tile_tap_phases(spec: ConvTranspose2dSpec, layout: TileTapLayout, target: Target) -> tirx.PrimFunc:
    """The phase form of `spec` as a PrimFunc to schedule; parameters and bands as of `compute.declare_phases`."""
    return declare_gathered(spec, layout, target, _multiply)


def _multiply(spec: ConvTranspose2dSpec, layout: TileTapLayout, data: Source, packed: Any) -> Any:
    """The sums over channels for each row of the weights and each position."""
    batch, channels, places = data.tensor.shape[0], spec.ci // spec.groups, spec.ih * spec.iw
    rows, columns, pairs = layout.weight_rows, layout.positions, layout.tiles.pairs(spec)

    def read(n: Expr, g: Expr, tile: Expr, pair: Expr, position: Expr, j: Expr) -> Expr:
        f, channel = tile * columns + position, 2 * pair + j
        # A place counts the columns of all rows from the first one on.
        value = tirx.reinterpret(BITS, data.at(n, g * channels + channel, 0, f))
        checks = [f < places] if places % columns else []
        checks += [channel < channels] if channels < 2 * layout.pairs(spec) else []
        return tirx.if_then_else(tirx.all(*checks), value, tirx.const(0, BITS)) if checks else value

    panel = te.compute((batch, spec.groups, layout.panels(spec), layout.pairs(spec), columns, 2), read, name=PANEL)
    extents = {"ks": layout.tiles.steps(spec), "kp": pairs, "j": 2}
    axes = [te.reduce_axis((0, extent), name=name) for name, extent in extents.items()]
    ks, kp, j = axes

    def total(n: Expr, g: Expr, m: Expr, f: Expr) -> Expr:
        bits = panel[n, g, tirx.indexdiv(f, columns), ks * pairs + kp, tirx.indexmod(f, columns), j]
        tile, place = g * layout.row_tiles(spec) + tirx.indexdiv(m, rows), tirx.indexmod(m, rows) * pairs + kp
        weight = packed[tile, 0, 0, ks, place * 2 + j]
        value = tirx.reinterpret(spec.dtype, bits)
        return te.sum(value.astype(spec.accumulator_dtype) * weight.astype(spec.accumulator_dtype), axis=axes)

    shape = batch, spec.groups, layout.matrix_rows(spec), layout.panels(spec) * columns
    return te.compute(shape, total, name=PRODUCT)


def declare_tile_tap_pack(spec: ConvTranspose2dSpec, layout: TileTapLayout, target: Target) -> tirx.PrimFunc:
    """The packing of a plain weight: ``weight`` (ci, co/groups, kh, kw) to ``ordered``.

    ``ordered[tile, 0, 0, ks, (r*K + kp)*2 + j]`` is that of channel ``(ks*K + kp)*2 + j`` for row ``tile*R + r`` of its
    group; what fills up a step or a tile is zero.
    """
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")
    width = 2 * layout.tiles.pairs(spec)

    def order(block: Expr, y: Expr, x: Expr, ks: Expr, k: Expr) -> Expr:
        row, channel = tirx.indexdiv(k, width), ks * width + tirx.indexmod(k, width)
        value = weight_at(spec, layout, weight, block, row, channel)
        if spec.ci // spec.groups == 2 * layout.pairs(spec):
            return value
        return tirx.if_then_else(channel < spec.ci // spec.groups, value, tirx.const(0, spec.dtype))

    function = create_function([weight, te.compute(layout.packed_shape(spec), order, name="ordered")])
    return function.with_attrs({"convt.spec": spec.name, "convt.layout": layout.to_json()})


def tile_tap_layout_of(function: ir.BaseFunc) -> TileTapLayout:
    """The layout that `function` was declared with."""
    return TileTapLayout.from_json(function.attrs["convt.layout"])
