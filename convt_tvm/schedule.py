"""Steps that the CPU schedule spaces share."""

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm.s_tir import Schedule

from convt_tvm.compute import SKIPS_ROWS, layout_of, spec_of
from convt_tvm.layout import CACHE_LINE_BYTES, collides
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

__all__ = [
    "accumulate_in_memory",
    "accumulate_in_registers",
    "copy_window",
    "find_window",
    "parallelize",
    "share_pack",
    "skip_rows",
    "spread_window",
]

LoopRV = Any
SBlockRV = Any

POSITION_STREAMS = 8
"""Positions read side by side, one channel after the other, for which the 8 to 12 ways of one cache set are too few."""
PARALLEL_CYCLES = 250_000
"""Cycles of one core below which it does a loop alone: another, if it sleeps, takes 20 to 60 us to begin.

On a two-core Emerald Rapids dcgan/5 took 57 us on one thread and 83 on two, dcgan/1 214 and 97.
"""


def accumulate_in_registers(
    sch: Schedule,
    acc: SBlockRV,
    *,
    phases: LoopRV,
    reduction: LoopRV,
    tap: LoopRV,
    tile: Sequence[LoopRV],
    lane: LoopRV,
) -> None:
    """Keep the sums of `acc` inside the loop `phases` in registers, and write them out once.

    The loops of `acc` are, from the outside: ``phases``, ``reduction`` (the outermost reduction loop), others,
    ``tap``, those of ``tile``, ``lane``. A cache stage in local memory whose indices are all constant becomes
    registers in LLVM.
    """
    local = sch.cache_write(acc, 0, "local")
    sch.reverse_compute_at(local, phases, preserve_unit_loops=True)
    *copies, inner = sch.get_loops(local)[-4:]
    vector, copy_lane = sch.split(inner, [None, layout_of(sch.mod["main"]).vector_lanes])
    sch.vectorize(copy_lane)
    for loop in (*copies, vector):
        sch.unroll(loop)
    _unroll(sch, phases, tap, tile, lane)

    *init_loops, init_lane = sch.get_loops(sch.decompose_reduction(acc, reduction))
    sch.vectorize(init_lane)
    for loop in init_loops[-len(tile) :]:
        sch.unroll(loop)


def accumulate_in_memory(
    sch: Schedule,
    acc: SBlockRV,
    *,
    phases: LoopRV,
    reduction: LoopRV,
    tap: LoopRV,
    tile: Sequence[LoopRV],
    lane: LoopRV,
) -> None:
    """Add to the sums of `acc` in memory; LLVM keeps those of a tile in registers for the innermost reduction.

    The loops are, from the outside: ``phases``, ``reduction``, others, ``tap``, those of all tiles, a reduction, those
    of ``tile``, ``lane``.
    """
    _unroll(sch, phases, tap, tile, lane)
    sch.vectorize(sch.get_loops(sch.decompose_reduction(acc, reduction))[-1])


def _unroll(sch: Schedule, phases: LoopRV, tap: LoopRV, tile: Sequence[LoopRV], lane: LoopRV) -> None:
    """Make one straight run of multiply-adds of a tile and a tap, and of all phases while it stays short enough."""
    sch.vectorize(lane)
    for loop in (tap, *tile):
        sch.unroll(loop)
    function = sch.mod["main"]
    if layout_of(function).unrolls_phases(spec_of(function)):
        sch.unroll(phases)


def skip_rows(sch: Schedule, loops: Sequence[LoopRV]) -> None:
    """Leave out the outermost of `loops`, and all in it, where it reads rows of the border only.

    A loop of one iteration is no candidate: it is simplified away, and its annotation with it.
    """
    sch.annotate(next(loop for loop in loops if int(sch.get(loop).extent) > 1), SKIPS_ROWS, True)


def parallelize(sch: Schedule, loops: Sequence[LoopRV], cycles: float) -> LoopRV:
    """Share the iterations of adjacent `loops`, fused, among threads if their `cycles` are enough for that to pay."""
    fused = sch.fuse(*loops)
    if cycles >= PARALLEL_CYCLES:
        sch.parallel(fused)
    return fused


def share_pack(sch: Schedule) -> None:
    """Schedule a packing in place: parallel over channel blocks and kernel rows."""
    block, kh, *_ = sch.get_loops(sch.get_sblock("ordered"))
    sch.parallel(sch.fuse(block, kh))


def find_window(sch: Schedule) -> SBlockRV | None:
    """The block that copies the input's window, or None where the input itself is read."""
    names = [sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))]
    return sch.get_sblock("window") if "window" in names else None


def copy_window(sch: Schedule, spec: ConvTranspose2dSpec, window: SBlockRV) -> None:
    """Copy the whole window before anything else, at about a cycle for each value.

    Turning NCHW to NHWC goes by 16 channels at a time, so that the cache lines read stay in the cache until they are
    used up, and those written are written once.
    """
    spread_window(sch, spec, window)
    first, second, third, fourth = sch.get_loops(window)
    if layout_of(sch.mod["main"]).lanes == "co":
        factor = max(size for size in (16, 8, 4, 2, 1) if spec.ci % size == 0)
        outer, inner = sch.split(fourth, [None, factor])
        sch.reorder(outer, third, inner)
        sch.vectorize(inner)
    parallelize(sch, (first, second), prod(spec.input_shape))


def spread_window(sch: Schedule, spec: ConvTranspose2dSpec, window: SBlockRV) -> None:
    """Lay out the window so that what is read one after the other falls into different sets of the first cache.

    With lanes along columns these are rows of successive channels; with lanes along channels, successive positions.
    Each then is an odd number of cache lines from the next.
    """
    itemsize = DTYPE_BYTES[spec.accumulator_dtype]
    line = CACHE_LINE_BYTES // itemsize
    extents = [int(sch.get(loop).extent) for loop in sch.get_loops(window)[-3:]]
    columns = layout_of(sch.mod["main"]).lanes == "ow"
    stride, count = (extents[1] * extents[2], extents[0]) if columns else (extents[2], POSITION_STREAMS)
    if collides(stride * itemsize, count):
        sch.storage_align(window, 0, axis=1 if columns else 2, factor=2 * line, offset=line)
