"""The operator in TVM TE: the one place that states the arithmetic.

Two declarations of the same function:

`declare_reference`
    The text-book form. ``data_dilated`` has ``stride - 1`` zeros between input points; padded by
    ``dilation*(kernel-1) - padding`` it is gathered by every kernel tap. It is the definition and the oracle inside
    TVM. It multiplies ``stride_h * stride_w`` times too often, so it never runs in a kernel.

`declare_phases`
    The same gather with the zeros skipped, from the integers of `convt_tvm.phases`. Every index in it is a sum of loop
    variables and constants of a phase: no division or remainder by the stride appears, because TVM 0.27 simplifies
    ``(n % 4 + 2) // 4`` to 0 when a schedule splits or fuses such an index (``iter_map_simplify``; the workaround may
    go when ``convt-tvm doctor`` reports that case as fixed).

A declaration in phase form computes, for each *row band* (all row phases with the same number of taps and of rows),

    acc[n, g, b, ph, qh, ob, pw, qw] += window[n, g*I + ic, qh + base(ph) - th*step, qw + base(pw) - tw*step]
                                        * packed[g*B + b, tap(ph, th), column(pw, tw), ic, ob]

over ``th``, ``ic``, ``tw``, as a sum of partial sums (`convt_tvm.layout.partial_sum`), and an output stage
``band = acc + bias`` whose elements are in the order of the output's memory. ``ph``/``pw`` number phases, ``qh``/``qw``
positions in a phase, ``b``/``ob`` blocks of output channels and channels in a block, ``I`` is ``ci/groups`` and ``B``
the number of blocks.
Column extents and channel blocks are rounded up to what the schedule's tiles divide, so that no loop carries a
predicate; `convt_tvm.lower` then turns stores to bands into stores to the output and drops the surplus. Sums are kept
in `ConvTranspose2dSpec.accumulator_dtype`; each output element is summed by one thread in one order.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tvm import ir, te, tirx
from tvm_ffi.serialization import from_json_graph_str, to_json_graph_str

from convt_tvm.layout import (
    Band,
    Layout,
    Window,
    bands,
    column_delays,
    column_starts,
    partial_sum,
    reaches,
    reads_input,
    skips_parts,
    window_axes,
)
from convt_tvm.spec import ConvTranspose2dSpec, Pair
from convt_tvm.target import Target

__all__ = [
    "COLUMN_CHUNKS",
    "IMAGES",
    "IN_VECTORS",
    "PARTIAL",
    "PASSES_CACHES",
    "PEELS",
    "SKIPS_ROWS",
    "SUMS",
    "VECTORS",
    "Source",
    "copied_window",
    "create_function",
    "declare_pack",
    "declare_phases",
    "declare_reference",
    "finish",
    "finish_bands",
    "has_surplus_images",
    "is_known",
    "layout_of",
    "lookup",
    "parameters",
    "phase_function",
    "phase_value",
    "spec_of",
    "sum_products",
    "target_of",
]

SKIPS_ROWS = "convt.skips_rows"
"""Annotation of a loop in a reduction: it is left out where no row that it reads belongs to the image."""
PASSES_CACHES = "convt.passes_caches"
"""Annotation of a loop each of whose iterations writes whole rows, the phases of a chunk, of one block's channels.

They go to memory past the caches, see `convt_tvm.outputs`. Such loops of several bands are joined in one. In each the
loop over phases is inside that over tiles of rows: the rows before a tile's are complete.
"""
IMAGES = "convt.images"
"""Annotation of a loop over images, the only one of a kernel, for threads to share.

A schedule joins it of others, and cannot make it parallel.
"""

IN_VECTORS = "convt.in_vectors"
"""Annotation of the outermost loop around an output's store that becomes vectors along the row.

With lanes along channels it is the loop over lanes, with lanes along columns that over the columns of a tile; loops
over columns and phases follow.
"""

PEELS = "convt.peels"
"""Annotation of a loop over tiles of columns: those that reach beyond the image get a body each.

With lanes along columns it is the last one that does, whose loops over `VECTORS` end with the last output.
"""
COLUMN_CHUNKS = "convt.column_chunks"
"""Annotation of a loop over tiles of columns, directly in the loop over tasks: a task works on a chunk of them only.

Two numbers: how many tiles are a chunk, and how many tasks follow each other for one chunk. The second is 0 where there
is one task, whose loop is simplified away, and threads share the chunks, -1 where they do not.
"""
VECTORS = "convt.vectors"
"""Annotation of a loop over the vectors of columns in a tile."""

SUMS = "acc"
"""Name of the sums of band k, followed by k."""
PARTIAL = "partial"
"""Name of the partial sums of band k, followed by k."""

Expr = Any
"""A TVM expression; the wheel ships no types."""
Sums = Callable[[Expr, Expr, Expr, Expr, Expr, Expr, Expr, Expr], Expr]
"""The sum for indices ``n, g, b, ob, ph, qh, qw, pw``."""
Multiply = Callable[[Expr, Sequence[Expr]], Expr]
"""The product of a value of the window and the weight with indices ``block, kh, kw, ic, ob`` in packed order."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor to read the input from, its `axes` in some order of ``nchw``, its corner at ``origin`` of the input.

    So many ``images`` are read, by default those there are: in place of one beyond the last, the last.
    """

    tensor: Any
    axes: str
    origin: Pair = (0, 0)
    images: Expr = None

    @property
    def batch(self) -> Expr:
        """How many images are read."""
        return self.tensor.shape[0] if self.images is None else self.images

    def at(self, n: Expr, c: Expr, h: Expr, w: Expr) -> Expr:
        """The value of image `n` and channel `c` at row `h` and column `w`, counted from the corner."""
        image = n if self.images is None else tirx.min(n, self.tensor.shape[0] - 1)
        place = {"n": image, "c": c, "h": h, "w": w}
        return self.tensor[tuple(place[axis] for axis in self.axes)]


def lookup(values: Sequence[int], index: Expr) -> Expr:
    """``values[index]`` as an expression: a constant or nested selects, which fold where `index` is unrolled.

    Select and not a table in memory: a schedule may unroll `index`, and what it selects must then become a constant.
    It is also the form in which this TVM schedules a phase's offset correctly.
    """
    if all(value == values[0] for value in values):
        return tirx.const(values[0], "int32")
    change = next(i for i in range(len(values) - 1, 0, -1) if values[i] != values[i - 1])
    return tirx.Select(index >= change, tirx.const(values[change], "int32"), lookup(values[:change], index))


def phase_value(values: Sequence[int], index: Expr) -> Expr:
    """``values[index]`` on processors: as `lookup`, but three and more that are equally far apart are a product.

    TVM simplifies the selects of each index in which they are again and again: those of 32 phases took it two seconds,
    those of 4 half of one. Kernels for GPUs keep them, for what was tuned for GPUs is code with selects.
    """
    steps = [after - before for before, after in pairwise(values)]
    first = next((i for i in range(len(steps) - 1, 0, -1) if steps[i - 1] != steps[-1]), 0)
    if len(values) - first < 3 or not steps[-1]:
        return lookup(values, index)
    product = index * steps[-1] + (values[first] - first * steps[-1])
    return tirx.Select(index >= first, product, phase_value(values[:first], index)) if first else product


def create_function(arguments: list[Any]) -> tirx.PrimFunc:
    """A PrimFunc of TE tensors whose parameters may start at any address.

    TE declares every buffer as aligned to 64 bytes, the calling convention does not check it, and aligned loads of a
    torch slice would crash. TE has no way to say otherwise, so the alignment is set in the function's JSON form.
    """
    function = te.create_prim_func(arguments)
    # Of `tvm.ir`'s own functions, the one that reads brings graphs of older versions up to date: most of the time.
    graph = json.loads(to_json_graph_str(function))
    nodes = graph["nodes"]
    root = nodes[graph["root_index"]]["data"]
    for parameter in nodes[root["params"]]["data"]:
        nodes[nodes[parameter]["data"]["ty"]]["data"]["data_alignment"] = 1
    aligned: tirx.PrimFunc = from_json_graph_str(json.dumps(graph))
    return aligned.with_attr("global_symbol", "main")


def is_known(batch: Expr) -> bool:
    """Whether the number of images is a constant."""
    return isinstance(batch, int | tirx.IntImm)


def has_surplus_images(layout: Layout, batch: Expr) -> bool:
    """Whether the last tile takes in more images than are left of a batch, or may do so."""
    return int(batch) % layout.image_block > 0 if is_known(batch) else layout.image_block > 1


def parameters(spec: ConvTranspose2dSpec, layout: Layout) -> tuple[ConvTranspose2dSpec, Source, Any, Any]:
    """The spec that schedules see; and ``input``, its axes in the order of its memory, ``packed`` and ``bias``.

    These are placeholders. For any batch size, a variable then, the spec is that of one tile's images.
    """
    batch: Expr = te.var("n") if spec.n is None else spec.n
    spec = spec.with_batch(layout.image_block) if spec.n is None else spec
    axes, sizes = spec.input_axes, {"n": batch, "c": spec.ci, "h": spec.ih, "w": spec.iw}
    tensor = te.placeholder([sizes[axis] for axis in axes], spec.dtype, name="input")
    whole = tirx.ceildiv(batch, layout.image_block) * layout.image_block
    data = Source(tensor, axes, images=whole if has_surplus_images(layout, batch) else None)
    packed = te.placeholder(layout.packed_shape(spec), layout.packed_dtype(spec), name="packed")
    return spec, data, packed, te.placeholder(spec.bias_shape, spec.dtype, name="bias")


def phase_function(
    spec: ConvTranspose2dSpec, layout: Layout, target: Target, inputs: Sequence[Any], outputs: Sequence[Any]
) -> tirx.PrimFunc:
    """The PrimFunc of a phase form for a processor; of the `inputs` the last is the bias, which not every spec has."""
    function = create_function([*(inputs if spec.bias else inputs[:-1]), *outputs])
    return function.with_attrs({"convt.spec": spec.name, "convt.layout": layout.to_json(), "convt.target": target.name})


def declare_phases(spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> tirx.PrimFunc:
    """The phase form of `spec` as a PrimFunc to schedule.

    Parameters are ``input`` and ``packed`` (see `parameters`, `Layout.packed_shape`), ``bias`` where the spec has one,
    and ``band0``, ``band1``, ... of shape ``(n, groups, blocks, co_block, row phases, rows, columns, column phases)``.
    Where the spec is for any batch size, ``n`` is a variable, and schedules see the spec of one tile's images. It is
    rounded up to whole tiles in all but ``input``. Blocks are named ``window``, ``partial<k>``, ``acc<k>`` and
    ``band<k>``. With a layout that `Layout.skips_rows` a schedule has to leave out row taps that would read the border
    (`SKIPS_ROWS`): there is nothing to read.
    """
    spec, data, packed, bias = parameters(spec, layout)
    # One window is copied for all bands, or none; tasks of a layout `by_chunk` copy what they read, those of each band.
    shared = None if layout.by_chunk else data if reads_input(spec, layout) else copied_window(spec, layout, data)

    def multiply(value: Expr, place: Sequence[Expr]) -> Expr:
        return value * packed[tuple(place)]

    # With many registers LLVM keeps vectors that are read again.
    delays = column_delays(spec, layout) if target.has_few_registers else None

    def accumulate(band: Band) -> Any:
        source = shared or copied_window(spec, layout, data)
        return sum_products(spec, layout, band, source, multiply, delays)

    outputs = finish_bands(spec, layout, data.batch, bias, accumulate)
    return phase_function(spec, layout, target, [data.tensor, packed, bias], outputs)


def copied_window(spec: ConvTranspose2dSpec, layout: Layout, data: Source) -> Source:
    """What the taps read, copied so that no read needs a check."""
    extent = Window.of(spec, layout)
    zero, axes = tirx.const(0, spec.accumulator_dtype), window_axes(spec, layout)

    def read(*place: Expr) -> Expr:
        n, c, h, w = (place[axes.index(axis)] for axis in "nchw")
        value = data.at(n, c, h + extent.first_row, w + extent.first_column).astype(spec.accumulator_dtype)
        if extent.is_inside:
            return value
        (top, bottom), (left, right) = extent.rows_inside, extent.columns_inside
        return tirx.if_then_else(tirx.all(h >= top, h < bottom, w >= left, w < right), value, zero)

    sizes = {"n": data.batch, "c": spec.ci, "h": extent.height, "w": extent.width}
    window = te.compute([sizes[axis] for axis in axes], read, name="window")
    return Source(window, axes, (extent.first_row, extent.first_column))


def sum_products(
    spec: ConvTranspose2dSpec,
    layout: Layout,
    band: Band,
    source: Source,
    multiply: Multiply,
    delays: Sequence[int] | None = None,
) -> Any:
    """The gathered reduction of one band, lanes innermost; `delays` are those of column phases, see `column_delays`."""
    in_channels = spec.ci // spec.groups
    column_phases = spec.axes[1].phases
    column_taps = [phase.taps for phase in column_phases]
    column_start, delays = column_starts(spec), delays or (0,) * len(column_taps)
    column_steps = max(taps + delay for taps, delay in zip(column_taps, delays, strict=True))
    blocks = layout.blocks(spec)
    step_h, step_w = band.phases[0].input_step, column_phases[0].input_step
    tap_step = band.phases[0].tap_step
    row_base = [phase.base - source.origin[0] for phase in band.phases]
    row_tap = [phase.first_tap for phase in band.phases]
    column_base = [phase.base - source.origin[1] if phase.taps else 0 for phase in column_phases]

    def product(place: Sequence[Expr], th: Expr, ic: Expr, step: Expr) -> Expr:
        n, g, b, ph, qh = place[:5]
        pw, qw, ob = place[5:] if layout.lanes == "co" else (*place[6:], place[5])
        taps, tw = phase_value(column_taps, pw), step - phase_value(delays, pw)
        channel, row = g * in_channels + ic, qh + phase_value(row_base, ph) - th * step_h
        column = qw + phase_value(column_base, pw) - tw * step_w
        value = source.at(n, channel, row, column)
        weight = g * blocks + b, phase_value(row_tap, ph) + th * tap_step, phase_value(column_start, pw) + tw, ic, ob
        checks = [tw >= 0] if max(delays) else []
        checks += [tw < taps] if min(column_taps) < column_steps else []
        if layout.skips_columns(spec):
            first = -source.origin[1]
            checks += [column >= first, column < spec.iw + first]
        if not checks:
            return multiply(value, weight)
        return tirx.if_then_else(tirx.all(*checks), multiply(value, weight), tirx.const(0, spec.accumulator_dtype))

    phases = len(column_phases)
    columns = layout.columns(spec)
    tile = (phases, columns, layout.co_block) if layout.lanes == "co" else (layout.co_block, phases, columns)
    shape = (source.batch, spec.groups, blocks, len(band.phases), layout.rows(band), *tile)

    names = ("th", "ic", "tw")
    whole = band.taps, in_channels, max(column_taps)
    inner = whole if layout.taps == "plain" else partial_sum(spec, band)
    outer = [all_ // part for all_, part in zip(whole, inner, strict=True)]
    if max(delays):
        # A part has all column taps.
        inner = *inner[:2], column_steps
    inner_axes = [te.reduce_axis((0, extent), name=name) for extent, name in zip(inner, names, strict=True)]
    outer_axes = [te.reduce_axis((0, extent), name=f"{name}_part") for extent, name in zip(outer, names, strict=True)]

    def part(*indices: Expr) -> Expr:
        place, parts = indices[:-3], indices[-3:]
        reduced = [number * size + axis for number, size, axis in zip(parts, inner, inner_axes, strict=True)]
        return te.sum(product(place, *reduced), axis=inner_axes)

    # Minus zero is what addition leaves alone, and LLVM cannot fill memory with it by a call, as it would with zeros.
    # Where all parts may be left out it has to be zero.
    begin = 0.0 if skips_parts(spec) else -0.0
    add = te.comm_reducer(lambda a, b: a + b, lambda dtype: tirx.const(begin, dtype), name="add")
    partial = te.compute((*shape, *outer), part, name=f"{PARTIAL}{band.index}")

    def total(*place: Expr) -> Expr:
        if all(extent == 1 for extent in outer):
            return partial[(*place, 0, 0, 0)]
        return add(partial[(*place, *outer_axes)], axis=outer_axes)

    return te.compute(shape, total, name=f"{SUMS}{band.index}")


def _sums_of(layout: Layout, acc: Any) -> Sums:
    """What gives the sum for each output."""

    def sums(n: Expr, g: Expr, b: Expr, ob: Expr, ph: Expr, qh: Expr, qw: Expr, pw: Expr) -> Expr:
        return acc[n, g, b, ph, qh, pw, qw, ob] if layout.lanes == "co" else acc[n, g, b, ph, qh, ob, pw, qw]

    return sums


def finish_bands(
    spec: ConvTranspose2dSpec, layout: Layout, batch: Expr, bias: Any, accumulate: Callable[[Band], Any]
) -> list[Any]:
    """What is stored of every band: what `accumulate` declares of those that a tap reaches, finished."""
    return [
        finish(spec, layout, band, batch, _sums_of(layout, accumulate(band)) if reaches(spec, band) else None, bias)
        for band in bands(spec)
    ]


def finish(spec: ConvTranspose2dSpec, layout: Layout, band: Band, batch: Expr, sums: Sums | None, bias: Any) -> Any:
    """Sums plus bias in the output's dtype, in the order of the output's memory; no `sums` where no tap reaches."""
    channels = spec.co // spec.groups

    def element(n: Expr, g: Expr, b: Expr, ob: Expr, ph: Expr, qh: Expr, qw: Expr, pw: Expr) -> Expr:
        zero = tirx.const(0, spec.accumulator_dtype)
        total = zero if sums is None else sums(n, g, b, ob, ph, qh, qw, pw)
        if spec.bias:
            channel = b * layout.co_block + ob
            if channels % layout.co_block:
                channel = tirx.min(channel, channels - 1)
            total = total + bias[g * channels + channel].astype(spec.accumulator_dtype)
        return total.astype(spec.dtype)

    lead = (batch, spec.groups, layout.blocks(spec), layout.co_block, len(band.phases), layout.rows(band))
    return te.compute((*lead, layout.columns(spec), len(spec.axes[1].phases)), element, name=f"band{band.index}")


def declare_pack(spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> tirx.PrimFunc:
    """The packing of a plain weight: ``weight`` (ci, co/groups, kh, kw) to ``ordered``.

    ``ordered[block, kh, kw, ic, ob]`` is stored by `convt_tvm.lower` as ``packed[block, kh, place, ic, ob]``, where
    ``place`` is that of `kernel_columns`; channels that fill up a block are zero.
    """
    in_channels, out_channels = spec.ci // spec.groups, spec.co // spec.groups
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")
    kh, kw = spec.kernel_size

    blocks = layout.blocks(spec)

    def order(block: Expr, y: Expr, x: Expr, ic: Expr, ob: Expr) -> Expr:
        group, channel = tirx.indexdiv(block, blocks), tirx.indexmod(block, blocks) * layout.co_block + ob
        value = weight[group * in_channels + ic, channel, y, x].astype(spec.accumulator_dtype)
        if out_channels % layout.co_block == 0:
            return value
        return tirx.if_then_else(channel < out_channels, value, tirx.const(0, spec.accumulator_dtype))

    shape = (spec.groups * blocks, kh, kw, in_channels, layout.co_block)
    function = create_function([weight, te.compute(shape, order, name="ordered")])
    return function.with_attrs({"convt.spec": spec.name, "convt.layout": layout.to_json()})


def declare_reference(spec: ConvTranspose2dSpec) -> tirx.PrimFunc:
    """The text-book form of `spec` as a PrimFunc: ``input``, ``weight``, ``bias`` where there is one, ``output``."""
    acc_dtype = spec.accumulator_dtype
    in_channels, out_channels = spec.ci // spec.groups, spec.co // spec.groups
    (stride_h, stride_w), (dil_h, dil_w) = spec.stride, spec.dilation
    zero = tirx.const(0, acc_dtype)
    data = te.placeholder(spec.input_shape, spec.dtype, name="input")
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")
    bias = te.placeholder(spec.bias_shape, spec.dtype, name="bias")
    dilated_h, dilated_w = ((spec.ih - 1) * stride_h + 1, (spec.iw - 1) * stride_w + 1)

    data_dilated = te.compute(
        (spec.n, spec.ci, dilated_h, dilated_w),
        lambda n, c, h, w: tirx.if_then_else(
            tirx.all(tirx.indexmod(h, stride_h) == 0, tirx.indexmod(w, stride_w) == 0),
            data[n, c, tirx.indexdiv(h, stride_h), tirx.indexdiv(w, stride_w)].astype(acc_dtype),
            zero,
        ),
        name="data_dilated",
    )
    before = [d * (k - 1) - p for d, k, p in zip(spec.dilation, spec.kernel_size, spec.padding, strict=True)]
    padded = te.compute(
        (spec.n, spec.ci, spec.oh + dil_h * (spec.kernel_size[0] - 1), spec.ow + dil_w * (spec.kernel_size[1] - 1)),
        lambda n, c, h, w: tirx.if_then_else(
            tirx.all(h >= before[0], h < before[0] + dilated_h, w >= before[1], w < before[1] + dilated_w),
            data_dilated[n, c, h - before[0], w - before[1]],
            zero,
        ),
        name="padded",
    )
    ic = te.reduce_axis((0, in_channels), name="ic")
    kh = te.reduce_axis((0, spec.kernel_size[0]), name="kh")
    kw = te.reduce_axis((0, spec.kernel_size[1]), name="kw")
    acc = te.compute(
        spec.output_shape,
        lambda n, c, h, w: te.sum(
            padded[
                n,
                tirx.indexdiv(c, out_channels) * in_channels + ic,
                h + (spec.kernel_size[0] - 1 - kh) * dil_h,
                w + (spec.kernel_size[1] - 1 - kw) * dil_w,
            ]
            * weight[tirx.indexdiv(c, out_channels) * in_channels + ic, tirx.indexmod(c, out_channels), kh, kw].astype(
                acc_dtype
            ),
            axis=[ic, kh, kw],
        ),
        name="acc",
    )
    output = te.compute(
        spec.output_shape,
        lambda n, c, h, w: (acc[n, c, h, w] + bias[c].astype(acc_dtype) if spec.bias else acc[n, c, h, w]).astype(
            spec.dtype
        ),
        name="output",
    )
    function = create_function([data, weight, *([bias] if spec.bias else []), output])
    return function.with_attr("convt.spec", spec.name)


def spec_of(function: ir.BaseFunc) -> ConvTranspose2dSpec:
    """The spec that `function` was declared from."""
    return ConvTranspose2dSpec.from_name(str(function.attrs["convt.spec"]))


def layout_of(function: ir.BaseFunc) -> Layout:
    """The layout that `function` was declared with."""
    return Layout.from_json(function.attrs["convt.layout"])


def target_of(function: ir.BaseFunc) -> Target:
    """The target that `function` was declared for."""
    return Target.parse(str(function.attrs["convt.target"]))
