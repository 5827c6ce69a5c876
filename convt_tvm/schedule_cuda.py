"""Steps that the CUDA schedule spaces share."""

from math import prod
from typing import Any

from tvm.s_tir import Schedule

from convt_tvm.thread_layout import ThreadLayout

__all__ = ["bind_band", "bind_pack", "bind_parts", "fetch", "order_sums"]

LoopRV = Any
SBlockRV = Any

PACK_THREADS = 256
MAX_UNROLLED = 1024
"""Multiply-adds in one unrolled body; beyond it the taps stay loops."""


def bind_band(sch: Schedule, index: int, layout: ThreadLayout) -> tuple[LoopRV, LoopRV]:
    """Bind the axes of the output of band `index` to blocks and threads.

    Returns the loop over blocks, and the one inside which everything is one thread's: of the output, or of the parts of
    sums where threads share input channels.
    """
    band = sch.get_sblock(f"band{index}")
    n, g, b, ph, rb, cb, pb, ty, oc, tr, qc, tc, pi = sch.get_loops(band)
    sch.reorder(n, g, ph, rb, cb, pb, b)
    block = sch.fuse(n, g, ph, rb, cb, pb, b)
    sch.bind(block, "blockIdx.x")
    if layout.depth_threads == 1:
        return block, _bind_tile(sch, ty, tr, tc, oc, qc, pi)
    # Neighbouring threads write neighbouring columns, whichever threads have summed them.
    _share(sch, sch.fuse(ty, oc, tr, qc, tc, pi), layout)
    return block, block


def bind_parts(sch: Schedule, index: int, block: LoopRV) -> LoopRV:
    """Keep the parts of the sums of band `index` in shared memory; returns the loop over the threads that sum them."""
    parts = sch.get_sblock(f"parts{index}")
    sch.set_scope(parts, 0, "shared")
    sch.compute_at(parts, block, preserve_unit_loops=True)
    tz, oc, qc, pi, ty, tr, tc = sch.get_loops(parts)[-7:]
    lanes = _bind_tile(sch, ty, tr, tc, oc, qc, pi)
    sch.bind(tz, "threadIdx.z")
    return lanes


def _bind_tile(sch: Schedule, ty: LoopRV, tr: LoopRV, tc: LoopRV, oc: LoopRV, qc: LoopRV, pi: LoopRV) -> LoopRV:
    sch.reorder(ty, tr, tc, oc, qc, pi)
    sch.bind(ty, "threadIdx.y")
    lanes = sch.fuse(tr, tc)
    sch.bind(lanes, "threadIdx.x")
    for loop in (oc, qc, pi):
        sch.unroll(loop)
    return lanes


def _share(sch: Schedule, loop: LoopRV, layout: ThreadLayout) -> None:
    """Share the values of `loop` among all threads of a block, neighbouring values to neighbouring threads."""
    _, tz, ty, tx = sch.split(loop, [None, layout.depth_threads, layout.channel_threads, layout.lanes_block])
    if layout.depth_threads > 1:
        sch.bind(tz, "threadIdx.z")
    sch.bind(ty, "threadIdx.y")
    sch.bind(tx, "threadIdx.x")


def order_sums(sch: Schedule, acc: SBlockRV, lanes: LoopRV) -> LoopRV:
    """Keep one thread's sums in registers, taps and sums unrolled; returns the loop over steps of input channels."""
    sch.set_scope(acc, 0, "local")
    sch.compute_at(acc, lanes, preserve_unit_loops=True)
    oc, qc, pi, outer, inner, th, tw = sch.get_loops(acc)[-7:]
    sch.reorder(outer, inner, th, tw, pi, oc, qc)
    tile = prod(int(sch.get(loop).extent) for loop in (pi, oc, qc))
    for loop in (qc, oc, pi):
        sch.unroll(loop)
    for loop in (tw, th):
        tile *= int(sch.get(loop).extent)
        if tile <= MAX_UNROLLED:
            sch.unroll(loop)
    *_, init_oc, init_qc, init_pi = sch.get_loops(sch.decompose_reduction(acc, outer))
    for loop in (init_oc, init_qc, init_pi):
        sch.unroll(loop)
    return outer


def fetch(sch: Schedule, copy: SBlockRV, dimensions: int, layout: ThreadLayout, vector: int = 1) -> None:
    """Share a copy into shared memory, whose innermost loops are its `dimensions`, among all threads of a block.

    Each takes so many neighbouring values at a time.
    """
    *outer, last = sch.get_loops(copy)[-dimensions:]
    if vector > 1:
        last, lanes = sch.split(last, [None, vector])
        sch.vectorize(lanes)
    _share(sch, sch.fuse(*outer, last), layout)


def bind_pack(sch: Schedule) -> None:
    """Schedule a packing: one thread for each packed weight."""
    fused = sch.fuse(*sch.get_loops(sch.get_sblock("ordered")))
    block, thread = sch.split(fused, [None, PACK_THREADS])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
