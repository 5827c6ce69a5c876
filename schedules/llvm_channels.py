"""CPU: vector lanes along output channels. For many channels and small images.

One vector of packed weights meets one input value, broadcast. For each output row of a band and each block of
channels the loop nest goes from

    for n, g, b, ph, qh, pw, qw, ob, th, ic, tw:      acc += window * packed
    for n, g, b, ob, ph, qh, qw, pw:                  band = acc + bias

to

    for n/image_block*g*(qh / row_chunk)*b*ph*(tiles of rows in a chunk):   parallel
      for qw / column_block:                  tiles that reach the border apart, see `Layout.skips_columns`
        for pw:                               unrolled
          for parts of th, tw, ic:            as `partial_sum` says; each ends with an addition to sums in memory
            for tw of the part:               unrolled; left out where it would read rows of the border only, and in a
                                              tile apart for columns of the border
              for ic of the part:
                for n % image_block:          unrolled     } image_block * row_block * column_block * co_block/lanes
                 for qh % row_block:          unrolled     } accumulators in registers
                  for qw % column_block:      unrolled     }
                   for ob / lanes:            unrolled     }
                      for ob % lanes:         vectorized
        for n % image_block, qh % row_block, ob / lanes:   ob % lanes, qw % column_block and pw: transposed in registers

or, with ``taps="outer"``, where a block's weights for one row phase do not fit the second cache, to

    for n*g*(qh / row_chunk)*b*ph:            parallel
      for pw, th, tw:                         pw unrolled
        for tiles of the chunk:
          for parts of ic:                    the same tile, whose sums are then added to those in memory
      for the output of the chunk:            as above

With ``column_chunk`` the parallel loop counts chunks of columns as well, before b: those of long rows. With
``by_chunk`` it ends before b, and begins with the copy of what its chunk of rows reads.

With ``gathers`` it ends with b, the rows of all phases of the chunk go to a buffer, and from there past the caches to
the output, most of them beside the sums of the rows that follow.

In channels_last groups follow each other within a chunk of rows, for lines of memory hold several of them: 256 to 16
channels in 4 groups on 224 x 224 took 0.7 of the time, 128 to 64 on 96 x 96 0.94 (Emerald Rapids, one core). Sums leave
as they are, vectors of channels, and the input itself is read where tiles are of one row
or none reaches beyond it, and what a tile reads side by side stays in the first cache
(`convt_tvm.layout.reads_input`).

What limits it on one core of a Zen 4 server (115 GFLOP/s; the share of that peak after the name; answers checked):

- Nothing much: pose/2 99 %, dcgan/3 98 %, dcgan/4 97 %, pointpillars/up4 96 %, maskrcnn/mask 94 %, grouped/4 89 %.
- Weights: dcgan/2 (95 %) and pose/1 (93 %) read 8 and 33 MB of them. Those of dcgan/2 stay in the last cache, which
  gives 24 bytes a cycle: read for each of its 4 rows, in tiles of 64 channels by 4 columns, they took 0.46 ms, and 0.51
  for two rows at a time, 16 channels by 2 x 4. With 24 for it the estimate chose tiles for 30 layers that took 0.90 to
  1.34 of the time, 0.99 as a geometric mean.
- Inputs: 24 positions of pose/1's 2,048 channels do not stay in the first cache; 24 by one vector took 12 % longer than
  12 by two, in hifigan/up1 (82 %) 16 positions 6 % longer than 13.
- Stores: asking for cache lines before the sums gained 5 % for maskrcnn/mask, 3 % for pointpillars/up4.
- Windows, in channels_last: copying one took 8 % of sam/up1, which reads the input itself now. Tiles of 13 of its rows,
  all in the same cache sets, were 15 % slower in bfloat16 than of one row.

And on one of an Emerald Rapids server (175 GFLOP/s, L2 2 MiB, 18 GB/s from beyond it):

- Sums. maskrcnn/mask, 28 accumulators, ran at 131 GFLOP/s where the same machine, shared, did 150 to 168 in a loop of
  multiply-adds alone; with all stores to one place that stays in cache, at 139.
- Where weights come from. A core that waits for them itself reads 15 to 18 GB/s, with `AHEAD_BYTES` asked for and huge
  pages 24 to 29: dcgan/2 (8.4 MB, once) went from 0.56 to 0.40 ms, where its products alone take 0.38; pose/1 (33 MB)
  from 7.4 to 5.4, read four times, which is no slower than once with ``taps="outer"`` any more. unet/up1 went from 47
  to 29 ms, pointpillars/up4 from 26.7 to 25.1 with chunks of rows that stay in the second cache while all blocks pass
  (one noisy series each).
- Streams. In channels_last positions of one row share a page, and the prefetchers lose them: unet/up4 took 7.9 ms in
  tiles of 1 x 8 positions, 6.8 in 4 x 2, and 6.6 in 4 x 1 of twice as many channels (95 %). Storing past the caches
  without gathering took 1.12 to 1.18 of the time.
- Chunks. Of equal estimates that with most rows, whose weights are a single block's, took 0.92 to 0.97 of the time on
  two threads in channels_last (dcgan/4, pose/1, grouped/4, dilated/k3d2), and 0.99 to 1.01 on one. In NCHW chunks of
  one row did (dcgan/4 0.95, grouped/4 0.93, one thread).
- Others. The two threads of such a core share its multiply-adds, loads and caches. In a virtual machine whose
  neighbour is busy everything takes 1.3 to 2 times as long, for seconds to minutes; then tiles of few loads lose
  least (dilated/k3d2 in channels_last 2.48 ms with 10 loads for 24 multiply-adds, 2.73 with 13 for 22).
- Parts. Before there were any, hifigan/up1 and dilated/k3d2 took 4 % less time, at up to 5 times the error.
- The border. A 1 x 1 image (dcgan/1) meets one of 16 taps; without the 15 others 0.24 became 0.13 ms. Asking for their
  weights all the same, and adding their partial sums of zero, took 64 such images 6.5 ms in place of 2.1. In
  channels_last, where tiles that leave it out need no window either, dilated/k3d2 took 0.91 of the time,
  bilinear/depthwise 0.84, dcgan/4 0.87, seed/square 0.83 and seed/rect 0.85, with the tiles that are best then.
- Stores. The transposes gained 5 % for dcgan/4, whose output stays in the second cache, and nothing where it does not:
  there a run of outputs waits for its cache lines, however it is stored.
- NCHW to NHWC: transposes in registers gained 3 % for grouped/4, 1 to 2 % for dcgan/4 and maskrcnn/mask.

And on one of a Zen 3 server (AVX2, 16 registers, 95 GFLOP/s, L2 512 KiB, L3 32 MiB):

- Registers. Of 12 sums LLVM loaded and stored two at every step, for those of the phase before were still to be stored:
  unet/up1 88 ms, now 51 (`convt_tvm.lower`). 12 sums in 2 vectors by 6 positions are the best tile of most layers: 8
  are just as many as two units have under way, 14 leave no register spare.
- Where weights come from. Memory gives some 5 bytes a cycle, of which a step of 12 multiply-adds needs 10, the last
  cache 20. With all rows in a chunk the taps of a block come from memory once, and for other rows from the last cache:
  pose/1 (33 MB) took 9.8 ms, 16.8 with a row in each.
- Rows. A row of 4 MB is read from beyond the second cache for each block of channels: 128 to 64 channels on 1 x 8192
  took 0.84 of the time in chunks of columns that stay there (in NCHW 0.8 with the same tile), 0.81 on two threads.
- Stride 1. 32 to 128 channels with 3 x 3 to 3 x 7 taps run at 76 to 87 % of the peak, as PyTorch's do. The loops over
  channels take 85 to 90 % of the time; adding partial sums of 32 products takes 8, which is why they are longer
  (`convt_tvm.layout.PARTIAL_ROOTS`). With ``taps="outer"``, whose weights stay in the first cache for a row of tiles,
  they mostly took 1.05 to 1.1 of the time.
- Streams, in channels_last: unet/up4 took 12.9 ms with positions in four rows and 14.1 in two, sam/up1 6.5 and 7.1.
- Phases in channels_last. With tiles of one column phase after the other, whose weights stay in the first cache (64 KiB
  of all four, 16 of one), pointpillars/up4 took 0.94 to 1.04 of the time, 128 to 64 channels with kernel and stride 4
  0.89; 192 to 96 with both 3, or 128 to 64 with 4 x 4 taps and stride 2, 1.2.
- Stores in channels_last. A block's channels of a position are a whole cache line; written past the caches, as two
  vectors one after the other, unet/up4 took 1.17 to 1.6 times as long and pointpillars/up4 1.05. On two threads it was
  0.95 and 1.06.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from tvm.s_tir import Schedule

from convt_tvm.compute import IN_VECTORS, PASSES_CACHES, PEELS, layout_of, spec_of, target_of
from convt_tvm.cost import (
    FIRST_CACHE_BYTES,
    Costs,
    Tile,
    band_cycles,
    block_sizes,
    by_chunk,
    copy_cycles,
    core_cycles,
    core_of,
    image_bytes,
    in_column_chunks,
    is_for_memory,
    lane_counts,
    past_caches,
    row_chunks,
)
from convt_tvm.layout import (
    CACHE_LINE_BYTES,
    PAGE_BYTES,
    Layout,
    Window,
    bands,
    collides,
    crowds,
    reaches,
    reads_input,
)
from convt_tvm.schedule import (
    POSITION_STREAMS,
    accumulate,
    chunk_columns,
    copy_window,
    find_window,
    find_window_of,
    image_loop,
    in_parts,
    join_images,
    parallelize,
    sum_loops,
    works_apart,
)
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target

NAME = "llvm_channels"
TARGET_KIND = "llvm"

MAX_VECTORS = 4
MAX_TRANSPOSED = 128
"""Outputs in a row of a tile beyond which they are stored one by one, to keep code small."""
MAX_POSITIONS = 28
SMALL_IMAGE = 16
"""Positions of an input up to which a tile may take in several images.

On one core of an Emerald Rapids server 64 images of 2 x 2 took 0.22 of the time with 8 in a tile (512 to 256 channels:
each weight met 16 values and not 4), 64 of 1 x 1 0.16 (kernels of 4 and 7), 16 of 3 x 3 0.64, 64 of 4 x 4 0.88.
"""
CYCLES_PER_INPUT = 1.0
"""For a copy, transposed or not. On an Emerald Rapids server dilated/k3d2 in NCHW, 32 channels by 11 columns, took 1.3
cycles longer for an input and an output than in channels_last, where both stay as they are."""
CYCLES_PER_OUTPUT = 0.2
"""In channels_last, where vectors leave as they are."""
CYCLES_PER_RUN = 8.0
"""Cycles for each run of outputs that a tile writes side by side: it opens a cache line, often a page, of its own."""

CYCLES_PER_MISSED = 0.2
"""For an input value from the second cache (Zen 4: pose/1 and hifigan/up1 12 and 6 % slower with more positions)."""


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Every spec."""
    return True


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts whose accumulators fit the registers, each with its estimated cycles."""
    channels = spec.co // spec.groups
    height, width = (axis.widest for axis in spec.axes)
    for lanes in lane_counts(spec, target):
        for vectors in range(1, min(MAX_VECTORS, -(-channels // lanes)) + 1):
            for columns in block_sizes(width, MAX_POSITIONS):
                for rows in block_sizes(height, MAX_POSITIONS // columns):
                    for images in image_blocks(spec, rows * columns):
                        plain = Layout("co", vectors * lanes, rows, columns, lanes, rows, image_block=images)
                        yield from _estimated(spec, plain, target)


def _estimated(spec: ConvTranspose2dSpec, plain: Layout, target: Target) -> Iterator[tuple[Layout, float]]:
    """`plain` in every size and order of chunks, and with its outputs past the caches, each with its estimated cycles.

    None if its accumulators do not fit the registers.
    """
    positions = plain.image_block * plain.row_block * plain.column_block
    vector_bytes = plain.vector_lanes * DTYPE_BYTES[spec.accumulator_dtype]
    tile = Tile(plain.co_block // plain.vector_lanes, positions, vector_bytes, in_order=True)
    if not tile.fits(target):
        return
    costs = _costs(spec, plain, target)
    # Of layouts with equal estimates the first is taken.
    for chunk in sorted(row_chunks(spec, plain.row_block, target), reverse=spec.output_axes == "nhwc"):
        layout = in_column_chunks(spec, replace(plain, row_chunk=chunk), target)
        yield layout, core_cycles(spec, layout, tile, target, reuse=1, costs=costs)
        if layout.slice_bytes(spec) > target.held_weight_bytes and layout.image_block == 1:
            layout = replace(plain, row_chunk=chunk, taps="outer")
            yield layout, core_of(target).outer * core_cycles(spec, layout, tile, target, reuse=1, costs=costs)
    for layout in past_caches(spec, plain, target) if is_for_memory(spec) else ():
        yield layout, core_cycles(spec, layout, tile, target, reuse=1, costs=costs)
    for layout in by_chunk(spec, plain, target):
        costs = _costs(spec, layout, target)
        yield layout, core_cycles(spec, layout, tile, target, reuse=1, costs=costs)


def image_blocks(spec: ConvTranspose2dSpec, positions: int) -> Iterable[int]:
    """How many images a tile may take in, each with so many positions: several if they are small."""
    images = spec.input_shape[0] if spec.ih * spec.iw <= SMALL_IMAGE else 1
    return block_sizes(images, MAX_POSITIONS // positions)


def _costs(spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> Costs:
    """What is paid besides sums."""
    column_bytes, input_bytes = spec.ci * DTYPE_BYTES[spec.dtype], spec.input_shape[0] * image_bytes(spec)
    streams = input_bytes > target.cache_bytes // 2 and column_bytes > 2 * CACHE_LINE_BYTES
    in_page = min(layout.column_block, -(-PAGE_BYTES // column_bytes)) if streams else 1
    return Costs(
        core_of(target).page_shared * (in_page - 1)
        if reads_input(spec, layout)
        else copy_cycles(spec, layout, target, CYCLES_PER_INPUT),
        (core_of(target).stored if spec.output_axes == "nchw" else CYCLES_PER_OUTPUT)
        + CYCLES_PER_RUN / outputs_in_run(spec, layout),
        _missed(spec, layout),
    )


def outputs_in_run(spec: ConvTranspose2dSpec, layout: Layout) -> int:
    """Outputs of a tile that are side by side in memory: of a row, or of a block of channels, or all of both."""
    columns = layout.column_block * len(spec.axes[1].phases)
    if spec.output_axes == "nchw":
        return columns
    return spec.co * columns if layout.co_block >= spec.co else min(layout.co_block, spec.co // spec.groups)


def _missed(spec: ConvTranspose2dSpec, layout: Layout) -> float:
    """Cycles in which a step waits for its inputs: what the first cache can't hold of all channels of a tile.

    It holds none where a tile has several rows, or images, that fall into the same sets.
    """
    itemsize, window = DTYPE_BYTES[spec.accumulator_dtype], Window.of(spec, layout)
    positions = layout.image_block * layout.row_block * layout.column_block
    size = positions * (spec.ci // spec.groups) * itemsize
    missed = max(0.0, 1 - FIRST_CACHE_BYTES / size)
    if layout.image_block * layout.row_block > 1 and not reads_input(spec, layout):
        column_bytes = spec.ci * itemsize
        if collides(column_bytes, POSITION_STREAMS):
            # As `convt_tvm.schedule` lays them out.
            column_bytes = (column_bytes // CACHE_LINE_BYTES | 1) * CACHE_LINE_BYTES
        missed = 1.0 if crowds(layout, column_bytes, (window.height, window.width)) else missed
    return CYCLES_PER_MISSED * positions * missed


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    spec, window, apart = spec_of(sch.mod["main"]), find_window(sch), works_apart(sch)
    tile(sch, apart=apart)
    if window is not None:
        copy_window(sch, spec, window, apart=apart)
    if apart:
        join_images(sch, spec, window)


def tile(sch: Schedule, *, apart: bool) -> None:
    """Schedule all but the window, of each image `apart` or of all."""
    function = sch.mod["main"]
    spec, layout = spec_of(function), layout_of(function)
    for band in bands(spec):
        output = sch.get_sblock(f"band{band.index}")
        n, g, b, ob, ph, qh, qw, pw = sch.get_loops(output)
        images = []
        if layout.image_block > 1:
            n, *images = sch.split(n, [None, layout.image_block])
        chunk, row_block, row = sch.split(qh, [None, layout.chunk(band) // layout.row_block, layout.row_block])
        column_block, column = sch.split(qw, [None, layout.column_block])
        vector, lane = sch.split(ob, [None, layout.vector_lanes])
        phased = (row_block, ph) if layout.gathers else (ph, row_block)
        around = (n, chunk, g, b) if spec.input_axes == "nhwc" and not layout.by_chunk else (n, g, chunk, b)
        sch.reorder(*around, *phased, column_block, *images, row, vector, lane, column, pw)
        if reaches(spec, band) and layout.skips_columns(spec):
            sch.annotate(column_block, PEELS, True)
        outputs = layout.column_block * len(spec.axes[1].phases)
        if reaches(spec, band) and (outputs > 1 or spec.output_axes == "nhwc") and outputs <= MAX_TRANSPOSED:
            sch.annotate(lane, IN_VECTORS, True)
        elif spec.output_axes == "nhwc":
            sch.reorder(column, pw, lane)
        inner = layout.taps == "inner" or not in_parts(sch, band)
        order: tuple[Any, ...] = (*around, ph, row_block)
        order = order[:4] if layout.gathers else order if inner else order[:5]
        of_chunk = layout.by_chunk and reaches(spec, band)
        order = order[:3] if of_chunk else order
        window = find_window_of(sch, band) if of_chunk else None
        task = parallelize(sch, order, band_cycles(spec, target_of(function)), apart=apart)
        if layout.gathers:
            sch.annotate(task, PASSES_CACHES, True)
        if reaches(spec, band):
            chunk_columns(sch, band, task, column_block)
            acc = sch.get_sblock(f"acc{band.index}")
            sch.compute_at(acc, column_block if inner else task, preserve_unit_loops=True)
            (qh, pw, qw, ob), parts = sum_loops(sch, acc)
            images = [image_loop(sch, acc)] if layout.image_block > 1 else []
            vector, lane = sch.split(ob, [None, layout.vector_lanes])
            row_block, row = sch.split(qh, [None, layout.row_block])
            column_block, column = sch.split(qw, [None, layout.column_block])
            loops = (*images, row, column, vector)
            if inner:
                sch.reorder(row_block, column_block, pw, *parts, *loops, lane)
            else:
                th, tw, ic = parts
                sch.reorder(pw, th, tw, row_block, column_block, ic, *loops, lane)
            accumulate(sch, band, phases=pw, parts=parts, tile=loops, lane=lane, skips=not of_chunk)
        if window is not None:
            copy_window(sch, spec, window, task=sch.get_loops(output)[0])
