"""CPU: products of bfloat16 in the tile unit (AMX). For bfloat16 with more than a few channels in a group.

An instruction multiplies 16 output channels by 32 input channels with these by 16 positions, and adds to 16 x 16 sums
in float32. Weights are packed as it reads them; the image becomes pairs of channels, which costs a shuffle for each
vector, and its positions are numbered through all rows (`TileLayout`). For each chunk of rows and each block of
channels the loop nest goes from

    for n, g, b, ph, chunk, pw, ob, p, th, tw, ks, kp, j:   acc += window * packed
    for n, g, b, ob, ph, qh, qw, pw:                        band = acc + bias

to

    for n*g*chunk*b*ph:                       parallel; the unit is configured, and released at the end
      for pw:                                 unrolled
        for p / positions:
          for th, tw, ks:                     one step of input channels
            for ob, p % positions, kp, j:     3 x 1 tile products, or 2 x 2, or 1 x 4, from 4 or 5 tiles read
          for ob, p % positions:              sums to memory
      for ob, rows of the chunk, qw / column_block:
        for qw % column_block, pw:            interleaved in registers

With ``column_chunk`` the parallel loop counts chunks of columns as well, after those of rows, which have one row each.

In channels_last sums have a row for each position and a column for each channel instead, ``p`` before ``ob``: what the
unit reads of the image is then as it lies in memory, and what is stored too. Where there is no border the input
itself is read, the last tile beginning earlier to end with a chunk; else its rows are copied, with zeros around.

What it brings, in milliseconds on one core of an Emerald Rapids server, NCHW, weights packed, other work on the same
core (processor time by turns in one process, median of 11 rounds, answers checked):

    =================  =========  ========  ==========  ===================
    workload           this       float32   PyTorch's   ... channels_last
    =================  =========  ========  ==========  ===================
    dcgan/3            0.116      0.490     1.60        0.466
    dcgan/4            0.088      0.510     0.631       0.217
    dcgan/5            0.053      0.060     0.180       0.113
    unet/up1           9.66       41.4      23.6        9.83
    unet/up4           3.17       8.74      26.9        2.84
    pose/1             2.01       8.67      23.0        21.6
    pose/2             0.563      3.05      3.42        1.91
    fcn8s/up8          0.721      1.75      17.5        13.5
    maskrcnn/mask      3.69       13.4      10.4        4.30
    pointpillars/up4   8.80       39.2      70.4        13.0
    sam/up1            1.31       4.77      6.16        1.43
    hifigan/up1        0.720      3.17      7.46        6.03
    grouped/4          0.155      0.543     1.06        0.241
    dilated/k3d2       0.327      2.05      0.663       0.322
    seed/square        9.91       21.5      62.7        13.7
    =================  =========  ========  ==========  ===================

And in channels_last, on another day and alone on the core but for unet/up4, maskrcnn/mask and pointpillars/up4, in
bfloat16 and times of PyTorch's in the same format: dcgan/2 0.20 and 7.2, dcgan/3 0.084 and 4.0, dcgan/4 0.065 and 2.4,
dcgan/5 0.036 and 2.5, unet/up1 7.1 and 1.2, unet/up4 2.0 and 2.1, pose/1 1.4 and 12, pose/2 0.50 and 2.2, fcn8s/up8
0.59 and 20, maskrcnn/mask 6.8 and 1.0, pointpillars/up4 6.9 and 1.4, sam/up1 0.71 and 1.2, hifigan/up1 0.40 and 13,
grouped/4 0.16 and 1.5, dilated/k3d2 0.25 and 1.2, seed/square 8.1 and 1.4, seed/rect 5.5 and 33.

What limits it:

- Copies of the image, in channels_last, where there is a border. maskrcnn/mask, whose 14 x 14 positions no tile of 32
  ends with, had one until last tiles began earlier: 1.0 of PyTorch's time then, 0.61 to 0.71 now.
- Everything but the products. The unit did 2,800 GFLOP/s with its operands in registers, 16 cycles for each product,
  and as many for 1 row of channels as for 16; unet/up1 reaches 600, unet/up4 with 128 input channels and one tap 350.
- Reading the image: a tile's 16 rows lie in two cache lines each wherever a tap shifts them. With one channel tile
  nothing hides that: fsrcnn/x3 (one output channel) took 0.70 ms where float32 takes 0.45, and goes the other way now.
- Stores: when this was measured 5 instructions turned 16 sums into bfloat16; with ``vcvtneps2bf16`` one does.
- Weights, for few positions: dcgan/2 reads 4 MB, pose/1 17 MB.
- Long rows. Before there were chunks of columns, or tasks of one row for images of more than 64, such images were not
  for this schedule: 32 to 32 channels with 3 x 3 taps on 384 x 768 took 42 ms, now 15 to 19, and in channels_last 39,
  now 9 (PyTorch's 7); 64 to 64 on 512 x 512 154, now 28 (PyTorch's 47). A quarter of the 9 ms is the copy of a window
  of 19 MB; in tasks that each copy what they read, as `by_chunk` has it, both that layer and pointpillars/up4 took 0.94
  to 1.28 of the time.
- Tiles of positions. As products alone 2 x 2, 2 x 1, 1 x 4 and 1 x 1 are equal, 16 cycles each with all operands in the
  first cache. With what is around them, of 205 layers in either memory format, one tile of positions took 0.5 to 0.95
  of the time of the best of several in 112, and 1.05 to 1.6 in 40 (weights of 2 MB and more, or NCHW in a quiet hour).
  What the costs below choose took 1.02 times as long as the best in channels_last and 1.04 in NCHW (geometric means),
  what was chosen before, when each tile of positions was reckoned with 150 cycles, 1.19 and 1.20.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

from tvm.s_tir import Schedule

from convt_tvm.compute import IN_VECTORS, spec_of, target_of
from convt_tvm.compute_tiles import ENDS_AT, IN_TILES, tile_layout_of
from convt_tvm.cost import MISS_BYTES_PER_CYCLE, TASKS, band_cycles, block_sizes, lane_counts
from convt_tvm.layout import Layout, bands, reached_bands, reaches
from convt_tvm.schedule import find_window, parallelize
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tile_layout import REGISTERS, TILE_POSITIONS, TILE_ROWS, TileLayout

NAME = "llvm_amx"
TARGET_KIND = "llvm"

MAX_CHANNEL_TILES = 3
MAX_POSITION_TILES = 4
MAX_SUMS_SHARE = 4
"""The part of the second cache that the sums of a chunk may take: a quarter."""
MIN_TILES = 4
"""Of positions, that a chunk of columns has at least, if its sums are few enough."""
MAX_COLUMNS = 8
"""Places of a row that are stored together in channels_last."""
MAX_INTERLEAVED = 512
"""Outputs in a row of a tile beyond which they are stored one by one, to keep code small."""
CYCLES_PER_PRODUCT = 16
"""Of a tile product, however few of its rows and columns are used (16 to 1 rows tried)."""
CYCLES_PER_WEIGHTS = 8
CYCLES_PER_IMAGE = 32
CYCLES_PER_PLACES = 16
"""For reading a tile: of weights, whose rows are whole cache lines, of an image in pairs, whose rows lie in two each,
and of one in NHWC."""
CYCLES_PER_SUMS = 20
"""For each tile of sums, to be stored and set to zero."""
MORE_POSITIONS = 0.2
"""What share longer all sums take for each tile of positions in registers beyond one."""
CYCLES_PER_TASK = 500
CYCLES_PER_INPUT, CYCLES_PER_OUTPUT = {"ow": 0.5, "co": 0.3}, {"ow": 1.0, "co": 0.5}
"""For making a pair or copying a place, and for storing, by what lanes run along."""
CYCLES_PER_RUN = 8.0
"""Cycles for each run of outputs stored side by side."""


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Specs in bfloat16 that have any product."""
    return spec.dtype == "bfloat16" and bool(reached_bands(spec))


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts whose sums fit the tile registers and a part of the second cache, each with its estimated cycles."""
    if "amx-bf16" not in target.features:
        return
    height, width = (axis.widest for axis in spec.axes)
    counts = lane_counts(spec, target)
    by_positions = spec.output_axes == "nhwc"
    if not by_positions and spec.input_axes == "nhwc":
        # One output channel: making pairs of NHWC takes longer than all sums (fsrcnn/x3 1.9 ms, in float32 0.4).
        return
    channels = spec.co // spec.groups
    for tiles in range(1, min(MAX_CHANNEL_TILES, -(-channels // TILE_ROWS)) + 1):
        if by_positions:
            # Whole vectors of channels.
            co_block, lanes = tiles * TILE_ROWS, TILE_ROWS
            whole = max(size for size in range(1, MAX_COLUMNS + 1) if width % size == 0)
            columns = [whole if 2 * whole > min(width, MAX_COLUMNS) else -(-width // -(-width // MAX_COLUMNS))]
        else:
            block = -(-channels // -(-channels // (tiles * TILE_ROWS)))
            if -(-block // TILE_ROWS) < tiles:
                continue
            co_block, lanes = -(-block // tiles) * tiles, min((c for c in counts if c >= width), default=counts[0])
            columns = [vectors * lanes for vectors in range(1, min(2, -(-width // lanes)) + 1)]
        for column_block, count in product(columns, range(1, MAX_POSITION_TILES + 1)):
            if tiles * (count + 1) + min(2, count) > REGISTERS:
                continue
            plain = TileLayout(
                lanes="co" if by_positions else "ow",
                co_block=co_block,
                row_block=1,
                column_block=column_block,
                vector_lanes=lanes,
                row_chunk=1,
                positions=count * TILE_POSITIONS,
            )
            for chunk in block_sizes(height, height):
                layout = replace(plain, row_chunk=chunk) if chunk > 1 else _in_column_chunks(spec, plain, target)
                if _sums_bytes(spec, layout) <= target.cache_bytes // MAX_SUMS_SHARE:
                    yield layout, _cycles(spec, layout, target)


def _sums_bytes(spec: ConvTranspose2dSpec, layout: TileLayout) -> int:
    """Size of the sums of a task."""
    summed = max(layout.chunk_tiles(spec, band) for band in bands(spec)) * layout.positions
    return len(spec.axes[1].phases) * layout.co_block * summed * DTYPE_BYTES["float32"]


def _in_column_chunks(spec: ConvTranspose2dSpec, layout: TileLayout, target: Target) -> TileLayout:
    """`layout`, whose tasks have one row, with long rows in chunks of columns.

    So that the sums of a task are few enough, and that there are tasks to share where rows are few. Equal chunks do not
    reach beyond the image.
    """
    tiles = -(-spec.axes[1].widest // layout.column_block)
    tasks = spec.input_shape[0] * spec.groups * layout.blocks(spec)
    tasks *= sum(len(band.phases) * layout.rows(band) for band in bands(spec))
    fewest = -(-_sums_bytes(spec, layout) // (target.cache_bytes // MAX_SUMS_SHARE))
    shared = min(-(-TASKS // tasks), spec.axes[1].widest // (MIN_TILES * layout.positions))
    least = min(tiles, max(fewest, shared, 1))
    count = next((count for count in range(least, 2 * least) if tiles % count == 0), least)
    return layout if count < 2 else replace(layout, column_chunk=-(-tiles // count) * layout.column_block)


def _cycles(spec: ConvTranspose2dSpec, layout: TileLayout, target: Target) -> float:
    """Estimated cycles of one core: products, what surrounds them, weights read, inputs paired, outputs stored."""
    lead = spec.input_shape[0] * spec.groups * layout.blocks(spec)
    column_taps = spec.axes[1].all_taps
    column_phases = len(spec.axes[1].phases)
    registers = layout.channel_tiles * layout.position_tiles
    products, more = registers * CYCLES_PER_PRODUCT, 1 + MORE_POSITIONS * (layout.position_tiles - 1)
    reads = layout.channel_tiles * CYCLES_PER_WEIGHTS
    reads += layout.position_tiles * (CYCLES_PER_PLACES if layout.by_positions else CYCLES_PER_IMAGE)
    total, chunks = 0.0, 1
    for band in bands(spec):
        chunks = layout.chunks(spec, band)
        tasks = lead * len(band.phases) * chunks
        tiles = tasks * layout.chunk_tiles(spec, band)
        steps = tiles * band.taps * column_taps * layout.steps(spec)
        sums = steps * max(products, reads) + tiles * column_phases * registers * CYCLES_PER_SUMS
        total += more * sums + tasks * CYCLES_PER_TASK
    weight_bytes = prod(layout.packed_shape(spec)) * DTYPE_BYTES[spec.dtype]
    if weight_bytes > target.cache_bytes // 2:
        weight_bytes *= spec.input_shape[0] * chunks
    per_input = 0.0 if layout.reads_input(spec) else CYCLES_PER_INPUT[layout.lanes]
    run = layout.co_block if layout.by_positions else layout.column_block * column_phases
    return (
        total
        + weight_bytes / MISS_BYTES_PER_CYCLE
        + prod(spec.input_shape) * per_input
        + prod(spec.output_shape) * (CYCLES_PER_OUTPUT[layout.lanes] + CYCLES_PER_RUN / run)
    )


def space(sch: Schedule) -> None:
    """Schedule the tile form in `sch` in place; deterministic for a declaration."""
    function = sch.mod["main"]
    spec, layout = spec_of(function), tile_layout_of(function)
    for band in bands(spec):
        output = sch.get_sblock(f"band{band.index}")
        n, g, b, ob, ph, qh, qw, pw = sch.get_loops(output)
        of_chunk = layout.chunk_columns(spec) // layout.column_block
        columns, column_block, column = sch.split(qw, [None, of_chunk, layout.column_block])
        chunk, row = sch.split(qh, [None, layout.chunk(band)])
        order = (n, g, chunk, columns, b, ph)
        if layout.by_positions:
            vector, lane = sch.split(ob, [None, layout.vector_lanes])
            sch.reorder(*order, row, column_block, vector, lane, column, pw)
        else:
            sch.reorder(*order, ob, row, column_block, column, pw)
        if layout.column_block * len(spec.axes[1].phases) <= MAX_INTERLEAVED and reaches(spec, band):
            sch.annotate(lane if layout.by_positions else column, IN_VECTORS, True)
        task = parallelize(sch, order, band_cycles(spec, target_of(function)))
        if reaches(spec, band):
            sch.annotate(task, IN_TILES, "configure")
            acc = sch.get_sblock(f"acc{band.index}")
            sch.compute_at(acc, task, preserve_unit_loops=True)
            pw, *of_tile, th, tw, ks, kp, j = sch.get_loops(acc)[-8:]
            place, ob = of_tile if layout.by_positions else reversed(of_tile)
            tile, position = sch.split(place, [None, layout.positions])
            rows, lanes = (position, ob) if layout.by_positions else (ob, position)
            sch.reorder(pw, tile, th, tw, ks, rows, lanes, kp, j)
            stored = sch.cache_write(acc, 0, "local")
            sch.reverse_compute_at(stored, tile, preserve_unit_loops=True)
            if layout.reads_input(spec) and layout.chunk_tiles(spec, band) > 1:
                sch.annotate(tile, ENDS_AT, layout.chunk_positions(spec, band))
            sch.unroll(pw)
            zeroed = sch.decompose_reduction(acc, th)
            outermost = {"zero": sch.get_loops(zeroed)[-2], "multiply": rows, "store": sch.get_loops(stored)[-2]}
            for kind, loop in outermost.items():
                sch.annotate(loop, IN_TILES, kind)
    window = find_window(sch)
    if window is None:
        return
    *before, place, last = sch.get_loops(window)
    row, _ = sch.split(place, [None, layout.pitch(spec)])
    if layout.by_positions:
        before.append(row)
    else:
        sch.unroll(last)
    parallelize(sch, before, prod(spec.input_shape))
