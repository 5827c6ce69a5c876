"""The phase form as matrix products for tensor cores: the arithmetic of `convt_tvm.compute`, in whole fragments.

    acc[n, g, b, ph, pb, rb, cb, wd, wi, wc, wp, ot, pt, oi, pi]
        += weights[g*B + b, ph, th, pw, tw, k, o] * inputs[n, g, ph, rb, cb, ko, th, tw, pw, p, kd]

with channels ``o = (wc*channel_tiles + ot)*16 + oi``, positions ``p = (pt*position_warps + wp)*16 + pi`` (see
`convt_tvm.tensor_layout`), column phases ``pw = pb*phases + wi``, and input channels ``k = ko*ci_block + kd``,
``kd = (ki*depth_warps + wd)*depth + kj``. The sums over ``wd`` are added up in the end:

    band[n, g, b, ph, pb, rb, cb, ot, pt, wc, oi, wp, pi, wi] = acc[..., 0, ...] + acc[..., 1, ...] + ... + bias

``inputs`` is what one tap reads, the matrix that its weights are multiplied with: a part of ``window``, which is that
of a tile with input channels side by side, shifted by the tap. Both exist a stage at a time, in shared memory.
Phases have as many taps as the one that has most; `convt_tvm.lower_tensor` leaves out those they do not have.

All axes that a schedule needs are declared, so that no index is divided but that of a position by the window's width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tvm import te, tirx

from convt_tvm.compute import lookup, parameters
from convt_tvm.compute_cuda import cuda_function
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tensor_intrinsics import operand_dtype
from convt_tvm.tensor_layout import FRAGMENT, Reach, TensorLayout, fragment_depth, reaches_of

__all__ = ["declare_tensor_pack", "declare_tensor_phases", "tensor_layout_of"]

Expr = Any
_ROUND = "convt::round_to_tf32"


def declare_tensor_phases(spec: ConvTranspose2dSpec, layout: TensorLayout, target: Target) -> tirx.PrimFunc:
    """The phase form of `spec` as a PrimFunc to schedule.

    Parameters are ``words``, ``packed``, ``bias`` where the spec has one, and ``band``: words are the input's values,
    as integers, as many in each as are loaded at once. Blocks are named ``fetch``, ``gather``, ``window``, ``taps``,
    ``inputs``, ``weights``, ``acc`` and ``band``.
    """
    _, _, packed, bias = parameters(spec, layout)
    # CUDA makes a 16-bit zero by a conversion in assembly, which compilers keep in a branch of its own: integers.
    *lead, width = spec.input_shape
    word = f"uint{8 * DTYPE_BYTES[spec.dtype] * layout.loaded}"
    words = te.placeholder((*lead, width // layout.loaded), word, name="words")
    acc = _accumulate(spec, layout, words, packed)
    arguments = [words, packed, *([bias] if spec.bias else []), _finish(spec, layout, acc, bias)]
    return cuda_function(arguments, spec, layout, target)


def tensor_layout_of(function: tirx.PrimFunc) -> TensorLayout:
    """The layout that `function` was declared with."""
    return TensorLayout.from_json(function.attrs["convt.layout"])


def _operand(spec: ConvTranspose2dSpec, value: Expr) -> Expr:
    """`value` as tensor cores take it: float32 rounded to tf32."""
    return value if spec.dtype != "float32" else tirx.call_pure_extern("float32", _ROUND, value)


def _shift(reach: Reach, phase: Expr) -> tuple[Expr, int]:
    """What of ``reach.shifts[phase]`` is beyond the first, as a variable and its factor.

    By arithmetic: TVM takes a select for all that it may be; fragments need one place.
    """
    if reach.shift_step is not None:
        return phase, reach.shift_step
    # 1 from the place of a step on, 0 before.
    steps = (after - before for before, after in pairwise(reach.shifts))
    return sum(step * tirx.min(phase // place, 1) for place, step in enumerate(steps, start=1) if step), 1


def _divided(terms: Sequence[tuple[Expr, int]], constant: int, divisor: int) -> tuple[Expr, Expr]:
    """Quotient and remainder of ``sum(variable * factor) + constant``, in a form that TVM knows to belong together."""
    rest = sum((variable * (factor % divisor) for variable, factor in terms), tirx.const(constant % divisor, "int32"))
    whole = sum(variable * (factor // divisor) for variable, factor in terms) + constant // divisor
    return whole + rest // divisor, rest % divisor


def _window(spec: ConvTranspose2dSpec, layout: TensorLayout, words: Any) -> Any:
    """The window of each tile and row phase, channels side by side, the border and surplus channels as zeros.

    Its positions are numbered by words and what is in them, so that whatever part of it is needed, it is whole words.

    What is beyond the border is read at its nearest place inside and then dropped: reads without conditions are under
    way at the same time.
    """
    rows, columns = reaches_of(spec)
    in_channels, pitch, loaded = spec.ci // spec.groups, layout.pitch(spec), layout.loaded

    def place(axes: Sequence[Expr]) -> list[tuple[Expr, int]]:
        """Channel of the group, row and word of the row, each with what it must be below."""
        _, _, ph, rb, cb, ko, p, k = axes
        h = rb * layout.row_block + p // (pitch // loaded) + (lookup(rows.shifts, ph) + rows.first)
        column = cb * layout.column_block + (columns.first - layout.margin(spec))
        w = tirx.floordiv(column, loaded) + p % (pitch // loaded)
        return [(ko * layout.ci_block + k, in_channels), (h, spec.ih), (w, spec.iw // loaded)]

    def read(*axes: Expr) -> Expr:
        ic, h, w = (tirx.max(tirx.min(index, size - 1), 0) for index, size in place(axes))
        return words[axes[0], axes[1] * in_channels + ic, h, w]

    def keep(*axes: Expr) -> Expr:
        *block, part, k = axes
        inside = [condition for index, size in place((*block, k)) for condition in (index >= 0, index < size)]
        kept = tirx.Select(tirx.all(*inside), fetched(*block, k), tirx.const(0, words.dtype))
        bits = 8 * DTYPE_BYTES[spec.dtype]
        value = tirx.reinterpret(spec.dtype, (kept >> (part * bits).astype(words.dtype)).astype(f"uint{bits}"))
        return _operand(spec, value)

    lead = (spec.input_shape[0], spec.groups, len(rows.taps), *layout.tiles(spec), layout.steps(spec))
    positions, channels = layout.window_positions(spec), layout.ci_block
    fetched = te.compute((*lead, positions // loaded, channels), read, name="fetch")
    gathered = te.compute((*lead, positions // loaded, loaded, channels), keep, name="gather")
    return te.compute(gathered.shape, lambda *axes: gathered(*axes), name="window")


def _taps(spec: ConvTranspose2dSpec, layout: TensorLayout, packed: Any) -> Any:
    """The packed weights, by phases and taps."""
    rows, columns = reaches_of(spec)

    def read(*axes: Expr) -> Expr:
        block, ph, th, pw, tw, ic, o = axes
        return packed[block, ph * rows.most_taps + th, pw * columns.most_taps + tw, ic, o]

    blocks, _, _, depth, co_block = layout.packed_shape(spec)
    taps = (len(rows.taps), rows.most_taps, len(columns.taps), columns.most_taps)
    return te.compute((blocks, *taps, depth, co_block), read, name="taps")


def _accumulate(spec: ConvTranspose2dSpec, layout: TensorLayout, words: Any, packed: Any) -> Any:
    """The matrix products."""
    rows, columns = reaches_of(spec)
    depth, in_blocks = fragment_depth(spec), layout.blocks(spec)
    depths = layout.ci_block // depth // layout.depth_warps
    window, taps = _window(spec, layout, words), _taps(spec, layout, packed)
    operand = operand_dtype(spec.dtype)
    weights = te.compute(taps.shape, lambda *axes: taps(*axes).astype(operand), name="weights")

    def shifted(*axes: Expr) -> Expr:
        n, g, ph, rb, cb, ko, th, tw, pw, p, k = axes
        down, along = rows.step * layout.pitch(spec), columns.step
        first = (rows.most_taps - 1) * down + (columns.most_taps - 1) * along + layout.margin(spec)
        terms = [(p, 1), (th, -down), (tw, -along), _shift(columns, pw)]
        place = _divided(terms, first + columns.shifts[0], layout.loaded)
        return window[n, g, ph, rb, cb, ko, *place, k].astype(operand)

    *lead, _, _, in_depth = window.shape
    each = (rows.most_taps, columns.most_taps, len(columns.taps))
    inputs = te.compute((*lead, *each, layout.positions, in_depth), shifted, name="inputs")

    th = te.reduce_axis((0, rows.most_taps), name="th")
    tw = te.reduce_axis((0, columns.most_taps), name="tw")
    ko = te.reduce_axis((0, layout.steps(spec)), name="ko")
    ki = te.reduce_axis((0, depths), name="ki")
    kj = te.reduce_axis((0, depth), name="kj")

    def total(*axes: Expr) -> Expr:
        n, g, b, ph, pb, rb, cb, wd, wi, wc, wp, ot, pt, oi, pi = axes
        pw = pb * layout.phases + wi
        channel = (wc * layout.channel_tiles + ot) * FRAGMENT + oi
        position = (pt * layout.position_warps + wp) * FRAGMENT + pi
        k = (ki * layout.depth_warps + wd) * depth + kj
        weight = weights[g * in_blocks + b, ph, th, pw, tw, ko * layout.ci_block + k, channel]
        value = inputs[n, g, ph, rb, cb, ko, th, tw, pw, position, k]
        product = weight.astype(spec.accumulator_dtype) * value.astype(spec.accumulator_dtype)
        return te.sum(product, axis=[ko, th, tw, ki, kj])

    warps = layout.depth_warps, layout.phases, layout.channel_warps, layout.position_warps
    tiles = layout.channel_tiles, layout.position_tiles
    return te.compute((*_blocks(spec, layout), *warps, *tiles, FRAGMENT, FRAGMENT), total, name="acc")


def _blocks(spec: ConvTranspose2dSpec, layout: TensorLayout) -> tuple[int, ...]:
    """Extents of the axes n, g, b, ph, pb, rb, cb."""
    rows, columns = reaches_of(spec)
    phases = len(rows.taps), len(columns.taps) // layout.phases
    return spec.input_shape[0], spec.groups, layout.blocks(spec), *phases, *layout.tiles(spec)


def _finish(spec: ConvTranspose2dSpec, layout: TensorLayout, acc: Any, bias: Any) -> Any:
    """Sums of all depths plus bias in the output's dtype."""
    channels = spec.co // spec.groups

    def finish(*axes: Expr) -> Expr:
        *block, ot, pt, wc, oi, wp, pi, wi = axes
        total = acc[*block, 0, wi, wc, wp, ot, pt, oi, pi]
        for wd in range(1, layout.depth_warps):
            total = total + acc[*block, wd, wi, wc, wp, ot, pt, oi, pi]
        if spec.bias:
            channel = block[2] * layout.co_block + (wc * layout.channel_tiles + ot) * FRAGMENT + oi
            if channels % layout.co_block:
                channel = tirx.min(channel, channels - 1)
            total = total + bias[block[1] * channels + channel].astype(spec.accumulator_dtype)
        return total.astype(spec.dtype)

    tiles = layout.channel_tiles, layout.position_tiles
    lanes = layout.channel_warps, FRAGMENT, layout.position_warps, FRAGMENT, layout.phases
    return te.compute((*_blocks(spec, layout), *tiles, *lanes), finish, name="band")


def declare_tensor_pack(spec: ConvTranspose2dSpec, layout: TensorLayout, target: Target) -> tirx.PrimFunc:
    """The packing of a plain ``weight`` (ci, co/groups, kh, kw) as ``ordered``, of `TensorLayout.packed_shape`."""
    in_channels, channels = spec.ci // spec.groups, spec.co // spec.groups
    blocks = layout.blocks(spec)
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")
    most_taps = [reach.most_taps for reach in reaches_of(spec)]

    def order(block: Expr, y: Expr, x: Expr, ic: Expr, o: Expr) -> Expr:
        channel = block % blocks * layout.co_block + o
        inside, places = [channel < channels, ic < in_channels], []
        for axis, most, index in zip(spec.axes, most_taps, (y, x), strict=True):
            tap, phases = index % most, axis.phases
            inside.append(tap < lookup([phase.taps for phase in phases], index // most))
            places.append(lookup([phase.first_tap for phase in phases], index // most) + tap * phases[0].tap_step)
        value = _operand(spec, weight[block // blocks * in_channels + ic, channel, *places])
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, spec.dtype))

    return cuda_function([weight, te.compute(layout.packed_shape(spec), order, name="ordered")], spec, layout, target)
