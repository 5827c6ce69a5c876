"""The phase form for the threads of a GPU: the arithmetic of `convt_tvm.compute`, its axes split as threads share them.

For each row band

    acc[n, g, b, ph, rb, cb, pb, tz, ty, tr, tc, oc, qc, pi] += window[n, g, ic, qh + base(ph) - th*step, ...]
                                                              * packed[g*B + b, start(ph) + th, start(pw) + tw, ic, ob]

with ``ob = ty*channel_tile + oc``, ``qh = rb*row_block + tr``, ``qw = (cb*column_tile + qc)*column_threads + tc``,
``pw = pb*phases + pi`` and ``ic = (io*depth_threads + tz)*depth + ii``, ``depth`` being the channels of a thread in a
step: what belongs to one thread, ``oc, qc, pi``, is a box of whole axes. A schedule then binds axes and splits none, so
no division appears in an index, and the region a thread needs is exact although its columns are
`ThreadLayout.column_threads` apart. Where threads share the input channels, ``band`` adds up what each has, in order:

    parts[..., tz, oc, qc, pi, ty, tr, tc] = acc
    band[n, g, b, ph, rb, cb, pb, ty, oc, tr, qc, tc, pi] = parts[..., 0, ...] + parts[..., 1, ...] + ... + bias

The window has a stage for each band, since each band is a kernel of its own. Nothing but the output is in global
memory.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tvm import ir, te, tirx

from convt_tvm.compute import lookup, parameters
from convt_tvm.layout import Band, Layout, Window, bands, column_starts, reaches
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.thread_layout import ThreadLayout, row_starts

__all__ = ["cuda_function", "declare_thread_pack", "declare_thread_phases", "progression", "thread_layout_of"]

Expr = Any


def declare_thread_phases(spec: ConvTranspose2dSpec, layout: ThreadLayout, target: Target) -> tirx.PrimFunc:
    """The phase form of `spec` as a PrimFunc to schedule.

    Parameters are ``input``, ``packed``, ``bias`` where the spec has one, and ``band0``, ``band1``, ... with the axes
    of `_finish`. Blocks are named ``window<k>``, ``acc<k>``, ``parts<k>`` and ``band<k>``.
    """
    _, source, packed, bias = parameters(spec, layout)
    data = source.tensor
    outputs = []
    for band in bands(spec):
        acc = _accumulate(spec, layout, band, data, packed) if reaches(spec, band) else None
        outputs.append(_finish(spec, layout, band, acc, bias))
    return cuda_function([data, packed, *([bias] if spec.bias else []), *outputs], spec, layout, target)


def cuda_function(arguments: list[Any], spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> tirx.PrimFunc:
    """A PrimFunc of TE tensors, as all declarations for GPUs make theirs.

    TE declares parameters as aligned to 64 bytes. Global memory is accessed one element at a time, which needs no such
    thing; but copies in shared memory have the alignment of their source, and with it nvcc reads them as vectors.
    """
    attributes = {"convt.spec": spec.name, "convt.layout": layout.to_json(), "convt.target": target.name}
    return te.create_prim_func(arguments).with_attrs({**attributes, "global_symbol": "main"})


def _grid(spec: ConvTranspose2dSpec, layout: ThreadLayout, band: Band) -> tuple[int, ...]:
    """Extents of the axes n, g, b, ph, rb, cb, pb of a band: its thread blocks."""
    return (
        spec.input_shape[0],
        spec.groups,
        layout.blocks(spec),
        len(band.phases),
        layout.rows(band) // layout.row_block,
        layout.columns(spec) // layout.column_block,
        len(spec.axes[1].phases) // layout.phases,
    )


def _threads(layout: ThreadLayout) -> tuple[int, ...]:
    """Extents of the axes ty, tr, tc."""
    return layout.channel_threads, layout.row_block, layout.column_threads


def _tile(layout: ThreadLayout) -> tuple[int, ...]:
    """Extents of the axes oc, qc, pi."""
    return layout.channel_tile, layout.column_tile, layout.phases


def progression(values: Sequence[int], index: Expr) -> Expr:
    """``values[index]``, by arithmetic where that will do: the region of a part of them is then found exactly."""
    steps = {after - before for before, after in pairwise(values)}
    return values[0] + index * steps.pop() if len(steps) == 1 else lookup(values, index)


def _window(spec: ConvTranspose2dSpec, layout: ThreadLayout, extent: Window, data: Any, name: str) -> Any:
    """What the taps read, the border and surplus channels as zeros: to be copied to shared memory, or inlined."""
    (top, bottom), (left, right) = extent.rows_inside, extent.columns_inside
    channels, depth = spec.ci // spec.groups, layout.steps(spec) * layout.depth_block
    zero = tirx.const(0, spec.accumulator_dtype)

    def read(n: Expr, g: Expr, ic: Expr, h: Expr, w: Expr) -> Expr:
        place = n, g * channels + ic, h + extent.first_row, w + extent.first_column
        conditions = [] if extent.is_inside else [h >= top, h < bottom, w >= left, w < right]
        conditions += [ic < channels] if channels < depth else []
        value = data[place].astype(spec.accumulator_dtype)
        return tirx.if_then_else(tirx.all(*conditions), value, zero) if conditions else value

    return te.compute((spec.input_shape[0], spec.groups, depth, extent.height, extent.width), read, name=name)


def _accumulate(spec: ConvTranspose2dSpec, layout: ThreadLayout, band: Band, data: Any, packed: Any) -> Any:
    """The gathered reduction of one band."""
    extent = Window.of(spec, layout)
    window = _window(spec, layout, extent, data, f"window{band.index}")
    depth, blocks = layout.depth_block // layout.depth_threads, layout.blocks(spec)
    column_phases = spec.axes[1].phases
    column_taps = [phase.taps for phase in column_phases]
    column_base = [phase.base - extent.first_column if phase.taps else 0 for phase in column_phases]
    column_start = column_starts(spec)
    row_base = [phase.base - extent.first_row for phase in band.phases]
    row_start = [row_starts(spec)[phase.residue] for phase in band.phases]
    step_h, step_w = band.phases[0].input_step, column_phases[0].input_step
    zero = tirx.const(0, spec.accumulator_dtype)

    io = te.reduce_axis((0, layout.steps(spec)), name="io")
    ii = te.reduce_axis((0, depth), name="ii")
    th = te.reduce_axis((0, band.taps), name="th")
    tw = te.reduce_axis((0, max(column_taps)), name="tw")

    def total(*axes: Expr) -> Expr:
        n, g, b, ph, rb, cb, pb, tz, ty, tr, tc, oc, qc, pi = axes
        ob, pw = ty * layout.channel_tile + oc, pb * layout.phases + pi
        ic = (io * layout.depth_threads + tz) * depth + ii
        qh, qw = rb * layout.row_block + tr, (cb * layout.column_tile + qc) * layout.column_threads + tc
        row = qh + lookup(row_base, ph) - th * step_h
        column = qw + lookup(column_base, pw) - tw * step_w
        value = window[n, g, ic, row, column]
        weight = packed[g * blocks + b, progression(row_start, ph) + th, progression(column_start, pw) + tw, ic, ob]
        product = value * weight
        if min(column_taps) != max(column_taps):
            product = tirx.if_then_else(tw < lookup(column_taps, pw), product, zero)
        return te.sum(product, axis=[io, ii, th, tw])

    shape = *_grid(spec, layout, band), layout.depth_threads, *_threads(layout), *_tile(layout)
    return te.compute(shape, total, name=f"acc{band.index}")


def _finish(spec: ConvTranspose2dSpec, layout: ThreadLayout, band: Band, acc: Any, bias: Any) -> Any:
    """Sums plus bias in the output's dtype; `acc` is None where no tap reaches."""
    channels, grid = spec.co // spec.groups, _grid(spec, layout, band)
    total = None if acc is None else _total(layout, band, grid, acc)

    def finish(*axes: Expr) -> Expr:
        _, g, b, _, _, _, _, ty, oc, *_ = axes
        value = tirx.const(0, spec.accumulator_dtype) if total is None else total(*axes)
        if spec.bias:
            channel = b * layout.co_block + ty * layout.channel_tile + oc
            if channels % layout.co_block:
                channel = tirx.min(channel, channels - 1)
            value = value + bias[g * channels + channel].astype(spec.accumulator_dtype)
        return value.astype(spec.dtype)

    (threads_y, rows, columns), (channel_tile, column_tile, phases) = _threads(layout), _tile(layout)
    shape = *grid, threads_y, channel_tile, rows, column_tile, columns, phases
    return te.compute(shape, finish, name=f"band{band.index}")


def _total(layout: ThreadLayout, band: Band, grid: tuple[int, ...], acc: Any) -> Callable[..., Expr]:
    """A function of the axes of an output that gives its sum, of all threads that share its input channels."""
    if layout.depth_threads == 1:

        def whole(*axes: Expr) -> Expr:
            *block, ty, oc, tr, qc, tc, pi = axes
            return acc[*block, 0, ty, tr, tc, oc, qc, pi]

        return whole

    def part(*axes: Expr) -> Expr:
        *block, tz, oc, qc, pi, ty, tr, tc = axes
        return acc[*block, tz, ty, tr, tc, oc, qc, pi]

    # Columns innermost: neighbouring threads write neighbouring values.
    shape = *grid, layout.depth_threads, *_tile(layout), *_threads(layout)
    parts = te.compute(shape, part, name=f"parts{band.index}")

    def added(*axes: Expr) -> Expr:
        *block, ty, oc, tr, qc, tc, pi = axes
        terms = [parts[*block, tz, oc, qc, pi, ty, tr, tc] for tz in range(layout.depth_threads)]
        return sum(terms[1:], terms[0])

    return added


def declare_thread_pack(spec: ConvTranspose2dSpec, layout: ThreadLayout, target: Target) -> tirx.PrimFunc:
    """The packing of a plain weight: ``weight`` (ci, co/groups, kh, kw) to ``ordered[block, kh, kw, ic, ob]``."""
    in_channels, channels = spec.ci // spec.groups, spec.co // spec.groups
    blocks, _, _, depth, _ = layout.packed_shape(spec)
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")
    zero = tirx.const(0, spec.accumulator_dtype)

    def order(g: Expr, b: Expr, y: Expr, x: Expr, ic: Expr, ob: Expr) -> Expr:
        channel = b * layout.co_block + ob
        conditions = [channel < channels] if channels % layout.co_block else []
        conditions += [ic < in_channels] if in_channels < depth else []
        value = weight[g * in_channels + ic, channel, y, x].astype(spec.accumulator_dtype)
        return tirx.if_then_else(tirx.all(*conditions), value, zero) if conditions else value

    shape = (spec.groups, blocks // spec.groups, *spec.kernel_size, depth, layout.co_block)
    return cuda_function([weight, te.compute(shape, order, name="ordered")], spec, layout, target)


def thread_layout_of(function: ir.BaseFunc) -> ThreadLayout:
    """The layout that `function` was declared with."""
    return ThreadLayout.from_json(function.attrs["convt.layout"])
