"""CUDA: input and weights read where they are used, through the caches. For few channels, depthwise and grouped layers.

One launch for each row band, as in `convt_tvm.schedules.cuda_shared`, without its stage: no shared memory, no barrier.

    blockIdx.x = n, g, ph, rb, cb, pb, b
      threadIdx.y = ty, threadIdx.x = tr, tc
        for ic:
          for th, tw:                           unrolled
            for pi, oc, qc:                     unrolled: the sums of one thread, in registers
        for oc, qc, pi: the output

A border costs a condition for each read, and there is nothing that every spec could not have: this schedule is the one
that always applies.
"""

from collections.abc import Iterator

from tvm.s_tir import Schedule

from convt_tvm.compute import spec_of
from convt_tvm.compute_cuda import thread_layout_of
from convt_tvm.cost_cuda import grid_cycles, thread_layouts
from convt_tvm.layout import Layout, bands, reaches
from convt_tvm.schedule_cuda import bind_band, bind_parts, order_sums
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

NAME = "cuda_direct"
TARGET_KIND = "cuda"


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Every spec."""
    return True


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts within the limits of threads and registers, each with its estimated cycles."""
    for layout in thread_layouts(spec, target, staged=False):
        yield layout, grid_cycles(spec, layout, target)


def space(sch: Schedule) -> None:
    """Schedule the thread form in `sch` in place; deterministic for a declaration."""
    function = sch.mod["main"]
    spec, layout = spec_of(function), thread_layout_of(function)
    for band in bands(spec):
        block, lanes = bind_band(sch, band.index, layout)
        if reaches(spec, band):
            sch.compute_inline(sch.get_sblock(f"window{band.index}"))
            if layout.depth_threads > 1:
                lanes = bind_parts(sch, band.index, block)
            order_sums(sch, sch.get_sblock(f"acc{band.index}"), lanes)
