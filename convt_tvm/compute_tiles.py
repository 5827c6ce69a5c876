"""The phase form for a processor's tile unit: the arithmetic of `convt_tvm.compute`, its positions numbered in one row.

For each row band, with ``f = q + (base(ph) - th*step)*pitch + base(pw) - tw*step`` (see `TileLayout` for positions),

    acc[n, g, b, ph, chunk, pw, ob, p] += window[n, g, ks*K + kp, f, j] * packed[g*B + b, ..., ks, ob, kp, j]

over ``th``, ``tw``, ``ks``, ``kp``, ``j``: the input channel ``2*(ks*K + kp) + j`` in steps of ``K`` pairs, as tiles
multiply them, and ``q = chunk*chunk_rows*pitch + p``, or where ``chunk`` counts ``C`` chunks of columns in each of rows
``q = chunk/C*chunk_rows*pitch + chunk%C*chunk_columns + p``. With lanes along channels

    acc[n, g, b, ph, chunk, pw, p, ob] += window[n, f, g, ks, kp, j] * packed[g*B + b, ..., ks, kp, ob, j]

where the last four axes of the window are one, and the input itself may stand for it. Products and sums are in float32.
"""

from collections.abc import Callable
from typing import Any

from tvm import ir, te, tirx

from convt_tvm.compute import Source, Sums, create_function, finish, parameters, phase_function, phase_value
from convt_tvm.layout import Band, bands, column_starts, reaches
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tile_layout import TileLayout

__all__ = ["BITS", "ENDS_AT", "IN_TILES", "declare_tile_pack", "declare_tile_phases", "tile_layout_of"]

IN_TILES = "convt.in_tiles"
"""Annotation of a loop that a processor's tile unit takes the place of, or is configured for.

``zero``, ``multiply`` and ``store`` are the outermost loops around the sums of one tile of channels and positions being
set to zero, added to for one step of input channels, and written to memory; ``configure`` is the loop over tasks.
"""

ENDS_AT = "convt.ends_at"
"""Annotation of a loop over tiles of positions: how many there are; a tile that would end after them begins earlier."""

BITS = "uint16"
"""What bfloat16 numbers are copied as: TVM keeps intermediate ones in float32."""

Expr = Any
Image = Callable[[Expr, Expr, Expr, Expr, Expr], Expr]
"""The value for indices ``n, g, pair, f, j``: a group's pair of channels at a place, and which of the two."""


def declare_tile_phases(spec: ConvTranspose2dSpec, layout: TileLayout, target: Target) -> tirx.PrimFunc:
    """The phase form of `spec` as a PrimFunc to schedule; parameters and blocks as of `compute.declare_phases`."""
    spec, data, packed, bias = parameters(spec, layout)
    image = None
    outputs = []
    for band in bands(spec):
        sums = None
        if reaches(spec, band):
            image = _image(spec, layout, data) if image is None else image
            sums = _sums_of(spec, layout, band, _accumulate(spec, layout, band, data.batch, image, packed))
        outputs.append(finish(spec, layout, band, data.batch, sums, bias))
    return phase_function(spec, layout, target, [data.tensor, packed, bias], outputs)


def _image(spec: ConvTranspose2dSpec, layout: TileLayout, data: Source) -> Image:
    """The image, rows ``pitch`` apart and zeros around it: the input, or a window in pairs of channels or in NHWC."""
    window, pitch = layout.window(spec), layout.pitch(spec)
    (top, bottom), (left, right) = window.rows_inside, window.columns_inside
    channels, places = spec.ci // spec.groups, layout.image_rows(spec) * pitch
    pairs = layout.steps(spec) * layout.pairs(spec)

    def read(n: Expr, g: Expr, channel: Expr, f: Expr) -> Expr:
        row, column = tirx.indexdiv(f, pitch), tirx.indexmod(f, pitch)
        value = data.at(n, g * channels + channel, row + window.first_row, column + window.first_column)
        checks = [row >= top, row < bottom, column >= left, column < right]
        if channels < 2 * pairs:
            checks.append(channel < channels)
        return tirx.if_then_else(tirx.all(*checks), tirx.reinterpret(BITS, value), tirx.const(0, BITS))

    def read_pairs(n: Expr, g: Expr, pair: Expr, f: Expr, j: Expr) -> Expr:
        return read(n, g, 2 * pair + j, f)

    def read_places(n: Expr, f: Expr, c: Expr) -> Expr:
        if channels == 2 * pairs:
            return read(n, 0, c, f)
        return read(n, tirx.indexdiv(c, 2 * pairs), tirx.indexmod(c, 2 * pairs), f)

    batch = data.tensor.shape[0]
    if layout.reads_input(spec):
        # A place counts the columns of all rows from the first one on.
        return lambda n, g, pair, f, j: data.at(n, g * channels + 2 * pair + j, 0, f)
    if layout.by_positions:
        kept = te.compute((batch, places, spec.groups * 2 * pairs), read_places, name="window")
        return lambda n, g, pair, f, j: _number(kept[n, f, g * 2 * pairs + 2 * pair + j], spec)
    paired = te.compute((batch, spec.groups, pairs, places, 2), read_pairs, name="window")
    return lambda n, g, pair, f, j: _number(paired[n, g, pair, f, j], spec)


def _number(bits: Expr, spec: ConvTranspose2dSpec) -> Expr:
    return tirx.reinterpret(spec.dtype, bits)


def _accumulate(
    spec: ConvTranspose2dSpec, layout: TileLayout, band: Band, batch: Expr, image: Image, packed: Any
) -> Any:
    """The gathered reduction of one band."""
    origin, pitch, pairs = layout.window(spec), layout.pitch(spec), layout.pairs(spec)
    column_phases = spec.axes[1].phases
    column_taps = [phase.taps for phase in column_phases]
    column_start, blocks = column_starts(spec), layout.blocks(spec)
    step_h, step_w = band.phases[0].input_step, column_phases[0].input_step
    row_base = [(phase.base - origin.first_row) * pitch for phase in band.phases]
    row_tap = [phase.first_tap for phase in band.phases]
    column_base = [phase.base - origin.first_column if phase.taps else 0 for phase in column_phases]

    extents = {"th": band.taps, "tw": max(column_taps), "ks": layout.steps(spec), "kp": pairs, "j": 2}
    axes = [te.reduce_axis((0, extent), name=name) for name, extent in extents.items()]
    th, tw, ks, kp, j = axes

    def total(n: Expr, g: Expr, b: Expr, ph: Expr, c: Expr, pw: Expr, *of_tile: Expr) -> Expr:
        p, ob = of_tile if layout.by_positions else reversed(of_tile)
        place = _first_of_chunk(spec, layout, band, c) + p
        place += phase_value(row_base, ph) - th * (step_h * pitch) + phase_value(column_base, pw) - tw * step_w
        row, column = phase_value(row_tap, ph) + th * band.phases[0].tap_step, phase_value(column_start, pw) + tw
        value = image(n, g, ks * pairs + kp, place, j).astype(spec.accumulator_dtype)
        pair = kp * layout.co_block + ob if layout.by_positions else ob * pairs + kp
        weight = packed[g * blocks + b, row, column, ks, pair * 2 + j].astype(spec.accumulator_dtype)
        product = value * weight
        if min(column_taps) != max(column_taps):
            product = tirx.if_then_else(
                tw < phase_value(column_taps, pw), product, tirx.const(0, spec.accumulator_dtype)
            )
        return te.sum(product, axis=axes)

    lead = (batch, spec.groups, blocks, len(band.phases), layout.chunks(spec, band), len(column_phases))
    tile = layout.chunk_tiles(spec, band) * layout.positions, layout.co_block
    return te.compute((*lead, *(tile if layout.by_positions else reversed(tile))), total, name=f"acc{band.index}")


def _first_of_chunk(spec: ConvTranspose2dSpec, layout: TileLayout, band: Band, c: Expr) -> Expr:
    """The first position of chunk `c`."""
    of_rows, in_row = layout.chunk(band) * layout.pitch(spec), layout.column_chunks(spec)
    return tirx.indexdiv(c, in_row) * of_rows + tirx.indexmod(c, in_row) * layout.column_chunk


def _sums_of(spec: ConvTranspose2dSpec, layout: TileLayout, band: Band, acc: Any) -> Sums:
    """What gives the sum for each output."""
    chunk, pitch = layout.chunk(band), layout.pitch(spec)
    in_row, columns = layout.column_chunks(spec), layout.chunk_columns(spec)

    def sums(n: Expr, g: Expr, b: Expr, ob: Expr, ph: Expr, qh: Expr, qw: Expr, pw: Expr) -> Expr:
        # A zero that TVM cannot see through: a schedule then sums all positions of a chunk, which whole tiles divide.
        unknown = tirx.bitwise_and(qh, 0)
        place = tirx.indexmod(qh, chunk) * pitch + tirx.indexmod(qw, columns) + unknown
        of_tile = (place, ob) if layout.by_positions else (ob, place)
        c = tirx.indexdiv(qh, chunk) * in_row + tirx.indexdiv(qw, columns)
        return acc[(n, g, b, ph, c, pw, *of_tile)]

    return sums


def declare_tile_pack(spec: ConvTranspose2dSpec, layout: TileLayout, target: Target) -> tirx.PrimFunc:
    """The packing of a plain weight: ``weight`` (ci, co/groups, kh, kw) to ``ordered``.

    ``ordered[block, kh, kw, ks, k]`` is stored by `convt_tvm.lower` at the place of its kernel column. With ``K`` pairs
    of channels in a step, ``k = (ob*K + kp)*2 + j`` is channel ``(ks*K + kp)*2 + j`` for output channel ``ob`` of a
    block of ``O``; with lanes along channels ``k = (kp*O + ob)*2 + j`` is. What fills up a step or a block is zero.
    """
    in_channels, out_channels = spec.ci // spec.groups, spec.co // spec.groups
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")
    blocks, width = layout.blocks(spec), 2 * layout.pairs(spec)

    def order(block: Expr, y: Expr, x: Expr, ks: Expr, k: Expr) -> Expr:
        group, pair, j = tirx.indexdiv(block, blocks), tirx.indexdiv(k, 2), tirx.indexmod(k, 2)
        if layout.by_positions:
            kp, ob = tirx.indexdiv(pair, layout.co_block), tirx.indexmod(pair, layout.co_block)
        else:
            ob, kp = tirx.indexdiv(pair, width // 2), tirx.indexmod(pair, width // 2)
        channel, source = tirx.indexmod(block, blocks) * layout.co_block + ob, ks * width + 2 * kp + j
        checks = [channel < out_channels] if out_channels % layout.co_block else []
        if in_channels < layout.steps(spec) * width:
            checks.append(source < in_channels)
        value = weight[group * in_channels + source, channel, y, x]
        return tirx.if_then_else(tirx.all(*checks), value, tirx.const(0, spec.dtype)) if checks else value

    function = create_function([weight, te.compute(layout.packed_shape(spec), order, name="ordered")])
    return function.with_attrs({"convt.spec": spec.name, "convt.layout": layout.to_json()})


def tile_layout_of(function: ir.BaseFunc) -> TileLayout:
    """The layout that `function` was declared with."""
    return TileLayout.from_json(function.attrs["convt.layout"])
