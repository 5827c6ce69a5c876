"""Steps that the CUDA schedule spaces share."""

from math import prod
from typing import Any

from tvm.s_tir import Schedule

from convt_tvm.thread_layout import ThreadLayout

__all__ = ["bind_band", "bind_pack", "fetch", "order_sums"]

LoopRV = Any
SBlockRV = Any

PACK_THREADS = 256
MAX_UNROLLED = 1024
"""Multiply-adds in one unrolled body; beyond it the taps stay loops."""


def bind_band(sch: Schedule, band: SBlockRV) -> LoopRV:
    """Bind the axes of a band's output to blocks and threads; what is left inside the loop returned is one thread's."""
    n, g, b, ph, rb, cb, pb, ty, tr, tc, oc, qc, pi = sch.get_loops(band)
    sch.reorder(n, g, ph, rb, cb, pb, b, ty, tr, tc, oc, qc, pi)
    sch.bind(sch.fuse(n, g, ph, rb, cb, pb, b), "blockIdx.x")
    sch.bind(ty, "threadIdx.y")
    lanes = sch.fuse(tr, tc)
    sch.bind(lanes, "threadIdx.x")
    for loop in (oc, qc, pi):
        sch.unroll(loop)
    return lanes


def order_sums(sch: Schedule, acc: SBlockRV, lanes: LoopRV, ci_block: int) -> LoopRV:
    """Keep one thread's sums in registers, taps and sums unrolled; returns the loop over blocks of input channels."""
    sch.set_scope(acc, 0, "local")
    sch.compute_at(acc, lanes, preserve_unit_loops=True)
    oc, qc, pi, ic, th, tw = sch.get_loops(acc)[-6:]
    outer, inner = sch.split(ic, [None, ci_block])
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


def fetch(sch: Schedule, copy: SBlockRV, dimensions: int, layout: ThreadLayout) -> None:
    """Share a copy into shared memory, whose innermost loops are its `dimensions`, among all threads of a block."""
    fused = sch.fuse(*sch.get_loops(copy)[-dimensions:])
    _, ty, tx = sch.split(fused, [None, layout.channel_threads, layout.row_block * layout.column_threads])
    sch.bind(ty, "threadIdx.y")
    sch.bind(tx, "threadIdx.x")


def bind_pack(sch: Schedule) -> None:
    """Schedule a packing: one thread for each packed weight."""
    fused = sch.fuse(*sch.get_loops(sch.get_sblock("ordered")))
    block, thread = sch.split(fused, [None, PACK_THREADS])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
