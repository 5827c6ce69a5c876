"""CPU: channels summed before taps in the tile unit (AMX). For bfloat16 with few output channels on small images.

What `llvm_taps` is for numbers that vectors multiply. A tile has 16 rows, and an instruction takes as long for one of
them: of three output channels `llvm_amx` uses three, where here a row is an output channel and tap, and 3 channels with
4 x 4 taps fill three tiles. The loop nest goes to

    for n:                                            parallel, where there are many images
      for g*(f / positions)*(shares of m):            parallel otherwise; the unit is configured, released at the end
        for ic/2, f % positions, 2:                   the panel, in pairs of channels
        for m / weight_rows of a share:
          for ks:                                     one step of input channels
            for m % weight_rows, f % positions:       2 x 2 tile products, or 1 x 4, or 3 x 1
          for m % weight_rows, f % positions:         sums to memory
      for g*b*ph*qh:                                  as in `llvm_taps`

What it brings, in milliseconds on one core of an Emerald Rapids server, NCHW, weights packed (by turns in one process,
median of 5 to 9 rounds, answers checked, other work on the same machine):

    ===========================================  =======  ==========  =========
    layer                                        this     the others  float32
    ===========================================  =======  ==========  =========
    dcgan/5, 64 to 3 on 32 x 32                  0.021    0.050       0.050
    fsrcnn/x3, 56 to 1, 9 x 9 taps               0.136    0.286       0.310
    256 to 3 on 16 x 16, 5 x 5 taps              0.044    0.078       -
    256 to 128 on 512 x 1, 16 taps, stride 8     1.02     3.39        -
    64 images, 64 to 1 on 14 x 14, 5 x 5 taps    0.16     0.43        -
    8 images, 192 to 12 on 8 x 8, 4 x 4 taps     0.065    0.141       -
    ===========================================  =======  ==========  =========

Of 62 layers that were timed so in bfloat16, 18 of them in channels_last, the cost rule takes it for 22; with it these
62 took 0.84 of the time (geometric mean), the worst 1.47 (dcgan/2 in channels_last, whose weights are all of its time).

What limits it:

- Sums over channels. Each goes to the second cache and back: of fsrcnn/x3 two thirds of the samples (``perf``) are
  where tiles wait for those before to be stored, a tenth in copies, an eighth in gathering.
- Configuring the unit, which waits for everything before: for each panel of fsrcnn/x3 it was a tenth of the time.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from tvm.s_tir import Schedule

from convt_tvm.compute import IN_VECTORS, spec_of, target_of
from convt_tvm.compute_taps import PANEL, PRODUCT
from convt_tvm.compute_tile_taps import tile_tap_layout_of
from convt_tvm.compute_tiles import IN_TILES
from convt_tvm.cost import MISS_BYTES_PER_CYCLE, band_cycles
from convt_tvm.layout import MANY_IMAGES, Layout, bands
from convt_tvm.schedule import batch_is_known, join_images, parallelize
from convt_tvm.schedules import llvm_amx, llvm_taps
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tile_layout import REGISTERS, TILE_POSITIONS, TILE_ROWS
from convt_tvm.tile_tap_layout import TileTapLayout

NAME = "llvm_amx_taps"
TARGET_KIND = "llvm"

MAX_ROW_TILES = 3
MAX_POSITION_TILES = 4
MIN_TASKS = 8
"""Tasks for threads to share that the panels of an image make at least, unless there are fewer."""
CYCLES_PER_TILE = 12
"""For reading a tile, of weights or of a panel."""
CYCLES_PER_SUMS = 70
"""For each tile of sums: set to zero, and stored."""
COSTS = replace(llvm_taps.WIDE_COSTS, far_sum=7.0, tap=2.3, row=5.0, output=1.0)
"""What is paid besides products, which are too few to hide it."""
CYCLES_PER_INPUT = {"nchw": 0.1, "nhwc": 0.3}
"""For each value that is copied to a panel."""


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Specs in bfloat16 of those `llvm_taps` is for."""
    return spec.dtype == "bfloat16" and llvm_taps.applies(spec)


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts whose sums fit the tile registers, each with its estimated cycles."""
    if "amx-bf16" not in target.features or not llvm_taps.holds_sums(spec, target):
        return
    channels, gathered, lanes = llvm_taps.gathering_tile(spec, target)
    places, rows = spec.ih * spec.iw, spec.co // spec.groups * prod(spec.kernel_size)
    for count in range(1, min(MAX_POSITION_TILES, -(-places // TILE_POSITIONS)) + 1):
        for tiles in range(1, min(MAX_ROW_TILES, -(-rows // TILE_ROWS)) + 1):
            block = -(-rows // -(-rows // (tiles * TILE_ROWS)))
            if tiles * (count + 1) + min(2, count) > REGISTERS or -(-block // TILE_ROWS) < tiles:
                continue
            layout = TileTapLayout(
                lanes="ow",
                co_block=channels,
                row_block=1,
                column_block=gathered,
                vector_lanes=lanes,
                row_chunk=1,
                weight_rows=-(-block // tiles) * tiles,
                positions=count * TILE_POSITIONS,
            )
            yield layout, _cycles(spec, layout, target)


def _cycles(spec: ConvTranspose2dSpec, layout: TileTapLayout, target: Target) -> float:
    """Estimated cycles of one core: products, panels, sums stored and gathered, weights read."""
    tiles = layout.tiles
    registers = tiles.channel_tiles * tiles.position_tiles
    products = registers * llvm_amx.CYCLES_PER_PRODUCT
    reads = (tiles.channel_tiles + tiles.position_tiles) * CYCLES_PER_TILE
    of_tile = tiles.steps(spec) * max(products, reads) + registers * CYCLES_PER_SUMS
    panels = spec.input_shape[0] * spec.groups * layout.panels(spec)
    far = llvm_taps.far_share(spec, layout, target, COSTS) * COSTS.far_sum
    of_panel = layout.row_tiles(spec) * (of_tile + layout.weight_rows * layout.positions * far / TILE_POSITIONS)
    shares = llvm_taps.row_shares(spec, layout)
    weight_bytes = prod(layout.packed_shape(spec)) * DTYPE_BYTES[spec.dtype]
    if weight_bytes > target.cache_bytes // 2:
        weight_bytes *= spec.input_shape[0] * layout.panels(spec)
    cycles: float = (
        panels * (of_panel + shares * llvm_amx.CYCLES_PER_TASK)
        + weight_bytes / MISS_BYTES_PER_CYCLE
        + prod(spec.input_shape) * CYCLES_PER_INPUT[spec.input_axes] * shares
        + llvm_taps.gathering_cycles(spec, layout, target, COSTS)
    )
    return cycles


def _panels_of_task(spec: ConvTranspose2dSpec, layout: TileTapLayout) -> int:
    """Panels for which the unit is configured once, which waits for all before: as many as leave `MIN_TASKS`."""
    panels = layout.panels(spec)
    return max(
        size for size in range(1, panels + 1) if panels % size == 0 and (size == 1 or panels // size >= MIN_TASKS)
    )


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    function = sch.mod["main"]
    spec, layout, target = spec_of(function), tile_tap_layout_of(function), target_of(function)
    apart = not batch_is_known(sch) or spec.input_shape[0] >= MANY_IMAGES
    cycles = band_cycles(spec, target) / spec.input_shape[0]
    product, copied = sch.get_sblock(PRODUCT), sch.get_sblock(PANEL)
    n, g, m, f, ks, kp, j = sch.get_loops(product)
    tile, row = sch.split(m, [None, layout.weight_rows])
    panel, position = sch.split(f, [None, layout.positions])
    panels, panel = sch.split(panel, [None, _panels_of_task(spec, layout)])
    share, tile = sch.split(tile, [llvm_taps.row_shares(spec, layout), None])
    sch.reorder(n, g, panels, share, panel, tile, ks, row, position, kp, j)
    task = parallelize(sch, (n, g, panels, share)[not apart :], cycles, apart=apart)
    sch.annotate(task, IN_TILES, "configure")
    stored = sch.cache_write(product, 0, "local")
    sch.reverse_compute_at(stored, tile, preserve_unit_loops=True)
    sch.compute_at(copied, panel, preserve_unit_loops=True)
    pair, *_ = sch.get_loops(copied)[-3:]
    sch.annotate(pair, IN_VECTORS, True)
    for band in bands(spec):
        llvm_taps.gather(sch, spec, layout, band, cycles, apart=apart)
    zeroed = sch.decompose_reduction(product, ks)
    outermost = {"zero": sch.get_loops(zeroed)[-2], "multiply": row, "store": sch.get_loops(stored)[-2]}
    for kind, loop in outermost.items():
        sch.annotate(loop, IN_TILES, kind)
    join_images(sch, spec, product, shared=apart)
