"""CPU: vector lanes along output columns. For few channels, depthwise and grouped layers, and large images.

One vector of input columns meets one weight, broadcast. For each output row of a band and each block of channels the
loop nest goes from

    for n, g, b, ph, qh, ob, pw, qw, th, ic, tw:      acc += window * packed
    for n, g, b, ob, ph, qh, qw, pw:                  band = acc + bias

to

    for n*g*b*ph*qh:                          parallel
      for qw / column_block:
        for pw / phases:                      unrolled
          for th, ic:
            for tw:                           unrolled
              for ob:                         unrolled     } co_block * phases * column_block/lanes
                for pw % phases:              unrolled     } accumulators in registers
                  for qw / lanes:             unrolled     }
                    for qw % lanes:           vectorized
        for ob, qw, pw:                       the output, channel by channel

With few channels the column phases are worked on together, so that enough sums are under way to hide the latency of an
addition.
"""

from collections.abc import Iterator

from tvm.s_tir import Schedule

from convt_tvm.compute import layout_of, spec_of, target_of
from convt_tvm.cost import (
    Costs,
    Tile,
    band_cycles,
    block_sizes,
    blocks_outermost,
    core_cycles,
    lane_counts,
    phase_block,
)
from convt_tvm.layout import Layout, bands, reaches
from convt_tvm.schedule import (
    accumulate_in_registers,
    copy_window,
    find_window,
    parallelize,
    spread_window,
)
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

NAME = "llvm_columns"
TARGET_KIND = "llvm"

MAX_VECTORS = 4
MAX_CHANNELS = 14
COSTS = Costs(cycles_per_input=0.5, cycles_per_output=1.0)


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Every spec."""
    return True


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts whose accumulators fit the registers, each with its estimated cycles."""
    channels = spec.co // spec.groups
    widest = max(phase.count for phase in spec.axes[1].phases)
    for lanes in lane_counts(spec, target):
        for vectors in range(1, min(MAX_VECTORS, -(-widest // lanes)) + 1):
            for co_block in block_sizes(channels, MAX_CHANNELS):
                tile = Tile(vectors, co_block)
                if tile.fits(target):
                    layout = Layout("ow", co_block, 1, vectors * lanes, lanes)
                    phases = phase_block(spec, target, tile)
                    reuse = phases * max(1, *(phase.taps for phase in spec.axes[1].phases))
                    yield layout, core_cycles(spec, layout, tile, target, phases=phases, reuse=reuse, costs=COSTS)


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    function = sch.mod["main"]
    spec, layout, target = spec_of(function), layout_of(function), target_of(function)
    tile = Tile(layout.column_block // layout.vector_lanes, layout.co_block)
    phases = phase_block(spec, target, tile)
    window = find_window(sch)
    # With one tap per row phase a row of the window serves one row of each phase: it is copied where it is used.
    reached = [band for band in bands(spec) if reaches(spec, band)]
    by_row = window is not None and len(reached) == 1 and reached[0].reads_one_row and spec.groups == 1
    if window is not None and not by_row:
        copy_window(sch, spec, window)
    for band in bands(spec):
        output = sch.get_sblock(f"band{band.index}")
        n, g, b, ob, ph, qh, qw, pw = sch.get_loops(output)
        column_block, column = sch.split(qw, [None, layout.column_block])
        if by_row and band in reached:
            order, shared = (n, g, qh, ph, b), 3
        else:
            order, shared = ((n, g, b, ph, qh) if blocks_outermost(spec, layout) else (n, g, ph, qh, b)), 5
        sch.reorder(*order, column_block, ob, column, pw)
        parallelize(sch, order[:shared], band_cycles(spec))
        if reaches(spec, band):
            acc = sch.get_sblock(f"acc{band.index}")
            sch.compute_at(acc, column_block, preserve_unit_loops=True)
            ob, pw, qw, th, ic, tw = sch.get_loops(acc)[-6:]
            phase_loop, phase = sch.split(pw, [None, phases])
            vector, lane = sch.split(qw, [None, layout.vector_lanes])
            sch.reorder(phase_loop, th, ic, tw, ob, phase, vector, lane)
            accumulate_in_registers(
                sch, acc, phases=phase_loop, reduction=th, tap=tw, tile=(ob, phase, vector), lane=lane
            )
    if by_row:
        sch.compute_at(window, sch.get_loops(sch.get_sblock(f"band{reached[0].index}"))[0], preserve_unit_loops=True)
        spread_window(sch, spec, window)
