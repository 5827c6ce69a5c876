"""Estimated cost of a register-tiled phase form: the rule that picks a default schedule without a search.

The innermost loops of every CPU schedule here are an outer product: `Tile.vectors` vectors times `Tile.broadcasts`
scalars are multiplied and added into as many accumulators, for each kernel tap and input channel. A core that issues
two vector multiply-adds a cycle, with a latency of four cycles, needs for one such step at least

- half a cycle for each multiply-add, or a whole one where a core has half-width units (`Core`),
- half a cycle to one and a half for each load, one per vector and one per scalar,
- the time in which its vectors stream from the second cache, if no other step reads the same,
- four cycles over the number of column phases worked on together, since a sum waits for the one before it,

and a little more for each load and for what streams, which is not all hidden.

The cost of a layout is its number of steps, surplus lanes and columns included and those that meet the border alone
left out, times the largest of these, plus what it costs to bring in the input, to write the output, and to read from
beyond the second cache, which weights do while their first tile computes. Cycles are good for ranking layouts of one
workload on one core, and for nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TypeVar

from convt_tvm.layout import (
    CACHE_LINE_BYTES,
    PAST_CACHES_BYTES,
    Band,
    Layout,
    bands,
    met_taps,
    partial_sum,
    reached_bands,
    reads_input,
    sums_in_parts,
    window_axes,
)
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = [
    "Costs",
    "Tile",
    "band_cycles",
    "block_sizes",
    "by_chunk",
    "copy_cycles",
    "core_cycles",
    "image_bytes",
    "in_column_chunks",
    "is_for_memory",
    "lane_counts",
    "past_caches",
    "phase_blocks",
    "row_chunks",
]

AnyLayout = TypeVar("AnyLayout", bound=Layout)

FMA_PER_CYCLE = 2
FMA_LATENCY = 4
SPARE_REGISTERS = 1
"""Of 16 vector registers, besides those of a step: LLVM loads ahead. On a Zen 3 core tiles that leave none were never
the best for any of ten layers, and took up to 1.35 of the time of the best (4 channels by 3 vectors in kernelbench/75,
where a sixth of all instructions were loads from the stack and stores to it)."""
MISS_BYTES_PER_CYCLE, MISS_BYTES_PER_CYCLE_IN_ORDER = 7, 10
"""What one core reads from beyond the second cache: 18 GB/s at 2.7 GHz on an Emerald Rapids server; 28 of vectors of
weights, which are asked for ahead and lie in huge pages."""
NOT_HIDDEN, NOT_HIDDEN_IN_ORDER = 0.25, 0.1
"""Of the shorter of waiting and computing: 8 % of dilated/k3d2 with its 0.6 MB of weights read for each row; less of
vectors of weights, which are asked for ahead (a fit to 23 layers on an Emerald Rapids server, as what follows)."""
STALL_BYTES_PER_CYCLE = 256
"""What of the bytes from the second cache is not hidden (unet/up4, sam/up1 and dcgan/4 in channels_last, 64 against 32
channels in a block)."""

ADD_CYCLES = 1
"""For adding a vector of partial sums to one of sums in registers."""
COPY_BYTES_PER_CYCLE = 7
"""Of gathered rows copied past the caches after the last sums of a task, beside which the others are (25 GB/s)."""
STREAMED_ROWS = 4, 16
"""How many rows of a phase a task may take whose vectors go past the caches as they are."""
TASKS, TASK_CYCLES = 16, 30_000
"""Tasks that threads share without waiting long for the last, and how many cycles of a core make one worthwhile."""
IN_ORDER = "in order"
"""In place of an input's axes: copied line by line, from channels_last to lanes along channels."""
FIRST_CACHE_BYTES = 28 << 10
"""What the first cache has for inputs: 32 KiB, without what weights and sums take."""
BY_CHUNK_CYCLES = 1.03
"""How many times as long all takes then, beside what copies save: what is copied takes the place of weights. Altogether
unet/up1, with 512 outputs for each input, took 1.03 of the time, sam/up1 0.93 and pointpillars/up4 0.97."""
MIN_CHUNK = 8
"""Tiles of columns that a chunk has at least."""
GATHERED_SHARES = 32, 8, 4
"""What parts of the second cache the rows that a task gathers may take."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes that come from beyond the second cache in a cycle.

    The first time; again, from the last cache; and of weights that it does not keep (`Core.last_cache`), each time.
    """

    first: float
    again: float
    far: float


@dataclass(frozen=True, slots=True)
class Core:
    """What sets the cores of some processors apart.

    Attributes
    ----------
    fma_bytes
        Of vectors, multiplied and added in a cycle, `FMA_PER_CYCLE` instructions at most.
    vector_load, half_load, in_order_load, broadcast
        Cycles for loading a whole vector register, half of one or less, a whole one that does not lie across cache
        lines, and one value into all lanes, beside multiply-adds.
    any_load
        Cycles that each load takes in any case; vectors that lie across cache lines take twice as many.
    add_in_memory
        Cycles for adding a vector of partial sums to one of sums that is loaded from the stack and stored there.
    put_by
        Cycles for a vector of sums that is on the stack until those of all column phases are there, as their outputs
        are stored together; none where it was not measured.
    streams
        Bytes that are read from the second cache in a cycle, beside multiply-adds (48 when a core does nothing else).
    reads, reads_in_order
        How fast data come from beyond the second cache, and vectors of weights.
    last_cache
        Size of weights from which on the last cache does not keep them from one reading of all to the next.
    output_wait, output_hidden, gathered, streamed
        Cycles for each output that goes to memory by way of the caches, less a share of the cycles in which it is
        summed; for one that is gathered and goes past them; and, of the cycles in which one is summed, the share for
        one that goes past them from registers: loads of sums then wait behind stores.
    stored
        Cycles for each output that goes to NCHW in vectors.
    moved
        Cycles for each output that goes from vectors of columns to channels_last.
    page_shared
        Cycles for an input value in channels_last, and each other position of a tile in its page, where the input
        itself is read from beyond the second cache and a position's channels fill several lines: prefetchers follow one
        stream in a page of 4 KiB.
    copied_bytes
        Sizes of an image: from which on it may be copied chunk by chunk, and from which on the second cache does not
        hold a copy of all of it.
    copied_near, copied_far
        Cycles for each input: what copies of chunks save that the first cache holds; and what a copy costs that the
        second does not hold, by the axes of the input, or `IN_ORDER`.
    copied_past
        Cycles more for each input in channels_last of an image that no cache holds, of `PAST_CACHES_BYTES` and more,
        where it is copied to rows of a channel.
    in_blocks
        How many times the estimate lanes along columns take in channels_last with several blocks of channels in a group
        and more than two in all: where they meet each writes a part of a cache line.
    outer
        How many times the estimate a layout with ``taps="outer"`` takes.
    taps
        How many times the estimate a layout that sums channels before taps is reckoned with.
    """

    fma_bytes: int
    vector_load: float
    half_load: float
    in_order_load: float
    broadcast: float
    any_load: float
    add_in_memory: float
    put_by: float
    streams: float
    reads: Reads
    reads_in_order: Reads
    last_cache: int
    output_wait: float
    output_hidden: float
    gathered: float
    streamed: float
    stored: float
    moved: float
    page_shared: float
    copied_bytes: tuple[int, int]
    copied_near: float
    copied_far: Mapping[str, float]
    copied_past: float
    in_blocks: float
    outer: float
    taps: float

    def reread(self, weights: int, *, in_order: bool = False) -> float:
        """Bytes that come in a cycle of so many bytes of weights, which were all read before."""
        reads = self.reads_in_order if in_order else self.reads
        return reads.again if weights < self.last_cache else reads.far


WIDE = Core(
    fma_bytes=128,
    vector_load=1.0,
    half_load=0.75,
    in_order_load=1 / 2,
    broadcast=1 / 2,
    any_load=0.15,
    add_in_memory=2,
    put_by=0.0,
    streams=28,
    reads=Reads(first=MISS_BYTES_PER_CYCLE, again=MISS_BYTES_PER_CYCLE, far=4.2),
    reads_in_order=Reads(first=MISS_BYTES_PER_CYCLE_IN_ORDER, again=MISS_BYTES_PER_CYCLE_IN_ORDER, far=5),
    last_cache=48 << 20,
    output_wait=0.85,
    output_hidden=0.4,
    gathered=0.25,
    streamed=0.2,
    stored=0.7,
    moved=0.5,
    page_shared=0.2,
    copied_bytes=(512 << 10, 1 << 20),
    copied_near=1.0,
    copied_far={"nchw": 3.5, "nhwc": 1.5, IN_ORDER: 1.5},
    copied_past=2.0,
    in_blocks=1.1,
    outer=1.15,
    taps=1.1,
)
"""Such a core issues two loads in a cycle beside two multiply-adds: Emerald Rapids, tiles of 1 x 14 and 1 x 28 in the
first cache. Where another thread shares the core tiles of few loads lose least: dilated/k3d2 in channels_last took 0.91
of the time with 4 vectors by 6 positions, 10 loads, in place of 2 by 11, 13. So do those that stream least from the
second cache, which reads 32 bytes a cycle in a quiet hour: with 32 for it unet/up4 and sam/up1 in channels_last took 4
vectors by 4 rows, 256 bytes for 8 cycles of multiply-adds, and in a busy hour 1.05 and 1.12 times as long as with 2 x 3
positions, on two threads 1.09 both, behind PyTorch.

Gathering its outputs took kernelbench/75 (0.65 cycles of sums for each) 0.88 of the time, seed/square (1.2) 0.96,
seed/rect (1.8) 1.08, unet/up4 (4) 1.04 and pointpillars/up4 (8) 1.06. From registers kernelbench/81 (0.4) took 0.70
of the time that gathering does, kernelbench/75 0.76, seed/square 0.90, seed/rect 1.12, unet/up4 1.0 to 1.2.

Copies were fitted to 207 layers in NCHW and 72 in channels_last, with whole images copied and chunks. What they choose
took 0.91 of the time (a geometric mean) for the 84 of 728 whose default they change: 64 inputs for each of 4 outputs on
224 x 224, in 4 groups, 0.56, 64 to 3 channels on 256 x 256 0.61, one channel in a group 0.65 to 0.93; the worst two
1.19 and 1.23. With 2 in channels_last four more would have taken chunks, and 1.02 to 1.14 of the time. Copies in order
were timed by themselves in 57 layers of 1 to 50 MB, whole, by chunk and left out: 1.5 for them, 1.0 to 1.9 in the
middle. With 0.45, a third of what others cost, what was chosen took 1.030 times as long as the best of these three,
with 1.5 1.023 (40 to 96 channels on 128 x 128, 3 x 1 taps 0.89 of the time).

Of 16 images of 12 to 84 MB in channels_last copies of the whole took 1.0 to 2.0 times the estimate, 1.4 in the middle,
and chunks 0.7 to 1.6 times theirs, 1.0 in the middle: 2 cycles more have four take chunks, in 0.57 to 0.73 of the time.
Lanes along columns took 1.15 times their estimate beside lanes along channels in 42 layers of several blocks of
channels, 0.93 in 20 others; with 1.1 for it 770 to 128 channels on 24 x 32 took 0.73 and 0.80 of the time in two
series, five others 0.83 to 1.09.

What a page shared costs was asked of 63 layers in channels_last, with tiles of one row and of several, and with copies.
With 0.4 for it, from unet/up4 alone (6.6 ms with positions in 4 rows, 6.7 in 2, 7.3 in one), tiles of one row were
given away: 64 to 16 channels on 128 x 256 took 1.12 of the time. With 0.2 the 37 of 498 layers whose default changes
took 0.98 of it, a geometric mean, 0.73 to 1.09, and two of 8 and 10 channels in a group 1.15 and 1.3.

Data of up to 33 MB were read at 23 GB/s, of 67 MB and more, which the last cache does not keep, at 11: 2,048 to 512
channels on 8 x 6 (67 MB of weights) took 24 ms in chunks of 2 rows, as long as it takes to read all weights four times
so, and 14 in one of 8; 1,024 to 1,536 on 8 x 8 69 and 29. With 5 bytes a cycle for vectors of weights 27 of 708 layers
and formats in float32 and float64, all with 50 MB of weights and more, took 0.83 of the time (a geometric mean, 0.62 to
1.1), with 4.2 30 took 0.84, with 6 23 0.87.

With taps in the outer loop layers of 512 to 2,048 channels on 8 x 8 took 0.72 to 0.87 of the time of what 1.3 for it
chooses in NCHW (1.06 on 7 x 7), 0.8 to 1.13 in channels_last. With 1.0 pose/1 took 1.08 and 1.10 of it, 2,048 channels
on 7 x 7 1.11 and 1.2.

Of 173 layers with sums of channels before taps, or without, what 1.1 for it chooses took 1.027 times as long as the
faster (a geometric mean), with 1.0 1.020, with 1.2 1.034 and with 1.3 1.045. But with 1.0 seven took 1.11 to 1.38, with
1.1 three 1.11 to 1.19. What is `stored` was fitted beside: with 1.0 for it, and 1.2 for the other, layers with up to 16
channels in a group, which store much, took up to 1.38.
"""
PAIRED = Core(
    fma_bytes=64,
    vector_load=1.6,
    half_load=0.9,
    in_order_load=1.5,
    broadcast=1 / 2,
    any_load=0.0,
    add_in_memory=3,
    put_by=3.0,
    streams=32,
    reads=Reads(first=MISS_BYTES_PER_CYCLE, again=MISS_BYTES_PER_CYCLE, far=MISS_BYTES_PER_CYCLE),
    reads_in_order=Reads(
        first=MISS_BYTES_PER_CYCLE_IN_ORDER, again=MISS_BYTES_PER_CYCLE_IN_ORDER, far=MISS_BYTES_PER_CYCLE_IN_ORDER
    ),
    last_cache=PAST_CACHES_BYTES,
    output_wait=0.6,
    output_hidden=0.0,
    gathered=0.5,
    streamed=0.1,
    stored=1.0,
    moved=0.5,
    page_shared=0.4,
    copied_bytes=(2 << 20, 2 << 20),
    copied_near=0.0,
    copied_far={"nchw": 2.0, "nhwc": 2.5, IN_ORDER: 0.75},
    copied_past=0.0,
    in_blocks=1.0,
    outer=1.05,
    taps=1.05,
)
"""A Zen 4 core works on 64 bytes in two halves: a multiply-add a cycle, a load in 1.06 cycles, or 1.7 across lines.

Fitted in a quiet hour to 1,480 layouts of 168 layers in both formats, with some nine of all schedules each: what was
chosen took 1.043 times as long as the fastest before, and takes 1.030. Of 1,084 layers and formats the default of 275
is another by it, in 0.92 of the time (a geometric mean, 0.36 to 1.8, more than 1.1 for 13). Sums of channels before
taps, which had been reckoned with 1.5 times their estimate, took 0.87 of it for the 88 that they are now chosen for. 12
channels on 80 x 80 in channels_last took 1.01 ms in tiles of 27 positions by two phases, whose sums are `put_by`, and
0.76 of 11: with 0 for it what was chosen took 1.040 times as long as the fastest, with 1 to 4 1.036.

In that hour memory was fast: seed/square took 10.9 ms through the caches, 11.8 gathered and 12.5 from registers in the
best tiles of each; in a busy one it had been 17, 13 and not measured. What the three cost stands in the middle.
"""
NARROW = Core(
    fma_bytes=64,
    vector_load=1 / 2,
    half_load=1 / 2,
    in_order_load=1 / 2,
    broadcast=1 / 2,
    any_load=0.15,
    add_in_memory=2,
    put_by=0.0,
    streams=28,
    reads=Reads(first=5, again=24, far=5),
    reads_in_order=Reads(first=7, again=20, far=7),
    last_cache=PAST_CACHES_BYTES,
    output_wait=1.6,
    output_hidden=0.4,
    gathered=0.5,
    streamed=0.2,
    stored=1.0,
    moved=1.2,
    page_shared=0.4,
    copied_bytes=(2 << 20, 2 << 20),
    copied_near=0.0,
    copied_far={"nchw": 2.5, "nhwc": 2.5, IN_ORDER: 0.75},
    copied_past=0.0,
    in_blocks=1.0,
    outer=1.0,
    taps=1.05,
)
"""A core with AVX2: fitted to 1,500 trials of 24 layers on one of a Zen 3 server at 3.4 GHz. Two loads a cycle are
hardly ever waited for, whether they lie across lines or not, and its last cache is fast: pose/1 took 9.0 ms where each
tap of a block stays there while all rows pass, 16.9 where all weights come from memory for each row. It stands for
narrower vectors as well, with which nothing was measured, and no outputs of theirs are `streamed`.

What it reads from the second cache was fitted to 33 layers in channels_last, 12 tiles of each: 4 vectors of weights by
2 positions, 128 bytes for 8 multiply-adds, took 1.37 times as long as the best tile for grouped/4, and 1.28 for 32
channels with 12 x 12 taps. So was what is `moved`: seed/square took 23.7 ms with lanes along columns, 18.4 along
channels. With taps in the outer loop pose/1, hifigan/up1 and three others whose weights do not fit the second cache
took 0.93 to 1.01 of the time, a median of 0.97, on two threads 0.92 to 1.03 and 0.98. Beside copies of the whole image
those chunk by chunk took 1.03 of the time for 1 MB (64 to 3 channels on 64 x 64), 0.94 for 2 MB, 0.85 to 0.93 for 4 MB
and 0.62 to 0.89 for 8 MB.

Of 212 layers drawn in NCHW, with some eight layouts of all schedules each, what it chooses took 1.077 times as long as
the fastest in one noisy series (a geometric mean), more than 1.2 times for 26. Of twenty other values of its constants
the best came to 1.070: what is left is its form, and noise. ``any_load=0.2`` alone came to 1.072, but has unet/up4 in
channels_last take two rows of positions and not four, 1.09 of the time."""


def core_of(target: Target) -> Core:
    """What is known of the cores that a target's features belong to."""
    if target.vector_bytes < CACHE_LINE_BYTES:
        return NARROW
    return PAIRED if target.halves_vectors else WIDE


@dataclass(frozen=True, slots=True)
class Tile:
    """The accumulators of one column phase: ``vectors`` along the lanes times ``broadcasts`` across them.

    A vector has ``vector_bytes``; ``in_order`` are vectors that follow each other in memory, from step to step as well.
    """

    vectors: int
    broadcasts: int
    vector_bytes: int
    in_order: bool = False

    def fits(self, target: Target, phases: int = 1) -> bool:
        """Whether the accumulators of so many column phases leave registers for one row of vectors and one scalar."""
        spare = SPARE_REGISTERS if target.has_few_registers else 0
        return self.vectors * self.broadcasts * phases + self.vectors + 1 + spare <= target.vector_registers

    def step_cycles(self, target: Target, phases: int, reuse: int, sharing: float) -> float:
        """Cycles for one tap of one input channel in one column phase.

        `phases` column phases are worked on together, of which `sharing` load the same vectors, and `reuse` such steps
        read the same from a cache.
        """
        core, products, loaded = core_of(target), self.vectors * self.broadcasts, self.vectors / sharing
        whole = core.in_order_load if self.in_order else core.vector_load
        vector_load = whole if self.vector_bytes == target.vector_bytes else core.half_load
        streamed_bytes = self.vectors * self.vector_bytes / reuse
        limit = max(
            products / min(FMA_PER_CYCLE, core.fma_bytes / self.vector_bytes),
            loaded * vector_load + self.broadcasts * core.broadcast,
            FMA_LATENCY / phases,
            streamed_bytes / core.streams,
        )
        accesses = loaded * (1 if self.in_order else 2) + self.broadcasts
        return limit + core.any_load * accesses + streamed_bytes / STALL_BYTES_PER_CYCLE

    def part_cycles(self, target: Target, phases: int) -> float:
        """Cycles for adding a partial sum to a sum in each accumulator of one of `phases` column phases.

        In registers, if both fit for all phases, or in memory.
        """
        products = self.vectors * self.broadcasts
        held = 2 * products * phases + self.vectors + 1 <= target.vector_registers
        return products * (ADD_CYCLES if held else core_of(target).add_in_memory)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a schedule pays besides its sums.

    For bringing one input value into the window, for writing one output, and for a step of its tile.
    """

    cycles_per_input: float
    cycles_per_output: float
    cycles_per_step: float = 0.0


def lane_counts(spec: ConvTranspose2dSpec, target: Target) -> tuple[int, ...]:
    """Vector lengths to choose from, in accumulators: the full vector, its half and its quarter."""
    full = target.vector_bytes // DTYPE_BYTES[spec.accumulator_dtype]
    return tuple(full >> shift for shift in range(3) if full >> shift >= 2)


def phase_blocks(spec: ConvTranspose2dSpec, target: Target, tile: Tile) -> list[int]:
    """How many column phases may be worked on together: divisors of their number whose accumulators fit, or one."""
    phases = len(spec.axes[1].phases)
    return [k for k in range(1, phases + 1) if phases % k == 0 and tile.fits(target, k)] or [1]


def row_chunks(spec: ConvTranspose2dSpec, row_block: int, target: Target) -> list[int]:
    """Sizes of row chunks to choose from: one tile, all rows, and what half the second cache holds of the image."""
    tiles = max(-(-band.rows // row_block) for band in bands(spec))
    row_bytes = spec.ci * spec.iw * DTYPE_BYTES[spec.accumulator_dtype]
    held = max(1, target.cache_bytes // 2 // (row_bytes * row_block))
    # As many chunks as needed, of sizes as equal as can be.
    counts = {tiles, 1, -(-tiles // min(held, tiles))}
    return sorted({-(-tiles // count) * row_block for count in counts})


def in_column_chunks(spec: ConvTranspose2dSpec, layout: AnyLayout, target: Target) -> AnyLayout:
    """`layout` with long rows of tiles in chunks of columns.

    So that what a chunk reads of the image stays in half the second cache until all blocks of channels and phases have
    read it; and that there are tasks to share where rows are few, each of `TASK_CYCLES` at least.
    """
    if layout.row_chunk > layout.row_block or layout.image_block > 1:
        return layout
    reached = reached_bands(spec)
    passes = layout.blocks(spec) * sum(len(band.phases) for band in reached)
    tasks = spec.input_shape[0] * spec.groups * layout.blocks(spec)
    tasks *= sum(len(band.phases) * layout.rows(band) // layout.row_block for band in reached)
    row_bytes = image_bytes(spec) // spec.ih
    held = -(-row_bytes // (target.cache_bytes // 2)) if passes > 1 else 1
    shared = min(TASKS // max(1, tasks), int(band_cycles(spec, target)) // TASK_CYCLES)
    tiles = layout.columns(spec) // layout.column_block
    count = min(max(held, shared), tiles // MIN_CHUNK)
    return layout if count < 2 else replace(layout, column_chunk=-(-tiles // count) * layout.column_block)


def by_chunk(spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> Iterator[Layout]:
    """`layout` with its window copied chunk by chunk, if an image is so large that this may pay.

    In chunks of rows of a group that half the second cache holds, and the first, but not of more than leave enough for
    threads to share.
    """
    reached = reached_bands(spec)
    if image_bytes(spec) < core_of(target).copied_bytes[0] or not reached or reads_input(spec, layout):
        return
    rows, beside = max(layout.rows(band) for band in reached), max(band.rows_beside for band in reached)
    most = rows // -(-TASKS // (spec.input_shape[0] * spec.groups))
    sizes = (min(held // _row_bytes(spec) - beside, most) for held in (target.cache_bytes // 2, FIRST_CACHE_BYTES))
    for chunk in sorted({max(1, size // layout.row_block) * layout.row_block for size in sizes}):
        if chunk < rows or spec.groups > 1:
            yield replace(layout, row_chunk=chunk, by_chunk=True)


def _row_bytes(spec: ConvTranspose2dSpec) -> int:
    """Size of what a row of an image takes of the channels of a group."""
    return image_bytes(spec) // spec.groups // spec.ih


def copy_cycles(spec: ConvTranspose2dSpec, layout: Layout, target: Target, cycles: float) -> float:
    """Cycles for each input value to come into the window, of which a copy in the caches takes so many.

    Fewer than none where its being near saves more later.
    """
    core = core_of(target)
    if layout.by_chunk:
        reached = reached_bands(spec)
        held = max((layout.chunk(band) + band.rows_beside) * _row_bytes(spec) for band in reached)
        copied = cycles * sum(1 + band.rows_beside / layout.row_chunk for band in reached)
        return copied - (core.copied_near if held <= FIRST_CACHE_BYTES else 0.0)
    if image_bytes(spec) < core.copied_bytes[1]:
        return cycles
    if spec.input_axes == "nchw":
        return cycles + core.copied_far["nchw"]
    if window_axes(spec, layout) == "nhwc":
        return cycles + core.copied_far[IN_ORDER]
    past = image_bytes(spec) >= PAST_CACHES_BYTES
    return cycles + core.copied_far["nhwc"] + (core.copied_past if past else 0.0)


def is_for_memory(spec: ConvTranspose2dSpec) -> bool:
    """Whether the output is too large for the next layer to find it in a cache."""
    return prod(spec.output_shape) * DTYPE_BYTES[spec.dtype] >= PAST_CACHES_BYTES


def past_caches(spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> Iterator[Layout]:
    """`layout` in the ways for its outputs to go past the caches, which pays where the output `is_for_memory`.

    Rows of a chunk are gathered, as many as fit a part of the second cache; or vectors of columns go from registers, in
    chunks of few rows, for rows that follow each other share a cache line. There are several tasks. In channels_last a
    block has no rows of its own, and rows of several images do not follow each other.
    """
    if spec.output_axes == "nhwc" or layout.image_block > 1:
        return
    itemsize, rows = DTYPE_BYTES[spec.dtype], max(band.rows for band in bands(spec))
    row_bytes = layout.co_block * spec.stride[0] * spec.ow * itemsize
    held = [target.cache_bytes // share // row_bytes // layout.row_block for share in GATHERED_SHARES]
    tiles = -(-rows // layout.row_block)
    chunks = [min(max(1, count), tiles) * layout.row_block for count in held]
    found = [replace(layout, row_chunk=chunk, gathers=True) for chunk in chunks]
    is_line = layout.lanes == "ow" and layout.vector_lanes * itemsize == CACHE_LINE_BYTES
    if target.joins_vectors and is_line and spec.dtype == spec.accumulator_dtype:
        chunks = [min(rows, -(-rows // -(-rows // size))) for size in STREAMED_ROWS]
        found += [replace(layout, row_chunk=chunk, streams=True) for chunk in chunks]
    for passing in dict.fromkeys(found):
        counts = {passing.rows(band) // passing.chunk(band) for band in bands(spec)}
        tasks = spec.input_shape[0] * spec.groups * layout.blocks(spec) * max(counts)
        if len(counts) == 1 < tasks:
            yield passing


def _image_cycles(spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> float:
    """Cycles in which the input comes from beyond the second cache.

    A chunk of rows is read for each block of channels and row phase; what half the cache holds is read again from it.
    """
    core, rows = core_of(target), max(layout.rows(band) for band in bands(spec))
    image = image_bytes(spec)
    once = spec.input_shape[0] * image
    of_chunk = image // spec.groups * min(layout.row_chunk, rows) // max(1, rows) // layout.column_chunks(spec)
    if of_chunk <= target.cache_bytes // 2:
        return once / core.reads.first
    times = layout.blocks(spec) * sum(len(band.phases) for band in bands(spec))
    return once / core.reads.first + (times - 1) * once / core.reads.again


def _weight_cycles(
    spec: ConvTranspose2dSpec, layout: Layout, target: Target, *, in_order: bool
) -> tuple[float, float, int]:
    """Cycles in which weights come from beyond the second cache: those of a first tile, of others, and how many share.

    All weights are read for each chunk of rows, if they are more than the second cache holds; a block's slice, or one
    tap of it, by each tile of a chunk, and anew if it does not fit. It is in the last cache then. So are all weights,
    from chunk to chunk and from call to call, if they are less than `Core.last_cache`.
    """
    core = core_of(target)
    reads = core.reads_in_order if in_order else core.reads
    # One at a time, weights come more slowly from the second cache: chunks of more rows, which read them less often,
    # took 0.95 of the time for dilated/k3d2 on two threads.
    held = target.held_weight_bytes if in_order else target.cache_bytes // 2
    # Those that fill up a block are read as well.
    weights = prod(layout.packed_shape(spec)) * DTYPE_BYTES[spec.accumulator_dtype]
    rows = max(layout.rows(band) for band in bands(spec))
    chunk = min(layout.row_chunk, rows)
    # A tap is met by as many rows as the image has (1 in dcgan/1, whose tiles of one row share no weights).
    tiles = min(chunk // layout.row_block, spec.ih) * min(layout.columns(spec) // layout.column_block, spec.iw)
    if weights <= held:
        return weights / reads.first, 0.0, tiles * (rows // chunk)
    chunks = layout.column_chunks(spec)
    passes, tiles = layout.image_tiles(spec) * (rows // chunk) * chunks, max(1, tiles // chunks)
    first = passes * weights / core.reread(weights, in_order=in_order)
    stays = layout.slice_bytes(spec) <= held
    return first, 0.0 if stays else passes * (tiles - 1) * weights / reads.again, tiles


def _weight_bytes(spec: ConvTranspose2dSpec) -> int:
    return prod(spec.weight_shape) * DTYPE_BYTES[spec.accumulator_dtype]


def image_bytes(spec: ConvTranspose2dSpec) -> int:
    """Size of an image that is read, as values to multiply."""
    return spec.ci * spec.ih * spec.iw * DTYPE_BYTES[spec.accumulator_dtype]


def _lanes_per_cycle(target: Target) -> float:
    """Multiply-adds of single lanes in float32, for telling large layers from small ones."""
    return FMA_PER_CYCLE * target.vector_bytes / 4


def band_cycles(spec: ConvTranspose2dSpec, target: Target) -> float:
    """Roughly what all bands cost one core: multiply-adds, one cycle for each output, and the weights from memory."""
    sums = spec.multiply_adds / _lanes_per_cycle(target)
    return sums + prod(spec.output_shape) + _weight_bytes(spec) / MISS_BYTES_PER_CYCLE


def core_cycles(
    spec: ConvTranspose2dSpec, layout: Layout, tile: Tile, target: Target, *, reuse: int, costs: Costs
) -> float:
    """Estimated cycles of one core for `spec` in `layout`; see `Tile.step_cycles` for `reuse`."""
    rows = sum(band.row_steps(layout, spec.ih) for band in bands(spec))
    tiles_of_rows = layout.image_tiles(spec) * spec.groups * layout.blocks(spec) * rows * (spec.ci // spec.groups)
    # Phases that begin with the same column of the image.
    sharing = layout.phases / min(layout.phases, len({phase.base for phase in spec.axes[1].phases}))

    step = tile.step_cycles(target, layout.phases, reuse, sharing) + costs.cycles_per_step
    row = layout.column_steps(spec) * step
    last, vectors = layout.last_vectors(spec), layout.column_block // layout.vector_lanes
    if layout.lanes == "ow" and last < vectors:
        # The last tile of a row has fewer sums, but loads as many scalars for them.
        ending = replace(tile, vectors=tile.vectors * last // vectors)
        last_step = ending.step_cycles(target, layout.phases, reuse, sharing) + costs.cycles_per_step
        row += spec.axes[1].all_taps * (last_step - step * last / vectors)
    sums = tiles_of_rows * row + _parts(spec, layout) * tile.part_cycles(target, layout.phases)
    if not tile.fits(target, len(spec.axes[1].phases)):
        sums += _tiles(spec, layout) * tile.vectors * tile.broadcasts * core_of(target).put_by
    first_wait, wait, tiles = _weight_cycles(spec, layout, target, in_order=tile.in_order)
    not_hidden = NOT_HIDDEN_IN_ORDER if tile.in_order else NOT_HIDDEN

    def beside(waiting: float, computing: float) -> float:
        return max(waiting, computing) + not_hidden * min(waiting, computing)

    # Of the tiles that share a slice of weights the first waits for it while it computes.
    return (BY_CHUNK_CYCLES if layout.by_chunk else 1.0) * (
        beside(first_wait, sums / tiles)
        + beside(wait, sums - sums / tiles)
        + _image_cycles(spec, layout, target)
        + prod(spec.input_shape) * costs.cycles_per_input
        + prod(spec.output_shape) * (costs.cycles_per_output + _wait_per_output(spec, layout, target))
    )


def _wait_per_output(spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> float:
    """Cycles for each output in which nothing is summed: for its way to memory, or for the last rows of a task."""
    core = core_of(target)
    sums = spec.multiply_adds / _lanes_per_cycle(target) / prod(spec.output_shape)
    if layout.streams:
        return core.streamed * sums
    if layout.gathers:
        last = layout.row_block / max(layout.chunk(band) for band in bands(spec))
        return core.gathered + last * DTYPE_BYTES[spec.dtype] / COPY_BYTES_PER_CYCLE
    if not is_for_memory(spec):
        return 0.0
    return max(0.0, core.output_wait - core.output_hidden * sums)


def _parts(spec: ConvTranspose2dSpec, layout: Layout) -> float:
    """How often partial sums are added to the sums of a tile, in one column phase."""
    tiles = sum(parts * (layout.rows(band) // layout.row_block) for band, parts in _parts_of_bands(spec))
    return tiles * _tiles_in_row(spec, layout)


def _tiles(spec: ConvTranspose2dSpec, layout: Layout) -> int:
    """How many tiles are summed, each phase's apart."""
    tiles = sum(len(band.phases) * (layout.rows(band) // layout.row_block) for band in reached_bands(spec))
    return tiles * _tiles_in_row(spec, layout)


def _tiles_in_row(spec: ConvTranspose2dSpec, layout: Layout) -> int:
    """Tiles of all column phases in a row of each image, group and block of channels."""
    columns = layout.columns(spec) // layout.column_block * len(spec.axes[1].phases)
    return layout.image_tiles(spec) * spec.groups * layout.blocks(spec) * columns


@lru_cache(maxsize=64)
def _parts_of_bands(spec: ConvTranspose2dSpec) -> tuple[tuple[Band, float], ...]:
    """Bands whose sums have several parts, and how many in a row of each phase together."""
    found = []
    for band in reached_bands(spec):
        if sums_in_parts(spec, band):
            products = prod(met_taps(spec, band)) * (spec.ci // spec.groups)
            found.append((band, products / prod(partial_sum(spec, band)) * len(band.phases)))
    return tuple(found)


def block_sizes(extent: int, limit: int) -> Iterable[int]:
    """Block sizes up to `limit` that differ in the number of blocks of `extent`, each the smallest for its number."""
    seen = set()
    for size in range(min(extent, limit), 0, -1):
        count = -(-extent // size)
        if count not in seen:
            seen.add(count)
            yield -(-extent // count)
