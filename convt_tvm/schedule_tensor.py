"""Steps of the CUDA schedule space for tensor cores."""

from typing import Any

from tvm.s_tir import Schedule

from convt_tvm.compute import spec_of
from convt_tvm.compute_tensor import tensor_layout_of
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.tensor_intrinsics import fill_intrinsic, load_intrinsic, product_intrinsic, store_intrinsic
from convt_tvm.tensor_layout import FRAGMENT, SKEW_BYTES, WARP, TensorLayout, fragment_depth

__all__ = ["bind_patch", "multiply", "order_products", "stage_inputs", "stage_weights", "store_sums"]

LoopRV = Any
SBlockRV = Any

VECTOR_BYTES = 16


def _skew(size: int) -> tuple[int, int]:
    """Factor and offset of the distance of rows whose elements have `size` bytes: whole 32 bytes and `SKEW_BYTES`.

    Fragments then begin at multiples of 32 bytes, as wmma demands, since 16 rows do.
    """
    return 32 // size, SKEW_BYTES // size


def _declared(sch: Schedule) -> tuple[ConvTranspose2dSpec, TensorLayout]:
    """The spec and layout of what is scheduled."""
    function = sch.mod["main"]
    return spec_of(function), tensor_layout_of(function)


def bind_patch(sch: Schedule, patch: SBlockRV) -> tuple[LoopRV, LoopRV]:
    """Bind a patch's output to blocks, warps and lanes; returns the loops over blocks and over a warp's fragments."""
    n, g, b, ph, pw, rb, cb, wo, wp, ot, pt, oi, pi = sch.get_loops(patch)
    sch.reorder(n, g, ph, pw, rb, cb, b, ot, pt, wo, wp, oi, pi)
    block = sch.fuse(n, g, ph, pw, rb, cb, b)
    sch.bind(block, "blockIdx.x")
    # Fragments are registers, which have numbers but no index. It is nvcc that unrolls: TVM would give each copy of the
    # body an array of its own in shared memory.
    sch.unroll(ot)
    sch.unroll(pt)
    sch.annotate(ot, "pragma_unroll_explicit", 0)
    sch.bind(sch.fuse(wo, wp), "threadIdx.y")
    _, lane = sch.split(sch.fuse(oi, pi), [None, WARP])
    sch.bind(lane, "threadIdx.x")
    return block, pt


def store_sums(sch: Schedule, acc: SBlockRV, patch: SBlockRV, fragment: LoopRV) -> SBlockRV:
    """Write sums to shared memory, a fragment of each warp at a time, where lanes find those of an output's row.

    Returns the block that does.
    """
    sch.set_scope(acc, 0, "wmma.accumulator")
    copy = sch.cache_read(patch, 0, "shared")
    sch.compute_at(copy, fragment, preserve_unit_loops=True)
    wo, wp = sch.get_loops(copy)[-6:-4]
    sch.bind(sch.fuse(wo, wp), "threadIdx.y")
    return copy


def order_products(sch: Schedule, acc: SBlockRV, block: LoopRV) -> tuple[LoopRV, LoopRV]:
    """Keep a warp's sums in fragments; returns the loops over stages and over fragments of input channels."""
    sch.compute_at(acc, block, preserve_unit_loops=True)
    wo, wp, ot, pt, oi, pi, th, tw, ko, ki, kj = sch.get_loops(acc)[-11:]
    sch.bind(sch.fuse(wo, wp), "threadIdx.y")
    sch.reorder(th, tw, ko, ki, ot, pt, oi, pi, kj)
    return ko, ki


def multiply(sch: Schedule, acc: SBlockRV, sums: SBlockRV) -> None:
    """Replace the innermost loops of sums and products by what tensor cores do."""
    spec, _ = _declared(sch)
    depth = fragment_depth(spec)
    th, _, _, ki, ot, pt, oi, _, _ = sch.get_loops(acc)[-9:]
    for loop in (ki, ot, pt):
        sch.unroll(loop)
    init = sch.decompose_reduction(acc, th)
    *_, init_ot, init_pt, init_oi, _ = sch.get_loops(init)
    for loop in (init_ot, init_pt):
        sch.unroll(loop)
    sch.tensorize(init_oi, fill_intrinsic(depth))
    sch.tensorize(oi, product_intrinsic(depth, spec.dtype))
    sch.tensorize(sch.get_loops(sums)[-2], store_intrinsic(depth))


def _share(sch: Schedule, copy: SBlockRV, layout: TensorLayout, vector: int, *, across: bool) -> LoopRV:
    """Share a copy of a matrix into shared memory among all threads of a block, a vector each; returns lanes' loop.

    Neighbouring lanes take neighbouring vectors, or with `across` those of neighbouring rows.
    """
    row, column = sch.get_loops(copy)[-2:]
    column, inner = sch.split(column, [None, vector])
    if across:
        sch.reorder(column, row)
        row, column = column, row
    _, warp, lane = sch.split(sch.fuse(row, column), [None, layout.warps, WARP])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(inner)
    return lane


def stage_weights(sch: Schedule, taps: SBlockRV, weights: SBlockRV, stage: LoopRV, step: LoopRV) -> None:
    """Copy the weights of a stage to shared memory, and those of a step to fragments."""
    spec, layout = _declared(sch)
    size = DTYPE_BYTES[spec.dtype]
    sch.set_scope(taps, 0, "shared")
    sch.set_scope(weights, 0, "wmma.matrix_a")
    sch.compute_at(weights, step, preserve_unit_loops=True)
    sch.compute_at(taps, stage, preserve_unit_loops=True)
    sch.storage_align(taps, 0, -2, *_skew(size))
    _share(sch, taps, layout, VECTOR_BYTES // size, across=False)
    ic, o = sch.get_loops(weights)[-2:]
    ot, oi = sch.split(o, [None, FRAGMENT])
    sch.reorder(ot, ic, oi)
    sch.unroll(ot)
    sch.tensorize(ic, load_intrinsic("a", fragment_depth(spec), spec.dtype))


def stage_inputs(sch: Schedule, gather: SBlockRV, inputs: SBlockRV, stage: LoopRV, step: LoopRV) -> None:
    """Gather the inputs of a stage in shared memory, and copy those of a step to fragments.

    Lanes read neighbouring positions; each collects a vector of input channels before it writes it.
    """
    spec, layout = _declared(sch)
    size = DTYPE_BYTES[spec.dtype]
    sch.set_scope(gather, 0, "local")
    sch.set_scope(inputs, 0, "wmma.matrix_b")
    shared = sch.cache_read(inputs, 0, "shared")
    sch.compute_at(inputs, step, preserve_unit_loops=True)
    sch.compute_at(shared, stage, preserve_unit_loops=True)
    sch.storage_align(shared, 0, -2, *_skew(size))
    lane = _share(sch, shared, layout, VECTOR_BYTES // size, across=True)
    sch.compute_at(gather, lane, preserve_unit_loops=True)
    sch.unroll(sch.get_loops(gather)[-1])
    p = sch.get_loops(inputs)[-2]
    pt, pi = sch.split(p, [None, FRAGMENT])
    sch.unroll(pt)
    sch.tensorize(pi, load_intrinsic("b", fragment_depth(spec), spec.dtype))
