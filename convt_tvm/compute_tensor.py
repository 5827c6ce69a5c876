"""The phase form as matrix products for tensor cores: the arithmetic of `convt_tvm.compute`, in whole fragments.

For each `convt_tvm.tensor_layout.Patch`

    acc[n, g, b, ph, pw, rb, cb, wo, wp, ot, pt, oi, pi] += weights[g*B + b, ph, pw, th, tw, ic, o]
                                                          * inputs[n, g, ph, pw, rb, cb, th, tw, ko, p, ki*depth + kj]

with channels ``o = (wo*channel_tiles + ot)*16 + oi``, positions ``p = (wp*position_tiles + pt)*16 + pi`` of a tile of
``row_block x column_block``, and input channels ``ic = ko*ci_block + ki*depth + kj``. ``inputs`` is what one tap reads,
the matrix that the weights of that tap are multiplied with. It exists a stage at a time, in shared memory.

All axes that a schedule needs are declared, so that no index is divided but that of a position by the tile's width.
"""

from typing import Any

from tvm import te, tirx

from convt_tvm.compute import lookup, parameters
from convt_tvm.compute_cuda import cuda_function, progression
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tensor_intrinsics import operand_dtype
from convt_tvm.tensor_layout import FRAGMENT, Patch, TensorLayout, fragment_depth, patches
from convt_tvm.thread_layout import row_starts

__all__ = ["declare_tensor_pack", "declare_tensor_phases", "tensor_layout_of"]

Expr = Any
_ROUND = "nvcuda::wmma::__float_to_tf32"


def declare_tensor_phases(spec: ConvTranspose2dSpec, layout: TensorLayout, target: Target) -> tirx.PrimFunc:
    """The phase form of `spec` as a PrimFunc to schedule.

    Parameters are ``input``, ``packed``, ``bias`` where the spec has one, and ``band0``, ``band1``, ... with the axes
    of the accumulators, one for each patch. Blocks are named ``gather<k>``, ``acc<k>`` and ``band<k>``.
    """
    source, packed, bias = parameters(spec, layout, spec.n)
    data = source.tensor
    outputs = []
    for patch in patches(spec):
        acc = _accumulate(spec, layout, patch, data, packed) if patch.taps else None
        outputs.append(_finish(spec, layout, patch, acc, bias))
    return cuda_function([data, packed, *([bias] if spec.bias else []), *outputs], spec, layout, target)


def tensor_layout_of(function: tirx.PrimFunc) -> TensorLayout:
    """The layout that `function` was declared with."""
    return TensorLayout.from_json(function.attrs["convt.layout"])


def _operand(spec: ConvTranspose2dSpec, value: Expr) -> Expr:
    """`value` as tensor cores take it: float32 rounded to tf32."""
    return value if spec.dtype != "float32" else tirx.call_pure_extern("float32", _ROUND, value)


def _tiles(spec: ConvTranspose2dSpec, layout: TensorLayout, patch: Patch) -> tuple[int, ...]:
    """Extents of the axes n, g, ph, pw, rb, cb of a patch."""
    return (
        spec.input_shape[0],
        spec.groups,
        len(patch.band.phases),
        len(patch.columns),
        layout.rows(patch.band) // layout.row_block,
        layout.patch_columns(patch) // layout.column_block,
    )


def _axes(spec: ConvTranspose2dSpec, layout: TensorLayout, patch: Patch) -> tuple[int, ...]:
    """Extents of the axes of a patch, in the order of the module's formula."""
    n, g, *tile = _tiles(spec, layout, patch)
    warps = layout.channel_warps, layout.position_warps
    return n, g, layout.blocks(spec), *tile, *warps, layout.channel_tiles, layout.position_tiles, FRAGMENT, FRAGMENT


def _gather(spec: ConvTranspose2dSpec, layout: TensorLayout, patch: Patch, data: Any) -> Any:
    """What the taps read, channels side by side, the border and surplus channels as zeros."""
    rows, columns = patch.band.phases, patch.columns
    in_channels = spec.ci // spec.groups
    row_base, column_base = [phase.base for phase in rows], [phase.base for phase in columns]

    def read(*axes: Expr) -> Expr:
        n, g, ph, pw, rb, cb, th, tw, ko, p, k = axes
        h = rb * layout.row_block + p // layout.column_block + lookup(row_base, ph) - th * rows[0].input_step
        w = cb * layout.column_block + p % layout.column_block + lookup(column_base, pw) - tw * columns[0].input_step
        ic = ko * layout.ci_block + k
        inside = [h >= 0, h < spec.ih, w >= 0, w < spec.iw]
        if in_channels % layout.ci_block:
            inside.append(ic < in_channels)
        value = _operand(spec, data[n, g * in_channels + ic, h, w])
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, spec.dtype))

    taps = patch.band.taps, patch.column_taps
    stage = layout.steps(spec), layout.positions, layout.ci_block
    return te.compute((*_tiles(spec, layout, patch), *taps, *stage), read, name=f"gather{patch.index}")


def _taps(spec: ConvTranspose2dSpec, layout: TensorLayout, patch: Patch, packed: Any) -> Any:
    """The weights of a patch, by its own phases and taps.

    A stage of its own, although a schedule's copy to shared memory would do: TVM 0.27 drops constants that are added to
    a block's index when it is tensorized, such as the first row in the packed weight.
    """
    row_start = [row_starts(spec)[phase.residue] for phase in patch.band.phases]

    def read(*axes: Expr) -> Expr:
        block, ph, pw, th, tw, ic, o = axes
        return packed[block, progression(row_start, ph) + th, progression(patch.first_columns, pw) + tw, ic, o]

    blocks, _, _, depth, co_block = layout.packed_shape(spec)
    phases, taps = (len(patch.band.phases), len(patch.columns)), (patch.band.taps, patch.column_taps)
    return te.compute((blocks, *phases, *taps, depth, co_block), read, name=f"taps{patch.index}")


def _fragments(spec: ConvTranspose2dSpec, matrix: Any, name: str) -> Any:
    """A matrix as tensor cores hold it: the same values in the type of fragments."""
    return te.compute(matrix.shape, lambda *axes: matrix(*axes).astype(operand_dtype(spec.dtype)), name=name)


def _accumulate(spec: ConvTranspose2dSpec, layout: TensorLayout, patch: Patch, data: Any, packed: Any) -> Any:
    """The matrix products of one patch."""
    depth = fragment_depth(spec)
    inputs = _fragments(spec, _gather(spec, layout, patch, data), f"inputs{patch.index}")
    weights = _fragments(spec, _taps(spec, layout, patch, packed), f"weights{patch.index}")
    th = te.reduce_axis((0, patch.band.taps), name="th")
    tw = te.reduce_axis((0, patch.column_taps), name="tw")
    ko = te.reduce_axis((0, layout.steps(spec)), name="ko")
    ki = te.reduce_axis((0, layout.ci_block // depth), name="ki")
    kj = te.reduce_axis((0, depth), name="kj")

    def total(*axes: Expr) -> Expr:
        n, g, b, ph, pw, rb, cb, wo, wp, ot, pt, oi, pi = axes
        channel = (wo * layout.channel_tiles + ot) * FRAGMENT + oi
        position = (wp * layout.position_tiles + pt) * FRAGMENT + pi
        k = ki * depth + kj
        weight = weights[g * layout.blocks(spec) + b, ph, pw, th, tw, ko * layout.ci_block + k, channel]
        value = inputs[n, g, ph, pw, rb, cb, th, tw, ko, position, k]
        product = weight.astype(spec.accumulator_dtype) * value.astype(spec.accumulator_dtype)
        return te.sum(product, axis=[th, tw, ko, ki, kj])

    return te.compute(_axes(spec, layout, patch), total, name=f"acc{patch.index}")


def _finish(spec: ConvTranspose2dSpec, layout: TensorLayout, patch: Patch, acc: Any, bias: Any) -> Any:
    """Sums plus bias in the output's dtype; `acc` is None where no tap reaches."""
    channels = spec.co // spec.groups

    def finish(*axes: Expr) -> Expr:
        _, g, b, _, _, _, _, wo, _, ot, _, oi, _ = axes
        total = tirx.const(0, spec.accumulator_dtype) if acc is None else acc[axes]
        if spec.bias:
            channel = b * layout.co_block + (wo * layout.channel_tiles + ot) * FRAGMENT + oi
            if channels % layout.co_block:
                channel = tirx.min(channel, channels - 1)
            total = total + bias[g * channels + channel].astype(spec.accumulator_dtype)
        return total.astype(spec.dtype)

    return te.compute(_axes(spec, layout, patch), finish, name=f"band{patch.index}")


def declare_tensor_pack(spec: ConvTranspose2dSpec, layout: TensorLayout, target: Target) -> tirx.PrimFunc:
    """The packing of a plain weight: ``weight`` (ci, co/groups, kh, kw) to ``ordered[block, kh, kw, ic, o]``."""
    in_channels, channels = spec.ci // spec.groups, spec.co // spec.groups
    weight = te.placeholder(spec.weight_shape, spec.dtype, name="weight")
    blocks, kh, kw, depth, co_block = layout.packed_shape(spec)

    def order(g: Expr, b: Expr, y: Expr, x: Expr, ic: Expr, o: Expr) -> Expr:
        channel = b * co_block + o
        value = _operand(spec, weight[g * in_channels + ic, channel, y, x])
        inside = tirx.all(channel < channels, ic < in_channels)
        return tirx.if_then_else(inside, value, tirx.const(0, spec.dtype))

    shape = (spec.groups, blocks // spec.groups, kh, kw, depth, co_block)
    return cuda_function([weight, te.compute(shape, order, name="ordered")], spec, layout, target)
