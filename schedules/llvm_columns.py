"""CPU: vector lanes along output columns. For few channels, depthwise and grouped layers, and large images.

One vector of input columns meets one weight, broadcast. For each output row of a band and each block of channels the
loop nest goes from

    for n, g, b, ph, qh, ob, pw, qw, th, ic, tw:      acc += window * packed
    for n, g, b, ob, ph, qh, qw, pw:                  band = acc + bias

to

    for n*g*(qh / row_chunk)*b*ph*(tiles of rows in a chunk):   parallel
      for qw / column_block:                  the last tile apart, if it has fewer vectors, see `Layout.last_vectors`
        for pw / phases:                      unrolled
          for parts of th, tw, ic:            as `partial_sum` says; each ends with an addition to sums in memory
            for tw of the part:               unrolled; inside the loop over ic where `sums_taps_first` says so
             for ic of the part:              left out where it would read a row of the border
              for qh % row_block:             unrolled     } row_block * co_block * phases * column_block/lanes
               for ob:                        unrolled     } accumulators in registers
                for pw % phases:              unrolled     }
                  for qw / lanes:             unrolled     }
                    for qw % lanes:           vectorized
        for qh % row_block, ob:               qw and pw: interleaved in registers

In channels_last the last line is

        for pw:                               ob and qw: transposed in registers

With ``column_chunk`` the parallel loop counts chunks of columns as well, before b: those of long rows. With
``by_chunk`` it ends before b, and begins with the copy of what its chunk of rows reads.

With ``gathers`` it ends with b, the rows of all phases of the chunk go to a buffer, and from there past the caches to
the output, most of them beside the sums of the rows that follow. With ``streams`` it ends with b as well, and vectors
go past the caches from registers: each is joined with the one before in its row to a whole cache line.

With few channels the column phases are worked on together, and of small images several rows, so that enough sums are
under way to hide the latency of an addition.

What limits it on one core of a Zen 4 server (115 GFLOP/s; shares of samples by ``perf``, share of that peak after the
name; answers checked):

- Surplus columns: seed/square (73 %) computes 101 columns as 112, fcn8s/up8 (83 %) 29 as 32; since last tiles sum no
  more vectors than have an output, whatever the tile (on an Emerald Rapids server 0.91 of the time for seed/rect, 0.93
  for seed/square). One vector of columns, and 8 to 12 channels to hide an addition's latency, took the place of two
  vectors by 11 to 14 channels, at 0.93 to 1.03 of the time where rows are whole vectors (unet/up1 97 %, dilated/k3d2
  97 %, sam/up1 94 %).
- Pages. With rows of one channel together each of dilated/k3d2's 128 channels is in a page of its own; with all
  channels of a row together it took 0.96 of the time (`convt_tvm.layout.MANY_INPUTS`).
- Memory. kernelbench/75 (67 %) and kernelbench/81 (57 %) write 50 MB, of which 7 and 9 % is time spent on rows of the
  bias alone. Through the caches seed/square took 22 ms, with lines asked for ahead 17, past the caches 14 where all
  rows of a task were copied in the end, and 13 beside the sums of the next rows: kernelbench/75 went from 8.6 to 7.9 ms
  and kernelbench/81 from 5.6 to 5.0 by this. The copies still take 10 to 20 % of the samples, 6 cycles a line. From
  registers they take 6.3 and 4.4. In a quiet hour seed/square is fastest through the caches, with lines asked for:
  10.9 ms, 11.8 gathered, 12.5 from registers.
- Everything but sums, where there are few: bilinear/depthwise (45 %) spends 47 % in multiply-adds, 26 % in interleaving
  and storing, 15 % in copying its window.
- Parts. Sums of 8 to 14 accumulators stay in registers beside their parts; more go through the stack.
- Loads. One channel has no other sum to share a vector of input with: fsrcnn/x3 (86 %) loads 7 vectors for 12
  multiply-adds.

On an Emerald Rapids server (two multiply-adds a cycle) interleaving in registers, with code of its own for the last
tile of a row, made fcn8s/up8 (8 phases) 2.1 times as fast, kernelbench/75 1.29, kernelbench/81 1.20, seed/square 1.18,
grouped/4 1.13, dcgan/5 1.09. What limits it there:

- Loads. A vector that begins with any column lies across two cache lines and takes two of the two loads a cycle, so
  tiles of few channels wait for them: of seed/rect 3 channels by 4 vectors took 14.6 ms, 11 by 2 took 13.6 (58 %).
  fsrcnn/x3 (58 %), one channel, has 21 loads for 36 multiply-adds; with rows of all channels together, which are in
  fewer pages, it took 0.35 ms in place of 0.40. In C the same loop, its rows whole cache lines apart, reached 90 %;
  here that cost layers of 32 columns a tenth.
- Outputs. Stores past the caches are slow: gathering pays for less than some 50 multiply-adds an output only. From
  registers there is nothing to copy, and lines are written whole wherever rows begin: kernelbench/81 went from 6.3 to
  4.1 ms, kernelbench/75 from 8.3 to 6.0, seed/square from 12.5 to 11.2. Loads of sums wait behind a tile's stores,
  22 to 88 lines at once, which seed/rect and unet/up4, with more sums for each, lose by: they store through the
  caches. A row's first and last line are shared with its neighbours; asked for ahead, they gained 8 % for seed/square.
  In C the stores of a tile at once hide two thirds of the 3 ms that 53 MB take beside 36 multiply-adds a line; kept in
  the first cache, and stored one by one between the next tile's steps, they took 1.1 to 1.25 times as long. Vectors
  of input that never lie across lines saved 15 % there in a quiet hour, 3 % in a busy one.
- Copies. The windows of a batch together are read from beyond the second cache; copied and used one image at a time
  seed/rect took 0.87 of the time, seed/square 0.91, maskrcnn/mask (lanes along channels) 0.96; on two threads 0.97,
  0.94 and 0.97. Rows of 14 took 12 cycles each; in vectors, all channels of a row before the next row, as they lie in
  the window, 16 images of 14 x 14 to one channel took 0.8 of the time. What is left is loads: rows 72 bytes apart lie
  across two cache lines each, and the first cache does not hold the window.
- Copies of images from half a megabyte on. Chunk by chunk, those of a group at once where groups are enough for all
  threads, 64 to 4 channels on 224 x 224 in each of 4 groups took 0.4 of the time, 64 to 3 on 256 x 256 0.6, one channel
  in a group 0.65 to 0.93, 16 to 64 with 1 x 1 taps 0.44 in chunks that the first cache holds, 0.82 in larger ones.
- Last tiles. 8 channels by 3 vectors leave one vector of 64 columns, whose 8 sums wait for 8 scalars: 13 by 2 took 0.9
  to 0.95 of the time for 64 columns, 5 by 3 in place of 10 by 2 0.8 to 0.86 for 33 and 48.
- Register arrays. LLVM keeps sums in registers if all loops around their stores are unrolled: in a loop over channels
  seed/rect took 1.1 times as long. Vectors of 48 values took kernelbench/75 2.7 times as long, fsrcnn/x3 1.25.
- Channels_last. Transposes in registers took a layer of 32 to 8 channels from 0.37 ms, lanes along channels, to 0.21,
  fcn8s/up8 from 1.94 to 1.70.

And on one of a Zen 3 server (AVX2, 16 registers, 95 GFLOP/s):

- Registers. Column phases that begin in different columns share vectors of input from one tap to the next, for which
  there is no room beside 12 sums. In step (`convt_tvm.layout.column_delays`) they read each vector once, and use it up:
  dcgan/5 took 0.082 ms in place of 0.111, 128 to 3 channels on 128 x 128 0.85 to 0.89 of the time, fsrcnn/x3 0.94. Of
  steps that LLVM unrolls, as all of kernelbench/75's 8 channels, it loads ahead what registers do not hold, unless each
  has to load after the one before (`convt_tvm.lower_products`): 0.80 to 0.91 of the time.
- Loads. Vectors of half a cache line are hardly ever waited for: more phases with fewer channels are as good
  (fcn8s/up8 2.5 ms, 3 channels by 2 vectors and 2 phases; 3.0 with lanes along channels).
- Outputs. Gathered, seed/square took 19.5 ms, through the caches 22. From registers, each line put together from three
  vectors of half a line, it took 1.16 times as long as gathered, kernelbench/81 1.3; with a share of the copies before
  each phase's sums 1.02 to 1.06 (kernelbench/75, 81). In C 8 lines at a time cost a loop of multiply-adds 8 %, 40 16 %.
- Sums. 4 channels by 2 vectors, all that 32 channels divide into, are just enough sums to hide an addition's latency:
  3 x 7 taps with stride 1 run at 77 % of the peak. 4 by 3, which leave no register spare, took 1.02 of the time, tiles
  of all blocks one after the other and asking for the next tile's rows ahead 0.97 to 1.01.
- Pages. Where the rows of all channels are in more than 64 of them, as with 128 channels and rows of 512 values, each
  step waits 4 cycles: such layers run at half their speed, and lanes along channels take those of many channels.
- Copies. Where the caches do not hold an image and its window, with copies by chunk, which stay in the second cache,
  128 to 3 channels on 128 x 128 took 0.54 of the time (0.57 in channels_last, 0.56 and 0.67 on two threads), 32 to 3 on
  256 x 256 0.57 to 0.76, 16 to 16 with stride 1 0.79, 64 to 12 on 128 x 128 0.85 to 0.97.
- Rows. One long row is one task for each block: in chunks of columns 96 to 2 channels on 1 x 2000 took 0.60 of the time
  on two threads (in channels_last as well), 32 to 1 on 1 x 32768 0.63 and 0.49, 16 to 16 on 1 x 4096 0.83 and 0.55.
"""

from collections.abc import Iterator
from dataclasses import replace

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
    in_column_chunks,
    is_for_memory,
    lane_counts,
    past_caches,
    phase_blocks,
    row_chunks,
)
from convt_tvm.layout import PAGE_BYTES, Layout, bands, reached_bands, reaches, sums_taps_first
from convt_tvm.schedule import (
    accumulate,
    chunk_columns,
    copy_window,
    find_window,
    find_window_of,
    join_images,
    parallelize,
    sum_loops,
    works_apart,
)
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target

NAME = "llvm_columns"
TARGET_KIND = "llvm"

MAX_VECTORS = 4
MAX_CHANNELS = 14
FEW_SUMS, ENOUGH_SUMS = 8, 16
"""Accumulators below which a row of all channels, columns and phases has too few, for additions to hide their latency,
and up to which a tile then takes in several rows.

On an Emerald Rapids server 14 x 14 images to one channel took 0.75 of the time with 7 rows, 0.8 with 2 or 14. Where
there were 8 to 12 without, two rows took 0.92 to 1.02, and three 1.07.
"""
MAX_INTERLEAVED = 512
"""Outputs in a row of a tile beyond which they are stored one by one, to keep code small."""
CYCLES_PER_INPUT = {"nchw": 0.5, "nhwc": 1.5}
CYCLES_ONE_BY_ONE = 5.0
"""For an output that goes to NHWC on its own (Zen 4, beside one in vectors to NCHW: fcn8s/up8 1.4 more, unet/up4 2.2,
unet/up1 4.8)."""
CYCLES_PER_PLACE = 4.5
"""For the channels of a block, which are side by side in NHWC (Emerald Rapids: an output took 1.4 cycles more than in
NCHW with 4 of them in kernelbench/75, 0.8 with 7 in fcn8s/up8, 0.5 and 0.8 with 11 in seed/rect and seed/square)."""
KNOWN_PAGES, CYCLES_PER_PAGE = 48, 4.0
"""Pages whose places a core has at hand beside those of weights and sums, and cycles for another's.

On a Zen 3 core, whose first table has 64 entries, 128 to 32 channels with rows of 120, 192 and 384 values ran at 64 to
73 GFLOP/s in tiles of 4 channels by 2 vectors, with rows of 480 to 1,920 at 33 to 42; 64 channels at 70 to 80 up to
480; 32 channels at 75 whatever their rows.
"""
CYCLES_PER_RUN = 40.0
"""Cycles for each run of inputs copied: one row of a channel opens a page of its own (sam/up1, 3 % of its time)."""


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Every spec."""
    return True


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts whose accumulators fit the registers, each with its estimated cycles."""
    channels = spec.co // spec.groups
    height, widest = (axis.widest for axis in spec.axes)
    for lanes in lane_counts(spec, target):
        for vectors in range(1, min(MAX_VECTORS, -(-widest // lanes)) + 1):
            for co_block in block_sizes(channels, MAX_CHANNELS):
                of_row = vectors * co_block * len(spec.axes[1].phases)
                is_whole = co_block == channels and vectors * lanes >= widest
                for rows in block_sizes(height, ENOUGH_SUMS // of_row) if is_whole and of_row < FEW_SUMS else (1,):
                    tile = Tile(vectors * rows, co_block, lanes * DTYPE_BYTES[spec.accumulator_dtype])
                    for phases in phase_blocks(spec, target, tile) if tile.fits(target) else ():
                        plain = Layout("ow", co_block, rows, vectors * lanes, lanes, rows, phases)
                        yield from _estimated(spec, plain, tile, target)


def _estimated(spec: ConvTranspose2dSpec, plain: Layout, tile: Tile, target: Target) -> Iterator[tuple[Layout, float]]:
    """`plain` in every size of chunks, and with its outputs past the caches, each with its estimated cycles."""
    # Taken one after the other, column taps read a row of all channels again.
    row_bytes = spec.ci // spec.groups * plain.column_block * DTYPE_BYTES[spec.accumulator_dtype]
    stays = not sums_taps_first(spec) or row_bytes <= FIRST_CACHE_BYTES
    reuse = plain.phases * (max(1, spec.axes[1].most_taps) if stays else 1)
    sizes = row_chunks(spec, plain.row_block, target)
    chunked = [in_column_chunks(spec, replace(plain, row_chunk=size), target) for size in sizes]
    passing = past_caches(spec, plain, target) if is_for_memory(spec) and plain.row_block == 1 else ()
    for layout in (*chunked, *passing, *by_chunk(spec, plain, target)):
        once = not layout.by_chunk and copies_by_chunk(spec, layout)
        run = layout.row_chunk * spec.iw if layout.by_chunk or once else spec.ih * spec.iw
        copy = CYCLES_PER_INPUT[spec.input_axes]
        copy = copy if once else copy_cycles(spec, layout, target, copy)
        costs = Costs(copy + CYCLES_PER_RUN / run, _cycles_per_output(spec, layout, target), _missed(spec))
        cycles = core_cycles(spec, layout, tile, target, reuse=reuse, costs=costs)
        blocks = layout.blocks(spec)
        in_blocks = spec.output_axes == "nhwc" and blocks > 1 and spec.groups * blocks > 2
        yield layout, cycles * (core_of(target).in_blocks if in_blocks else 1.0)


def _missed(spec: ConvTranspose2dSpec) -> float:
    """Cycles in which a step waits for the place of its row: where the rows of all channels are in too many pages."""
    channels, itemsize = spec.ci // spec.groups, DTYPE_BYTES[spec.accumulator_dtype]
    pages = channels * min(1.0, spec.iw * itemsize / PAGE_BYTES)
    if pages <= KNOWN_PAGES:
        return 0.0
    # One row serves all column taps of a channel where they are taken one after the other.
    taps = max(1, spec.axes[1].most_taps) if sums_taps_first(spec) else 1
    return CYCLES_PER_PAGE / taps


def _cycles_per_output(spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> float:
    """What it takes to write one output."""
    if spec.output_axes == "nchw":
        return core_of(target).stored
    moved = core_of(target).moved + CYCLES_PER_PLACE / layout.co_block
    return moved if in_vectors(spec, layout) else CYCLES_ONE_BY_ONE


def in_vectors(spec: ConvTranspose2dSpec, layout: Layout) -> bool:
    """Whether outputs of a tile are moved in registers, so that those side by side in memory are stored together."""
    return layout.column_block * len(spec.axes[1].phases) <= MAX_INTERLEAVED


def copies_by_chunk(spec: ConvTranspose2dSpec, layout: Layout) -> bool:
    """Whether the window is copied chunk by chunk: where each of its rows serves the rows of one chunk only.

    So it is with one tap for each row phase. There must be several chunks, for they are what threads share. Bands that
    are gathered together share tasks for single blocks, and a window of a chunk would be copied in each.
    """
    if layout.column_chunk or (layout.passes_caches and len(bands(spec)) > 1):
        return False
    reached = reached_bands(spec)
    if len(reached) != 1 or spec.groups != 1:
        return False
    band = reached[0]
    return band.reads_one_row and layout.rows(band) > layout.chunk(band)


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    function = sch.mod["main"]
    spec, layout = spec_of(function), layout_of(function)
    window = find_window(sch)
    apart = works_apart(sch)
    by_chunk = window is not None and not apart and copies_by_chunk(spec, layout)
    if window is not None and not by_chunk:
        copy_window(sch, spec, window, apart=apart)
    for band in bands(spec):
        output = sch.get_sblock(f"band{band.index}")
        n, g, b, ob, ph, qh, qw, pw = sch.get_loops(output)
        column_block, column = sch.split(qw, [None, layout.column_block])
        chunk, row_block, row = sch.split(qh, [None, layout.chunk(band) // layout.row_block, layout.row_block])
        order = (n, g, chunk, b, row_block, ph) if layout.passes_caches else (n, g, chunk, b, ph, row_block)
        moved = reaches(spec, band) and in_vectors(spec, layout)
        by_places = moved and spec.output_axes == "nhwc"
        sch.reorder(*order, column_block, row, *((ob, pw, column) if by_places else (ob, column, pw)))
        if moved:
            sch.annotate(ob if by_places else column, IN_VECTORS, True)
        ends_apart = layout.last_vectors(spec) * layout.vector_lanes < layout.column_block
        if reaches(spec, band) and ends_apart:
            sch.annotate(column_block, PEELS, True)
        of_chunk = (by_chunk or layout.by_chunk) and reaches(spec, band)
        shared = order[:3] if of_chunk else order[:4] if layout.passes_caches else order
        task = parallelize(sch, shared, band_cycles(spec, target_of(function)), apart=apart)
        if layout.passes_caches:
            # A loop over one block is simplified away.
            sch.annotate(b if of_chunk and layout.blocks(spec) > 1 else task, PASSES_CACHES, True)
        if reaches(spec, band):
            chunk_columns(sch, band, task, column_block)
            copied = find_window_of(sch, band) if layout.by_chunk else window
            acc = sch.get_sblock(f"acc{band.index}")
            sch.compute_at(acc, column_block, preserve_unit_loops=True)
            (row, ob, pw, qw), parts = sum_loops(sch, acc)
            phase_loop, phase = sch.split(pw, [None, layout.phases])
            vector, lane = sch.split(qw, [None, layout.vector_lanes])
            tile = (row, ob, phase, vector)
            sch.reorder(phase_loop, *parts, *tile, lane)
            accumulate(
                sch,
                band,
                phases=phase_loop,
                parts=parts,
                tile=tile,
                lane=lane,
                skips=not of_chunk,
                counts_vectors=ends_apart,
            )
            if of_chunk:
                copy_window(sch, spec, copied, task=sch.get_loops(output)[0])
    if apart:
        join_images(sch, spec, window)
