"""Steps of the CUDA schedule space for tensor cores."""

from collections.abc import Sequence
from typing import Any

from tvm.s_tir import Schedule

from convt_tvm.compute import spec_of
from convt_tvm.compute_tensor import tensor_layout_of
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.tensor_intrinsics import fill_intrinsic, load_intrinsic, product_intrinsic, store_intrinsic
from convt_tvm.tensor_layout import FRAGMENT, TAPS, WARP, WINDOW_SKEW, TensorLayout, fragment_depth
from convt_tvm.thread_layout import VECTOR_BYTES

__all__ = ["bind_blocks", "multiply", "order_products", "stage_inputs", "stage_weights", "store_sums"]

LoopRV = Any
SBlockRV = Any


def _declared(sch: Schedule) -> tuple[ConvTranspose2dSpec, TensorLayout]:
    """The spec and layout of what is scheduled."""
    function = sch.mod["main"]
    return spec_of(function), tensor_layout_of(function)


def bind_blocks(sch: Schedule, band: SBlockRV) -> tuple[LoopRV, LoopRV]:
    """Bind the output to blocks, warps and lanes; returns the loops over blocks and over a warp's fragments.

    Lanes run along the columns of all phases of a block, as the output does.
    """
    _, layout = _declared(sch)
    n, g, b, ph, pb, rb, cb, ot, pt, wc, oi, wp, pi, wi = sch.get_loops(band)
    sch.reorder(n, g, ph, pb, rb, cb, b, ot, pt)
    block = sch.fuse(n, g, ph, pb, rb, cb, b)
    sch.bind(block, "blockIdx.x")
    # Fragments are registers, which have numbers but no index. It is nvcc that unrolls: TVM would give each copy of the
    # body an array of its own in shared memory.
    for loop in (ot, pt):
        sch.unroll(loop)
        sch.annotate(loop, "pragma_unroll_explicit", 0)
    _, warp, lane = sch.split(sch.fuse(wc, oi, wp, pi, wi), [None, layout.warps, WARP])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    return block, pt


def store_sums(sch: Schedule, acc: SBlockRV, band: SBlockRV, fragment: LoopRV) -> SBlockRV:
    """Write sums to shared memory, a fragment of each warp at a time; returns the block that does."""
    sch.set_scope(acc, 0, "wmma.accumulator")
    copy = sch.cache_read(band, 0, "shared")
    sch.compute_at(copy, fragment, preserve_unit_loops=True)
    wd, wi, wc, wp = sch.get_loops(copy)[-8:-4]
    sch.bind(sch.fuse(wd, wi, wc, wp), "threadIdx.y")
    return copy


def order_products(sch: Schedule, acc: SBlockRV, block: LoopRV) -> tuple[LoopRV, LoopRV, LoopRV]:
    """Keep a warp's sums in fragments; returns the loops over stages, taps and fragments of positions.

    Input channels go before taps, so that their order in a sum is that of all layouts with as many ``depth_warps``.
    """
    sch.compute_at(acc, block, preserve_unit_loops=True)
    wd, wi, wc, wp, ot, pt, oi, pi, ko, th, tw, ki, kj = sch.get_loops(acc)[-13:]
    sch.bind(sch.fuse(wd, wi, wc, wp), "threadIdx.y")
    sch.reorder(ko, ki, th, tw, pt, ot, oi, pi, kj)
    sch.annotate(th, TAPS, "rows")
    sch.annotate(tw, TAPS, "columns")
    return ko, tw, pt


def multiply(sch: Schedule, acc: SBlockRV, sums: SBlockRV) -> None:
    """Replace the innermost loops of sums and products by what tensor cores do.

    In shared memory sums of different phases, which neighbouring lanes read, lie in different banks.
    """
    spec, layout = _declared(sch)
    depth = fragment_depth(spec)
    ko, ki, _, _, pt, ot, oi, _, _ = sch.get_loops(acc)[-9:]
    for loop in (ki, pt, ot):
        sch.unroll(loop)
    init = sch.decompose_reduction(acc, ko)
    *_, init_pt, init_ot, init_oi, _ = sch.get_loops(init)
    for loop in (init_pt, init_ot):
        sch.unroll(loop)
    sch.tensorize(init_oi, fill_intrinsic(depth))
    sch.tensorize(oi, product_intrinsic(depth, spec.dtype))
    written = sch.blockize(sch.get_loops(sums)[-2])
    if layout.sums_skew:
        sch.storage_align(written, 0, -7, 32, layout.sums_skew)
    sch.tensorize(written, store_intrinsic(depth))


def _deal(sch: Schedule, vectors: LoopRV, inner: LoopRV, layout: TensorLayout) -> LoopRV:
    """Share a loop over vectors among all threads of a block, neighbours to neighbours; returns the loop of lanes."""
    turn, warp, lane = sch.split(vectors, [None, layout.warps, WARP])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    sch.unroll(turn)
    sch.vectorize(inner)
    return lane


def stage_weights(sch: Schedule, taps: SBlockRV, weights: SBlockRV, stage: LoopRV, step: LoopRV) -> None:
    """Copy the weights of a stage to shared memory, those of all taps at once, and those of a step to fragments.

    Neighbouring lanes copy neighbouring vectors.
    """
    spec, layout = _declared(sch)
    size = DTYPE_BYTES[spec.dtype]
    sch.set_scope(taps, 0, "shared")
    sch.set_scope(weights, 0, "wmma.matrix_a")
    sch.compute_at(weights, step, preserve_unit_loops=True)
    sch.compute_at(taps, stage, preserve_unit_loops=True)
    sch.storage_align(taps, 0, -2, *(part // size for part in layout.weights_skew(spec)))
    *rows, column = sch.get_loops(taps)[-7:]
    column, inner = sch.split(column, [None, VECTOR_BYTES // size])
    _deal(sch, sch.fuse(*rows, column), inner, layout)
    ic, o = sch.get_loops(weights)[-2:]
    ot, oi = sch.split(o, [None, FRAGMENT])
    sch.reorder(ot, ic, oi)
    sch.unroll(ot)
    sch.tensorize(ic, load_intrinsic("a", fragment_depth(spec), spec.dtype))


def stage_inputs(sch: Schedule, copies: Sequence[SBlockRV], inputs: SBlockRV, stage: LoopRV, fragment: LoopRV) -> None:
    """Gather the inputs of a stage in shared memory, and copy those of a step to fragments.

    Lanes load from neighbouring columns, one or two each; each collects a vector of input channels before it writes it.
    """
    spec, layout = _declared(sch)
    size = DTYPE_BYTES[spec.dtype]
    fetch, gather, window = copies
    sch.set_scope(inputs, 0, "wmma.matrix_b")
    sch.set_scope(window, 0, "shared")
    sch.compute_at(inputs, fragment, preserve_unit_loops=True)
    sch.compute_at(window, stage, preserve_unit_loops=True)
    sch.transform_layout(
        window, ("write", 0), lambda *axes: (*axes[:-3], axes[-3] * layout.loaded + axes[-2], axes[-1])
    )
    sch.storage_align(window, 0, -2, *(part // size for part in WINDOW_SKEW))
    word, part, k = sch.get_loops(window)[-3:]
    k, inner = sch.split(k, [None, VECTOR_BYTES // size])
    sch.reorder(k, word, part)
    sch.unroll(part)
    lane = _deal(sch, sch.fuse(k, word), inner, layout)
    for copy in (gather, fetch):
        sch.set_scope(copy, 0, "local")
        sch.compute_at(copy, lane, preserve_unit_loops=True)
        for loop in sch.get_loops(copy)[-2:]:
            sch.unroll(loop)
    sch.tensorize(sch.get_loops(inputs)[-2], load_intrinsic("b", fragment_depth(spec), spec.dtype))
