"""CUDA: input and weights staged in shared memory. For all but depthwise layers and the smallest.

One launch for each row band. A block of threads computes ``co_block`` channels of ``row_block x column_block``
positions in ``phases`` column phases; from

    for n, g, b, ph, rb, cb, pb, tz, ty, tr, tc, oc, qc, pi, io, ii, th, tw:   acc += window * packed
    for n, g, b, ph, rb, cb, pb, ty, oc, tr, qc, tc, pi:                       band = acc (of all tz) + bias

to

    blockIdx.x = n, g, ph, rb, cb, pb, b
      threadIdx.z = tz, threadIdx.y = ty, threadIdx.x = tr, tc
        for io:                                 a step: ci_block input channels
          window, packed to shared memory       all threads together, values side by side
          for ii:
            for th, tw:                         unrolled
              for pi, oc, qc:                   unrolled: the sums of one thread, in registers
        for oc, qc, pi: the output
                                                or, where threads tz share the input channels:
        for oc, qc, pi: sums to shared memory
      threadIdx = ty, oc, tr, qc, tc, pi: sums of all tz, the output

Threads of a warp read neighbouring columns and the same weights, so shared memory serves them without conflicts: rows
of the window are as far apart as spreads them over the banks. Each value read is multiplied ``channel_tile`` or
``column_tile`` times. The next step's values are on their way during the products (`convt_tvm.lower_prefetch`).

Small images and long sums leave most of a GPU idle, and a block waits for memory in each step. There ``depth_threads``
share an output's input channels, and add up what each has in a fixed order; outputs then leave in runs of columns.

On an H200, float32: multiply-adds limit unet, mask, pointpillars and sam, at half to three quarters of what cuBLAS
reaches; stores of strided columns limit seed/* and kernelbench/*, where lanes along whole rows of columns
fill sectors (seed/square took 77 us so, 110 with four lanes to a row); dcgan/*, pose/* and dilated wait for memory, a
step after the other.
"""

from collections.abc import Iterator

from tvm.s_tir import Schedule

from convt_tvm.compute import spec_of
from convt_tvm.compute_cuda import thread_layout_of
from convt_tvm.cost_cuda import grid_cycles, thread_layouts
from convt_tvm.layout import Layout, bands, reached_bands, reaches
from convt_tvm.schedule_cuda import bind_band, bind_parts, fetch, order_sums
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.thread_layout import row_alignment, weight_vector

NAME = "cuda_shared"
TARGET_KIND = "cuda"


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Where some tap reaches the output; `layouts` is empty where no stage fits shared memory."""
    return bool(reached_bands(spec))


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts within the limits of threads, registers and shared memory, each with its estimated cycles."""
    for layout in thread_layouts(spec, target, staged=True):
        yield layout, grid_cycles(spec, layout, target)


def space(sch: Schedule) -> None:
    """Schedule the thread form in `sch` in place; deterministic for a declaration."""
    function = sch.mod["main"]
    spec, layout = spec_of(function), thread_layout_of(function)
    for band in bands(spec):
        block, lanes = bind_band(sch, band.index, layout)
        if reaches(spec, band):
            if layout.depth_threads > 1:
                lanes = bind_parts(sch, band.index, block)
            window, acc = sch.get_sblock(f"window{band.index}"), sch.get_sblock(f"acc{band.index}")
            weights = sch.cache_read(acc, 1, "shared", consumer_blocks=[acc])
            sch.set_scope(window, 0, "shared")
            outer = order_sums(sch, acc, lanes)
            for copy, vector in ((window, 1), (weights, weight_vector(spec, layout))):
                dimensions = len(sch.get_loops(copy))
                sch.compute_at(copy, outer, preserve_unit_loops=True)
                fetch(sch, copy, dimensions, layout, vector)
            sch.storage_align(window, 0, -2, *row_alignment(layout))
