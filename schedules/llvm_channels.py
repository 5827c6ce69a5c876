"""CPU: vector lanes along output channels. For many channels and small images.

One vector of packed weights meets one input value, broadcast. For each output row of a band and each block of
channels the loop nest goes from

    for n, g, b, ph, qh, pw, qw, ob, th, ic, tw:      acc += window * packed
    for n, g, b, ob, ph, qh, qw, pw:                  band = acc + bias

to

    for n*g*b*ph*qh:                          parallel
      for qw / column_block:
        for pw:                               unrolled
          for th:
            for tw:                           unrolled
              for ic:
                for qw % column_block:        unrolled     } column_block * co_block/lanes
                  for ob / lanes:             unrolled     } accumulators in registers
                      for ob % lanes:         vectorized
        for ob, qw % column_block, pw:        the output, channel by channel

The blocks of a row's weights, ``taps * ci/groups * kw * co_block`` values, are read once for each row and should fit
the second cache. The output's channels are far apart, so its elements are stored one by one.
"""

from collections.abc import Iterator

from tvm.s_tir import Schedule

from convt_tvm.compute import Layout, bands, layout_of, spec_of
from convt_tvm.cost import Tile, block_sizes, blocks_outermost, core_cycles, lane_counts
from convt_tvm.schedule import accumulate_in_registers, parallelize, parallelize_window, reaches
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

NAME = "llvm_channels"
TARGET_KIND = "llvm"

MAX_VECTORS = 4
MAX_COLUMNS = 28
CYCLES_PER_INPUT = 1.5
CYCLES_PER_OUTPUT = 1.5


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Every spec."""
    return True


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts whose accumulators fit the registers, each with its estimated cycles."""
    channels = spec.co // spec.groups
    widest = max(phase.count for phase in spec.axes[1].phases)
    for lanes in lane_counts(spec, target):
        for vectors in range(1, min(MAX_VECTORS, -(-channels // lanes)) + 1):
            for columns in block_sizes(widest, MAX_COLUMNS):
                tile = Tile(vectors, columns)
                if tile.fits(target):
                    layout = Layout("co", vectors * lanes, columns, lanes)
                    yield (
                        layout,
                        core_cycles(
                            spec,
                            layout,
                            tile,
                            phases=1,
                            cycles_per_input=CYCLES_PER_INPUT,
                            cycles_per_output=CYCLES_PER_OUTPUT,
                        ),
                    )


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    function = sch.mod["main"]
    spec, layout = spec_of(function), layout_of(function)
    for band in bands(spec):
        output = sch.get_sblock(f"band{band.index}")
        n, g, b, ob, ph, qh, qw, pw = sch.get_loops(output)
        column_block, column = sch.split(qw, [None, layout.column_block])
        tasks = (n, g, b, ph, qh) if blocks_outermost(spec, layout) else (n, g, ph, qh, b)
        sch.reorder(*tasks, column_block, ob, column, pw)
        parallelize(sch, spec, tasks)
        if reaches(spec, band):
            acc = sch.get_sblock(f"acc{band.index}")
            sch.compute_at(acc, column_block, preserve_unit_loops=True)
            pw, qw, ob, th, ic, tw = sch.get_loops(acc)[-6:]
            vector, lane = sch.split(ob, [None, layout.vector_lanes])
            sch.reorder(pw, th, tw, ic, qw, vector, lane)
            accumulate_in_registers(sch, acc, phases=pw, reduction=th, tap=tw, tile=(qw, vector), lane=lane)
    parallelize_window(sch, spec)
