"""CPU: channels summed before taps, lanes along all positions of an image. For few channels on small or narrow images.

The sums over channels are a product of two matrices, of weights with a row for each output channel and tap, and of an
image with a column for each of its positions; what taps reach an output is gathered from it. This is what libraries do
by a matrix product and ``col2im``, but that nothing is added up in memory: each output is written once. The loop nest
goes from

    for n, g, m, f, ic:                               product += panel * packed
    for n, g, b, ph, qh, ob, pw, qw, th, tw:          acc += product
    for n, g, b, ob, ph, qh, qw, pw:                  band = acc + bias

to

    for n:                                            parallel, where there are many images
      for g*(f / positions)*(shares of m):            parallel otherwise
        for ic, f % positions:                        the panel: what is read of the image, side by side
        for m / weight_rows of a share:
          for parts of ic:                            as `summed_channels` says; each ends with an addition in memory
            for ic of the part:
              for m % weight_rows:                    unrolled     } weight_rows * positions/lanes
                for f % positions / lanes:            unrolled     } accumulators in registers
                  for lanes:                          vectorized
      for g*b*ph*qh:                                  parallel otherwise
        for qw / column_block:
          for th, tw:                                 rows beyond the image left out, columns by masks
            for pw, qw % column_block / lanes, lanes: unrolled, vectorized
          for qw % column_block, pw:                  interleaved in registers

or, in channels_last, with a block of channels in the last two lines. No lane is computed for a column beyond the end of
a row, and no product of the border: with lanes along columns those are a third to a half of all on images of 5 to 20
columns, or with 7 x 7 taps on 28 x 5. What it costs is that sums over channels go to memory and back, once for each
tap, which many input channels hide.

What it brings, on one core of a Zen 3 server by turns with the best of the other schedules, answers checked: of 160
layers (the public ones, and others that were drawn) the cost rule takes it for 30. These took 0.37 to 1.11 of the time,
a median of 0.79: 320 to 8 channels on 8 x 8, 128 to 3 on 112 x 5 0.37, 256 to 4 on 28 x 5 0.45, 512 to 3 on 40 x 25
0.67, 65 to 35 on 13 x 17 0.69, fsrcnn/x3 0.81, dcgan/5 1.03. On two threads the first three took 0.41, 0.47 and 0.47,
65 to 35 channels 0.77, fsrcnn/x3 0.85, dcgan/5 1.04.

In channels_last squares of channels and positions are transposed in registers for a panel, and of what was gathered
of several output channels for the output: 320 to 8 channels took 0.43 of the time, 256 to 4 0.45, 512 to 8 with 7 x 7
taps on 16 x 12 0.57, 512 to 1 on 32 x 32 0.68, 100 to 8 on 40 x 30 0.79, dcgan/5 1.02.

On one core of an Emerald Rapids server (AVX-512) 50 of 173 layers are estimated to gain. These took 0.22 to 1.19 of the
time, a median of 0.69: 96 to 1 channel on 128 x 9 0.22, 128 to 3 on 112 x 5 0.27, 512 to 1 on 32 x 32 0.50, 128 to 3 on
128 x 128 0.67, fsrcnn/x3 0.90, dcgan/5 0.92; 12 to 56 channels in batches of 14 x 10 1.19. In channels_last 44 of 97
took 0.25 to 1.08, a median of 0.66.

On one core of a Zen 4 server (AVX-512 in halves) the rule takes it for 88 of 1,084 layers and formats that others
were chosen for before; these took 0.36 to 1.8 of the time, 0.87 as a geometric mean. dcgan/5 takes 62 us with 3 to 6
rows of weights by 64 positions, 71 with 12 by 16; but estimates that prefer 64 positions chose 1.03 times slower tiles
for 107 layers, up to 1.5 for 112 to 8 channels in 4 groups. Rows of sums an odd number of cache lines apart, so that
they do not meet in the same sets of the caches, took 0.94 to 1.0 of the time for seven layers: not worth the code.

Numbers of 16 bits are converted as a panel is copied. In float16, for the six of eight layers that are estimated to
gain (dcgan/5, fsrcnn/x3, 96 to 24, 128 to 3, 256 to 4 and 512 to 1), it took 0.26 to 0.97 of the time on the Emerald
Rapids, in channels_last 0.32 to 1.02; in bfloat16 by the same multiply-adds 0.32 to 0.89. On a Zen 3 none was measured.

What limits it on the Zen 3:

- Products. Of 320 to 8 channels 88 % of the samples (``perf``) are in a loop of 12 multiply-adds, 8 loads and nothing
  else, 7 % in copies, 5 % in gathering. It ran at what the core did at all in that hour.
- Copies. A panel reads a cache line or two of each channel, each in a page of its own: of 512 to 1 channel on 32 x 32
  half of the time. Asked for while the panel before is worked on, that layer took 0.88 of the time, 128 to 3 channels
  on 128 x 128 0.95, dcgan/5 0.97, others 1.0 to 1.03. Not at the start of a line, a panel's vectors lie across two:
  384 to 8 channels took 1.12 of the time.
- Parts. Of two or three LLVM makes one body, with sums of all in registers that it has not: 96 to 48 channels took 1.4
  of the time, until loads had to wait for a part's end (`convt_tvm.lower_products.take_turn`).
- Sums over channels that the second cache does not hold, for many output channels on large images. A batch's images go
  one after the other, so that those of one are there at a time: 20 to 96 channels on 28 x 28 took half of the time.
- Where outputs are gathered, with AVX-512: for each vector 0.7 cycles, and for each output 0.75.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tvm.s_tir import Schedule

from convt_tvm.compute import IN_VECTORS, SUMS, spec_of, target_of
from convt_tvm.compute_taps import PANEL, PART, PRODUCT, tap_layout_of
from convt_tvm.cost import (
    NARROW,
    NOT_HIDDEN,
    PAIRED,
    Tile,
    band_cycles,
    core_of,
    image_bytes,
    is_for_memory,
    lane_counts,
)
from convt_tvm.layout import MANY_IMAGES, Band, Layout, bands, reached_bands, reaches
from convt_tvm.schedule import batch_is_known, join_images, parallelize
from convt_tvm.schedules import llvm_columns
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.tap_layout import TapLayout, summed_channels
from convt_tvm.target import Target

LoopRV = Any
SBlockRV = Any

NAME = "llvm_taps"
TARGET_KIND = "llvm"

MAX_VECTORS = 4
MAX_ROWS = 14
MAX_GATHERED = 4
"""Vectors of columns whose sums over taps are in registers together, in all phases."""
MIN_SQUARE = 4
"""Channels that a panel's squares have at least, if it is transposed from channels_last."""
MAX_BLOCK = 8
"""Vectors whose sums over taps are in registers together in channels_last, of several output channels."""
MAX_CACHES, CHANNELS_FOR_CACHE = 8, 8
"""How many times the second cache the sums over channels of one image may take; or once for so many channels each.

To sum many channels takes longer than to store what comes of it. On a Zen 3 core, by turns with the best of the others,
sums of 4.6 to 8 MB of 96 to 512 channels took 0.78 to 1.07 of the time, a median of 0.92 (384 to 128 in 4 groups 0.81);
of 32 to 80 channels 4.6 to 10 MB took 1.1 to 2.5, which the estimate does not tell from those.
"""
MIN_SHARED_ROWS, SHARED_TASKS = 256, 8
"""Rows of the weights that a task has at least, and tasks up to which they are shared out where panels are few: each
copies its panel. 1,024 to 256 channels on 8 x 8, one panel, took 0.49 of the time on two threads of an Emerald Rapids
server, 1.1 on one."""
UNSHARED = 1.05
"""How many times the estimate tiles take that leave fewer tasks than half as many, beside others of the layer."""
NEAR_BYTES = 4 << 20
"""Images from this size on come to a panel from memory (`Costs.far_input`)."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What is paid besides products, in cycles.

    Attributes
    ----------
    input, far_input
        For each value copied, or transposed from channels_last; and besides, for one of an image of `NEAR_BYTES`.
    panel
        For each panel.
    sum, far_sum, held
        For each vector of sums over channels, or a part of them, that is stored; and for each of these sums that leaves
        the second cache: none where those of one image take less of it than the first share in `held`, from the second
        on all.
    not_hidden
        The share that counts of the shorter of two: of products and of waiting for weights from beyond that cache,
        which nothing asks for ahead.
    tap, row
        For each vector that is gathered, and for each tile of columns it is gathered in.
    output
        For each output.
    """

    input: Mapping[str, float]
    far_input: float
    panel: float
    sum: float
    far_sum: float
    held: tuple[float, float]
    not_hidden: float
    tap: float
    row: float
    output: float


NARROW_COSTS = Costs(
    input={"nchw": 0.35, "nhwc": 1.0},
    far_input=2.5,
    panel=70.0,
    sum=0.5,
    far_sum=0.45,
    held=(0.5, 0.5),
    not_hidden=NOT_HIDDEN,
    tap=0.3,
    row=24.0,
    output=0.1,
)
"""A fit to 156 tiles of 85 layers on a Zen 3 core, in the middle 11 % off."""
WIDE_COSTS = Costs(
    input={"nchw": 0.0, "nhwc": 0.1},
    far_input=0.0,
    panel=0.0,
    sum=0.6,
    far_sum=0.7,
    held=(0.3, 0.8),
    not_hidden=0.6,
    tap=0.7,
    row=1.3,
    output=0.75,
)
"""A fit to 346 tiles of 173 layers on an Emerald Rapids core, in the middle 14 % off, and to 97 in channels_last."""
PAIRED_COSTS = replace(WIDE_COSTS, far_input=1.0, sum=1.2, row=12.0, output=1.0)
"""A fit to 214 tiles on a Zen 4 core, and to 101 layers by turns with the best of the other schedules."""


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Specs that have any product, and outputs for the caches; in channels_last of channels that fill squares."""
    fills = spec.input_axes == "nchw" or spec.ci // spec.groups % MIN_SQUARE == 0
    return fills and bool(reached_bands(spec)) and not is_for_memory(spec)


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts whose accumulators fit the registers, each with its estimated cycles."""
    if not target.loads_some:
        return
    if not holds_sums(spec, target):
        return
    channels, gathered, narrow = gathering_tile(spec, target)
    places, itemsize = spec.ih * spec.iw, DTYPE_BYTES[spec.accumulator_dtype]
    lanes, rows = target.vector_bytes // itemsize, spec.co // spec.groups * prod(spec.kernel_size)
    for vectors in range(1, min(MAX_VECTORS, -(-places // lanes)) + 1):
        for weight_rows in range(1, min(MAX_ROWS, rows) + 1):
            tile = Tile(vectors, weight_rows, lanes * itemsize, in_order=True)
            if tile.fits(target):
                layout = TapLayout(
                    "ow", channels, 1, gathered, narrow, 1, weight_rows=weight_rows, positions=vectors * lanes
                )
                cycles = _cycles(spec, layout, tile, target)
                is_alone = _panel_tasks(spec, layout) * row_shares(spec, layout) < SHARED_TASKS // 2
                yield layout, cycles * (UNSHARED if is_alone and rows >= 2 * MIN_SHARED_ROWS else 1.0)


def holds_sums(spec: ConvTranspose2dSpec, target: Target) -> bool:
    """Whether the sums over channels of an image are few enough to keep."""
    rows = spec.co // spec.groups * prod(spec.kernel_size)
    caches = max(MAX_CACHES, spec.ci // spec.groups / CHANNELS_FOR_CACHE)
    size = spec.groups * rows * spec.ih * spec.iw * DTYPE_BYTES[spec.accumulator_dtype]
    return size <= caches * target.cache_bytes


def gathering_tile(spec: ConvTranspose2dSpec, target: Target) -> tuple[int, int, int]:
    """Channels, columns and lanes of the sums over taps that are in registers together."""
    counts, width, phases = lane_counts(spec, target), spec.axes[1].widest, len(spec.axes[1].phases)
    lanes = min((count for count in counts if count >= width), default=counts[0])
    channels = _block(spec, MAX_BLOCK // phases) if spec.output_axes == "nhwc" else 1
    return channels, lanes if channels > 1 else max(1, min(MAX_GATHERED // phases, -(-width // lanes))) * lanes, lanes


def _panel_tasks(spec: ConvTranspose2dSpec, layout: TapLayout) -> int:
    """How many panels threads share at a time: those of an image, or of all where these are many."""
    images = spec.input_shape[0] if spec.input_shape[0] >= MANY_IMAGES else 1
    return images * spec.groups * layout.panels(spec)


def row_shares(spec: ConvTranspose2dSpec, layout: TapLayout) -> int:
    """In how many parts the rows of the weights are, a power of two, for threads to share those of a panel."""
    most = max(1, min(SHARED_TASKS // _panel_tasks(spec, layout), layout.matrix_rows(spec) // MIN_SHARED_ROWS))
    return max(count for count in (1, 2, 4, 8) if count <= most and layout.row_tiles(spec) % count == 0)


def _block(spec: ConvTranspose2dSpec, limit: int) -> int:
    """The most output channels of a group, at most `limit`, that divide them."""
    channels = spec.co // spec.groups
    return max((size for size in range(1, min(limit, channels) + 1) if channels % size == 0), default=1)


def _cycles(spec: ConvTranspose2dSpec, layout: TapLayout, tile: Tile, target: Target) -> float:
    """Estimated cycles of one core: sums over channels and over taps, and what is copied and stored for them."""
    core = core_of(target)
    costs = NARROW_COSTS if core is NARROW else PAIRED_COSTS if core is PAIRED else WIDE_COSTS
    groups, channels = spec.input_shape[0] * spec.groups, spec.ci // spec.groups
    step, stored = tile.step_cycles(target, 1, 1 << 10, 1.0), tile.vectors * tile.broadcasts
    of_tile = channels * step + channels // summed_channels(spec) * stored * costs.sum
    tiles = groups * layout.panels(spec)
    places = layout.matrix_rows(spec) * layout.positions
    far = far_share(spec, layout, target, costs)
    of_panel = layout.row_tiles(spec) * of_tile + places * far * costs.far_sum + costs.panel
    sums, waits = tiles * of_panel, _weight_cycles(spec, layout, target)
    copied = costs.input[spec.input_axes] + (costs.far_input if image_bytes(spec) >= NEAR_BYTES else 0.0)
    return core.taps * (
        max(sums, waits)
        + costs.not_hidden * min(sums, waits)
        + prod(spec.input_shape) * (copied * row_shares(spec, layout) + DTYPE_BYTES[spec.dtype] / core.reads.first)
        + gathering_cycles(spec, layout, target, costs)
    )


def gathering_cycles(spec: ConvTranspose2dSpec, layout: TapLayout, target: Target, costs: Costs) -> float:
    """Estimated cycles in which sums over channels become those over taps, and are stored."""
    reached = reached_bands(spec)
    taps = sum(band.row_steps(layout, spec.ih) for band in reached) * spec.axes[1].all_taps
    rows = sum(len(band.phases) * band.rows for band in reached)
    vectors, columns = (layout.columns(spec) // size for size in (layout.vector_lanes, layout.column_block))
    of_channel = taps * vectors * costs.tap + rows * columns * costs.row
    moved = core_of(target).moved + llvm_columns.CYCLES_PER_PLACE / layout.co_block
    written = costs.output if spec.output_axes == "nchw" else moved
    groups = spec.input_shape[0] * spec.groups
    return groups * layout.blocks(spec) * of_channel + prod(spec.output_shape) * written


def far_share(spec: ConvTranspose2dSpec, layout: TapLayout, target: Target, costs: Costs) -> float:
    """What part of the sums over channels leaves the second cache."""
    places = layout.matrix_rows(spec) * layout.positions * spec.groups * layout.panels(spec)
    return _share_beyond(places * DTYPE_BYTES[spec.accumulator_dtype] / target.cache_bytes, *costs.held)


def _share_beyond(share: float, none: float, all_of_them: float) -> float:
    """What part of `share` of a cache leaves it, where up to `none` nothing does, and more than `all_of_them` all."""
    if share <= none:
        return 0.0
    return 1.0 if share >= all_of_them else (share - none) / (all_of_them - none)


def _weight_cycles(spec: ConvTranspose2dSpec, layout: TapLayout, target: Target) -> float:
    """Cycles in which weights come from beyond the second cache: for each panel, if it does not hold them."""
    core, weights = core_of(target), prod(layout.packed_shape(spec)) * DTYPE_BYTES[spec.accumulator_dtype]
    if weights <= target.held_weight_bytes:
        return weights / core.reads.first
    times = spec.input_shape[0] * layout.panels(spec)
    return times * weights / core.reread(weights)


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    function = sch.mod["main"]
    spec, layout, target = spec_of(function), tap_layout_of(function), target_of(function)
    lanes = target.vector_bytes // DTYPE_BYTES[spec.accumulator_dtype]
    apart = not batch_is_known(sch) or spec.input_shape[0] >= MANY_IMAGES
    cycles = band_cycles(spec, target) / spec.input_shape[0]
    product = sch.get_sblock(PRODUCT)
    n, g, m, f, *parts = sch.get_loops(product)
    tile, row = sch.split(m, [None, layout.weight_rows])
    panel, of_tile = sch.split(f, [None, layout.positions])
    vector, lane = sch.split(of_tile, [None, lanes])
    share, tile = sch.split(tile, [row_shares(spec, layout), None])
    sch.reorder(n, g, panel, share, tile, *parts, row, vector, lane)
    task = parallelize(sch, (n, g, panel, share)[not apart :], cycles, apart=apart)
    around = parts[0] if parts else tile
    part, copied = sch.get_sblock(PART), sch.get_sblock(PANEL)
    sch.set_scope(part, 0, "local")
    sch.compute_at(part, around, preserve_unit_loops=True)
    sch.compute_at(copied, task, preserve_unit_loops=True)
    _unroll(sch, (row, vector), lane)
    _copy_panel(sch, spec, lanes, copied)
    _sum_channels(sch, lanes, part)
    for band in bands(spec):
        gather(sch, spec, layout, band, cycles, apart=apart)
    if parts:
        *_, row, vector, lane = sch.get_loops(sch.decompose_reduction(product, around))
        _unroll(sch, (row, vector), lane)
    join_images(sch, spec, product, shared=apart)


def _unroll(sch: Schedule, loops: Sequence[LoopRV], lane: LoopRV) -> None:
    """Unroll `loops` around vectors."""
    sch.vectorize(lane)
    for loop in loops:
        sch.unroll(loop)


def _copy_panel(sch: Schedule, spec: ConvTranspose2dSpec, lanes: int, panel: SBlockRV) -> None:
    """Copy what a task reads of the image, so that its channels are side by side in memory."""
    *_, channel, position = sch.get_loops(panel)
    if spec.input_axes == "nhwc":
        sch.annotate(channel, IN_VECTORS, True)
        return
    vector, lane = sch.split(position, [None, lanes])
    _unroll(sch, (vector,), lane)


def _sum_channels(sch: Schedule, lanes: int, part: SBlockRV) -> None:
    """Sum some channels for a tile of rows and positions in registers."""
    row, position, _, ic = sch.get_loops(part)[-4:]
    vector, lane = sch.split(position, [None, lanes])
    sch.reorder(ic, row, vector, lane)
    _unroll(sch, (row, vector), lane)
    *_, row, vector, lane = sch.get_loops(sch.decompose_reduction(part, ic))
    _unroll(sch, (row, vector), lane)


def gather(
    sch: Schedule, spec: ConvTranspose2dSpec, layout: TapLayout, band: Band, cycles: float, *, apart: bool
) -> None:
    """Sum the taps of each output of `band`, a row of one channel after the other."""
    output = sch.get_sblock(f"band{band.index}")
    n, g, b, ob, ph, qh, qw, pw = sch.get_loops(output)
    column_block, column = sch.split(qw, [None, layout.column_block])
    moved = reaches(spec, band) and llvm_columns.in_vectors(spec, layout)
    by_places = moved and spec.output_axes == "nhwc"
    sch.reorder(n, g, b, ph, qh, column_block, *((ob, pw, column) if by_places else (ob, column, pw)))
    if moved:
        sch.annotate(ob if by_places else column, IN_VECTORS, True)
    parallelize(sch, (n, g, b, ph, qh)[not apart :], cycles, apart=apart)
    if not reaches(spec, band):
        return
    acc = sch.get_sblock(f"{SUMS}{band.index}")
    sch.compute_at(acc, column_block, preserve_unit_loops=True)
    ob, phase, column, th, tw = sch.get_loops(acc)[-5:]
    vector, lane = sch.split(column, [None, layout.vector_lanes])
    sch.reorder(th, tw, ob, phase, vector, lane)
    unrolled = (tw, ob, phase, vector) if layout.unrolls_phases(spec) else (ob, vector)
    _unroll(sch, unrolled, lane)
    *_, ob, phase, vector, lane = sch.get_loops(sch.decompose_reduction(acc, th))
    _unroll(sch, (ob, phase, vector), lane)
