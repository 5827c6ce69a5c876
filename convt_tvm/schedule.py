"""Steps that the CPU schedule spaces share."""

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule

from convt_tvm.compute import (
    COLUMN_CHUNKS,
    IMAGES,
    IN_VECTORS,
    PARTIAL,
    SKIPS_ROWS,
    SUMS,
    VECTORS,
    is_known,
    layout_of,
    spec_of,
    target_of,
)
from convt_tvm.layout import (
    CACHE_LINE_BYTES,
    Band,
    bands,
    collides,
    images_apart,
    reaches,
    sums_taps_first,
    window_axes,
)
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

__all__ = [
    "POSITION_STREAMS",
    "accumulate",
    "chunk_columns",
    "copy_window",
    "find_window",
    "find_window_of",
    "image_loop",
    "in_parts",
    "join_images",
    "parallelize",
    "share_pack",
    "sum_loops",
    "works_apart",
]

LoopRV = Any
SBlockRV = Any

TILE_LOOPS, TASK_LOOPS = 4, 4
"""Loops of a declaration's sums that a tile spans, over rows, phases, columns and channels, and of those around them.

The first of these is over images, several of which a tile may span as well."""
REDUCED = 2
"""Of the kinds of a block's variables, that of a reduction."""
POSITION_STREAMS = 8
"""Positions read side by side, one channel after the other, for which the 8 to 12 ways of one cache set are too few."""
FEW_ROWS = 8
"""Rows of an image below which they are too few for threads to share."""
PARALLEL_CYCLES = 60_000
"""Cycles of one core below which it does a loop alone: another takes 5 to 10 us to begin, and 60 if it sleeps.

On two cores of a Zen 4 server dcgan/5 took 62 us on one thread and 46 on two in a loop of calls, 162 and 120 two
milliseconds after the last call, 225 and 285 after half a second; bilinear/depthwise 105 and 69, 200 and 147, 460 and
483. On an Emerald Rapids, whose two CPUs may share a core, dcgan/5 took 57 and 83.
"""


def sum_loops(sch: Schedule, sums: SBlockRV) -> tuple[Sequence[LoopRV], Sequence[LoopRV]]:
    """The innermost loops of ``acc<k>``: those that a tile spans, and those over parts.

    The latter count row taps, column taps and channels; there are none where the sums have one part only.
    """
    loops = sch.get_loops(sums)
    if not _is_reduced(sch, sums):
        return loops[-TILE_LOOPS:], []
    *_, th, ic, tw = loops
    return loops[-TILE_LOOPS - 3 : -3], [th, tw, ic]


def image_loop(sch: Schedule, sums: SBlockRV) -> LoopRV:
    """The loop of ``acc<k>`` over the images of a tile."""
    reduced = 3 if _is_reduced(sch, sums) else 0
    return sch.get_loops(sums)[-TASK_LOOPS - TILE_LOOPS - reduced]


def in_parts(sch: Schedule, band: Band) -> bool:
    """Whether the sums of `band` are sums of partial sums."""
    return reaches(spec_of(sch.mod["main"]), band) and _is_reduced(sch, sch.get_sblock(f"{SUMS}{band.index}"))


def _is_reduced(sch: Schedule, block: SBlockRV) -> bool:
    return bool(sch.get(block).iter_vars[-1].iter_type == REDUCED)


def accumulate(
    sch: Schedule,
    band: Band,
    *,
    phases: LoopRV,
    parts: Sequence[LoopRV],
    tile: Sequence[LoopRV],
    lane: LoopRV,
    skips: bool = True,
    counts_vectors: bool = False,
) -> None:
    """Sum the products of a tile of `band` in registers, part by part, and the parts in memory.

    The loops of ``acc<k>`` end with `phases`, `parts` (those over row taps, column taps and channels, with others
    between them, or none if there is one part), `tile` and `lane`. With `skips`, the loops of ``partial<k>`` over taps
    and channels, in the order of `sums_taps_first`, are left out where they would read the border's rows only. With
    `counts_vectors` the innermost of `tile` is one of `VECTORS`.
    A buffer in local memory whose indices are all constant becomes registers in LLVM.
    """
    function = sch.mod["main"]
    spec, layout = spec_of(function), layout_of(function)
    acc, partial = sch.get_sblock(f"{SUMS}{band.index}"), sch.get_sblock(f"{PARTIAL}{band.index}")
    if layout.unrolls_phases(spec):
        sch.unroll(phases)
    if parts:
        sch.unroll(parts[1])
    sch.set_scope(partial, 0, "local")
    sch.compute_at(partial, parts[-1] if parts else phases, preserve_unit_loops=True)
    image, _, _, _, *rows_and_columns, last, _, _, _, th, ic, tw = sch.get_loops(partial)[
        -TASK_LOOPS - TILE_LOOPS - 6 :
    ]
    vector, partial_lane = sch.split(last, [None, layout.vector_lanes])
    reduction = (th, ic, tw) if sums_taps_first(spec) else (th, tw, ic)
    partial_tile = (*([image] if layout.image_block > 1 else []), *rows_and_columns, vector)
    sch.reorder(*reduction, *partial_tile, partial_lane)
    if skips:
        _skip_rows(sch, (*reduction[1:], *partial_tile, partial_lane))
    sch.vectorize(partial_lane)
    for loop in (tw, *partial_tile):
        sch.unroll(loop)
    vectors = [vector, _start_sums(sch, partial, reduction[0], len(partial_tile))]

    sch.vectorize(lane)
    for loop in tile:
        sch.unroll(loop)
    vectors.append(tile[-1])
    if parts:
        vectors.append(_start_sums(sch, acc, parts[0], len(tile)))
    for loop in vectors if counts_vectors else ():
        sch.annotate(loop, VECTORS, True)


def _start_sums(sch: Schedule, sums: SBlockRV, reduction: LoopRV, tile: int) -> LoopRV:
    """Set `sums` to zero before the loop `reduction`, the `tile` innermost loops but that over lanes unrolled.

    Returns the last of these.
    """
    *loops, lane = sch.get_loops(sch.decompose_reduction(sums, reduction))
    sch.vectorize(lane)
    for loop in loops[-tile:]:
        sch.unroll(loop)
    return loops[-1]


def _skip_rows(sch: Schedule, loops: Sequence[LoopRV]) -> None:
    """Leave out the outermost of `loops`, and all in it, where it reads rows of the border only.

    A loop of one iteration is no candidate: it is simplified away, and its annotation with it.
    """
    sch.annotate(next(loop for loop in loops if int(sch.get(loop).extent) > 1), SKIPS_ROWS, True)


def parallelize(sch: Schedule, loops: Sequence[LoopRV], cycles: float, *, apart: bool = False) -> LoopRV:
    """Share the iterations of adjacent `loops`, fused, among threads if their `cycles` are enough for that to pay.

    The first counts images; where each is worked on `apart` the others alone are fused, and shared only where there may
    be few images; see `join_images`.
    """
    fused = sch.fuse(*loops[apart:])
    if cycles >= PARALLEL_CYCLES and not (apart and batch_is_known(sch)):
        sch.parallel(fused)
    return fused


def chunk_columns(sch: Schedule, band: Band, task: LoopRV, tiles: LoopRV) -> None:
    """Have an iteration of `task` work on a chunk of the columns in the loop over `tiles`, all of `band`.

    Blocks of channels, phases and tiles of rows then follow each other within a chunk.
    """
    spec, layout = spec_of(sch.mod["main"]), layout_of(sch.mod["main"])
    if not layout.column_chunk:
        return
    loop = sch.get(task)
    tasks = layout.blocks(spec) * len(band.phases) * layout.chunk(band) // layout.row_block
    if isinstance(loop.extent, tirx.IntImm) and int(loop.extent) == 1:
        tasks = 0 if loop.kind == tirx.ForKind.PARALLEL else -1
    sch.annotate(tiles, COLUMN_CHUNKS, [layout.column_chunk // layout.column_block, tasks])


def batch_is_known(sch: Schedule) -> bool:
    """Whether the number of images is a constant."""
    return is_known(sch.mod["main"].params[0].shape[0])


def works_apart(sch: Schedule) -> bool:
    """Whether images are worked on one at a time; see `images_apart`. Not where no window of theirs is copied."""
    if find_window(sch) is None:
        return False
    function = sch.mod["main"]
    of_any_batch = not batch_is_known(sch)
    cache_bytes = target_of(function).cache_bytes
    return images_apart(spec_of(function), layout_of(function), cache_bytes, of_any_batch=of_any_batch)


def join_images(sch: Schedule, spec: ConvTranspose2dSpec, source: SBlockRV, *, shared: bool = True) -> None:
    """Make one loop, for threads to share unless they do those in it, of those over images around `source` and bands.

    `source` is the block that all bands read from.
    """
    blocks = [source, *(sch.get_sblock(f"band{band.index}") for band in bands(spec))]
    images = sch.merge(*(sch.get_loops(block)[0] for block in blocks))
    if shared:
        sch.annotate(images, IMAGES, True)


def share_pack(sch: Schedule) -> None:
    """Schedule a packing in place: parallel over channel blocks and kernel rows."""
    block, kh, *_ = sch.get_loops(sch.get_sblock("ordered"))
    sch.parallel(sch.fuse(block, kh))


def find_window(sch: Schedule) -> SBlockRV | None:
    """The block that copies the input's window, or None where the input itself is read, or each band has its own."""
    if layout_of(sch.mod["main"]).by_chunk:
        return None
    names = [sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))]
    return sch.get_sblock("window") if "window" in names else None


def find_window_of(sch: Schedule, band: Band) -> SBlockRV:
    """The block that copies what the sums of `band`, not yet in registers, read of the image by chunk."""
    producers = sch.get_producers(sch.get_sblock(f"{PARTIAL}{band.index}"))
    return next(block for block in producers if sch.get(block).name_hint.startswith("window"))


def copy_window(
    sch: Schedule, spec: ConvTranspose2dSpec, window: SBlockRV, *, apart: bool = False, task: LoopRV | None = None
) -> None:
    """Copy the whole window before anything else, or what a `task` reads, at about a cycle for each value.

    From NCHW to NHWC, or from NHWC to rows of channels, it goes by transposes in registers, 16 channels at a time, so
    that the cache lines read stay in the cache until they are used up, and those written are written once. Otherwise
    it goes in the order of the window: all channels of a row, where they lie together, before the next row. One channel
    after the other its rows fall into as many pages, and 14 x 14 and 16 x 16 images took 1.1 times as long (Emerald
    Rapids). Where there are few rows threads share channels. What a task copies, of images from beyond the second
    cache, it takes one channel after the other with AVX2, as it is read: on a Zen 3 core 32 to 12 channels with 1 x 1
    taps on 64 x 48 took 0.90 of the time, 32 to 3 on 256 x 256 0.91 (two threads 0.87), sam/up1 0.95, others 0.98 to
    1.02; with AVX-512 it was not measured. Shared among threads so, an image of 40 x 25 with 512 channels took 1.6 of
    the time on two: each then reads what the other has copied.
    """
    if task is not None:
        sch.compute_at(window, task, preserve_unit_loops=True)
    _spread_window(sch, spec, window)
    layout = layout_of(sch.mod["main"])
    axes = window_axes(spec, layout)
    first, second, third, fourth = sch.get_loops(window)[-4:]
    shared = [first, second]
    if task is None:
        by_channel = int(sch.get(second).extent) < FEW_ROWS
    else:
        by_channel = target_of(sch.mod["main"]).has_few_registers
    if (axes == "nhwc") != (spec.input_axes == "nhwc"):
        place = dict(zip(axes[1:], (second, third, fourth), strict=True))
        factor = max(size for size in (16, 8, 4, 2, 1) if int(sch.get(place["c"]).extent) % size == 0)
        outer, inner = sch.split(place["c"], [None, factor])
        sch.reorder(place["h"], outer, place["w"], inner)
        sch.vectorize(inner)
        sch.annotate(place["w"], IN_VECTORS, True)
        # Of long rows there are few.
        shared = [first, place["h"], *([outer] if layout.column_chunk else [])]
    elif axes == "nhcw" and by_channel:
        sch.reorder(third, second)
        shared = [first, third]
    if task is None:
        parallelize(sch, shared, prod(spec.input_shape), apart=apart)


def _spread_window(sch: Schedule, spec: ConvTranspose2dSpec, window: SBlockRV) -> None:
    """Lay out the window so that what is read one after the other falls into different sets of the first cache.

    With lanes along columns these are rows of successive channels; with lanes along channels, successive positions.
    Each then is an odd number of cache lines from the next.
    """
    itemsize = DTYPE_BYTES[spec.accumulator_dtype]
    line = CACHE_LINE_BYTES // itemsize
    axes = window_axes(spec, layout_of(sch.mod["main"]))
    extents = [int(sch.get(loop).extent) for loop in sch.get_loops(window)[-3:]]
    axis, count = (2, POSITION_STREAMS) if axes == "nhwc" else (axes.index("c"), spec.ci)
    if collides(prod(extents[axis:]) * itemsize, count):
        sch.storage_align(window, 0, axis=axis, factor=2 * line, offset=line)
