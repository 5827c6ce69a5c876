"""Estimated cost of a thread form on a GPU: the rule that picks a default schedule without a search, or a GPU.

A streaming multiprocessor holds ``r`` blocks at a time, as many as its threads, registers and shared memory allow. Each
works through its input channels in steps: load, wait, multiply. A step keeps the multiprocessor busy for the largest of

- its multiply-adds, over the lanes there are,
- its instructions, four a cycle,
- its reads of shared memory (or of the first cache, where nothing is staged), one a cycle for a warp,

and it waits for global memory meanwhile; ``r`` blocks wait at the same time, and a block that fetches the next step's
values ahead waits while it multiplies. So a step of all of them takes ``max(r * busy, busy + latency)``, or
``max(r * busy, latency)``, but no less than the instructions of one warp after the other; and the grid takes
``ceil(blocks / (r * processors))`` times that, plus adding up what threads have that share input channels, and writing
the output.

The throughputs are NVIDIA's published ones; latencies, instructions and cycles for a sector were fitted to what an H200
took. By ``tuning_logs/bench/cuda-sm_90-NVIDIA-H200.jsonl`` the default takes 1.10 times as long in float32 as the tuned
kernel, in the geometric mean of the public workloads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import inf

from convt_tvm.gpu import ARCHITECTURES, Limits
from convt_tvm.layout import bands, column_starts
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.thread_layout import BATCH, MAX_FETCHED, ThreadLayout, row_alignment, row_starts, weight_vector

__all__ = ["grid_cycles", "part_bytes", "powers", "shared_bytes", "thread_layouts"]

WARP = 32
MAX_SUMS = 64
MAX_REGISTERS = 255
SHARED_BYTES = 48 << 10
"""What a block may take of shared memory without asking for more at the launch."""
SPARE_REGISTERS = 40
"""Of a thread, besides sums and operands: addresses, loop counters, bounds."""
ISSUED_PER_CYCLE = 4
GLOBAL_LATENCY = 600
"""Cycles from asking global memory for a stage until after the barrier."""
CACHE_LATENCY = 250
"""Cycles until operands come from the first cache, for one input channel without a stage."""
CACHED_READ_CYCLES = 4
"""For a read of the first cache, of a warp: the load unit's queue is what such kernels wait for most."""
CACHED_READ_INSTRUCTIONS = 6
"""For a value of the input that is read where it is used: bounds, address, load."""
STAGED_VALUE_INSTRUCTIONS = 32
"""For a value copied to shared memory: its coordinates from a running number, bounds, load, store."""
STAGED_VECTOR_INSTRUCTIONS = 32
"""For a vector of weights copied to shared memory, likewise."""
CYCLES_ALONE = 3
"""Between instructions of one warp, which depend on each other in part."""
UNJOINED = 2
"""How much more it costs to write parts of sectors if other blocks write the other parts."""
SECTOR_BYTES = 32
SECTOR_CYCLES = 1.5
"""For a part of a sector that is written, of a multiprocessor."""
STORE_INSTRUCTIONS = 8
"""For each output: bounds, bias, address, store."""
RESERVED_SHARED_BYTES = 1024
"""Of shared memory, for each block, by the system."""
BYTES_PER_CYCLE = 16
"""Of global memory, for each multiprocessor: 3.35 TB/s over 132 at 1.7 GHz on an H100."""
CACHE_BYTES_PER_CYCLE = 32
"""Of the second cache, likewise."""
PART_LATENCY = 300
"""Cycles for two barriers and what is between them, where threads add up their sums."""
LAUNCH_CYCLES = 2000

MAX_THREADS = 256
MAX_ROWS = 16
MAX_TILE = 8
MAX_DEPTH_THREADS = 32
SPLIT_THREADS = (128, 256, 512)
"""Of a block whose threads share input channels."""
FILLING_THREADS = 1024
"""Of a multiprocessor: with so many, sharing input channels has no more to give."""
STAGE_BYTES = (6 << 10, 16 << 10, SHARED_BYTES)
"""How full stages may be; each of several arrays begins at a multiple of 64 bytes."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a band's kernel is made of, whatever the layout.

    ``row_reach`` and ``column_reach`` are how many rows and columns of the window a block reads besides its own
    positions, and ``kernel_rows`` how many rows of weights, as far as TVM can tell.
    """

    blocks: int
    rows: int
    columns: int
    phases: int
    starts: tuple[int, ...]
    row_taps: int
    most_taps: int
    all_taps: int
    kernel_rows: int
    row_reach: int
    column_reach: int
    offsets: int

    def tiles(self, layout: ThreadLayout) -> int:
        """Tiles of a row phase, of all column phases, for one block of channels."""
        rows, columns = -(-self.rows // layout.row_block), -(-self.columns // layout.column_block)
        return rows * columns * (self.phases // layout.phases)

    def kernel_columns(self, layout: ThreadLayout) -> int:
        """Columns of weights that a block reads."""
        return _range(self.starts, self.most_taps, layout.phases)

    def window_values(self, layout: ThreadLayout) -> int:
        """Values of one channel of the window that a block reads."""
        return (layout.row_block + self.row_reach) * (layout.column_block + self.column_reach)

    def stage_values(self, layout: ThreadLayout) -> int:
        """Elements of shared memory for one input channel: rows are `row_alignment` apart."""
        factor, offset = row_alignment(layout)
        width = layout.column_block + self.column_reach
        pitch = width + (offset - width) % factor
        return (layout.row_block + self.row_reach) * pitch + self.weight_values(layout)

    def weight_values(self, layout: ThreadLayout) -> int:
        """Weights of one input channel that a block reads."""
        return self.kernel_rows * self.kernel_columns(layout) * layout.co_block


def _range(starts: Sequence[int], length: int, count: int) -> int:
    """How many places `length` from each of `count` neighbouring starts span, as far as TVM can tell.

    It tells exactly if these are all starts, or starts in arithmetic progression; otherwise it takes all for possible.
    """
    step = starts[1] - starts[0] if len(starts) > 1 else 0
    if starts[-1] - starts[0] == step * (len(starts) - 1) and len(set(starts)) in (1, len(starts)):
        return abs(step) * (count - 1) + length
    return max(starts) - min(starts) + length


@lru_cache(maxsize=64)
def _shapes(spec: ConvTranspose2dSpec) -> tuple[_Shape, ...]:
    """One for each band."""
    phases, starts = spec.axes[1].phases, row_starts(spec)
    bases = [phase.base if phase.taps else 0 for phase in phases]
    step, most_taps = phases[0].input_step, spec.axes[1].most_taps
    found = []
    for band in bands(spec):
        first, row_bases = band.phases[0], [phase.base for phase in band.phases]
        taps = band.taps if most_taps else 0
        found.append(
            _Shape(
                blocks=spec.input_shape[0] * spec.groups * len(band.phases),
                rows=band.rows,
                columns=spec.axes[1].widest,
                phases=len(phases),
                starts=column_starts(spec),
                row_taps=taps,
                most_taps=most_taps,
                all_taps=spec.axes[1].all_taps,
                kernel_rows=_range([starts[phase.residue] for phase in band.phases], taps, 1),
                row_reach=(taps - 1) * first.input_step + max(row_bases) - min(row_bases),
                column_reach=(most_taps - 1) * step + max(bases) - min(bases),
                offsets=len({phase.base - tap * step for phase in phases for tap in range(phase.taps)}),
            )
        )
    return tuple(found)


def part_bytes(spec: ConvTranspose2dSpec, layout: ThreadLayout) -> int:
    """Shared memory in which threads add up what they have summed of the same outputs."""
    shared = layout.depth_threads > 1
    return layout.threads * layout.sums * DTYPE_BYTES[spec.accumulator_dtype] if shared else 0


def shared_bytes(spec: ConvTranspose2dSpec, layout: ThreadLayout) -> int:
    """Upper bound of the shared memory that a block takes, in whichever band takes most."""
    values = max((shape.stage_values(layout) for shape in _shapes(spec) if shape.row_taps), default=0)
    return values * layout.ci_block * DTYPE_BYTES[spec.accumulator_dtype] + part_bytes(spec, layout)


def _band_cycles(spec: ConvTranspose2dSpec, layout: ThreadLayout, shape: _Shape, limits: Limits) -> float:
    value_bytes = DTYPE_BYTES[spec.accumulator_dtype]
    blocks = shape.blocks * layout.blocks(spec) * shape.tiles(layout)
    warps = -(-layout.threads // WARP)
    store = _store_cycles(spec, layout)
    if not shape.row_taps:
        return LAUNCH_CYCLES + -(-blocks // limits.processors) * store

    part = layout.phases / shape.phases
    offsets = shape.offsets if part == 1 else min(shape.offsets, shape.most_taps + layout.phases)
    operands = layout.channel_tile + layout.column_tile * offsets
    steps, channels = layout.steps(spec), layout.depth_block
    window, weights = shape.window_values(layout) * channels, shape.weight_values(layout) * channels
    vector = weight_vector(spec, layout)
    loads = -(-window // layout.threads), -(-weights // (layout.threads * vector))
    fetched = (loads[0] + loads[1] * vector) * value_bytes // 4
    ahead = layout.ci_block > 0 and steps > 1 and fetched <= MAX_FETCHED
    registers = value_bytes // 4 * (layout.sums + operands) + SPARE_REGISTERS + ahead * fetched
    resident = min(
        limits.blocks,
        limits.threads // (warps * WARP),
        limits.registers // (warps * WARP * registers),
        limits.shared_bytes // (shared_bytes(spec, layout) + RESERVED_SHARED_BYTES),
        -(-blocks // limits.processors),
    )
    if resident < 1:
        return inf

    read_vector = max(size for size in (4, 2, 1) if layout.channel_tile % size == 0)
    taps = shape.row_taps * part * shape.all_taps
    products = taps * layout.channel_tile * layout.column_tile
    weight_reads = taps * layout.channel_tile / read_vector
    window_reads = shape.row_taps * layout.column_tile * offsets
    per_read = 1 if layout.ci_block else CACHED_READ_INSTRUCTIONS
    # Lanes that work on different input channels read from different places.
    scattered = max(1, WARP * layout.depth_threads // layout.threads)
    cached = max(CACHED_READ_CYCLES, WARP // layout.column_threads)
    share = channels / layout.depth_threads
    issued = share * (products + weight_reads + window_reads * per_read)
    busy = warps * max(
        share * products * value_bytes / 4 * WARP / limits.lanes,
        issued / ISSUED_PER_CYCLE,
        share * (weight_reads + window_reads) * scattered * (1 if layout.ci_block else cached),
    )
    traffic = (window + weights) * value_bytes / CACHE_BYTES_PER_CYCLE
    if layout.ci_block:
        copying = loads[0] * STAGED_VALUE_INSTRUCTIONS + loads[1] * STAGED_VECTOR_INSTRUCTIONS
        issued += copying
        busy += max(warps * copying / ISSUED_PER_CYCLE, traffic)
        latency = GLOBAL_LATENCY * (1 if ahead else sum(-(-count // BATCH) for count in loads))
    else:
        busy = max(busy, traffic)
        latency = CACHE_LATENCY
    alone = issued * CYCLES_ALONE
    step = max(resident * busy, max(alone, latency) if ahead else max(alone, busy) + latency)
    if layout.depth_threads > 1:
        added = layout.threads * layout.sums / WARP
        store += 2 * added + PART_LATENCY
    waves = -(-blocks // (resident * limits.processors))
    return LAUNCH_CYCLES + GLOBAL_LATENCY + waves * (steps * step + resident * store)


def _store_cycles(spec: ConvTranspose2dSpec, layout: ThreadLayout) -> float:
    """Cycles for a block's outputs, the sums of all its threads ready.

    A warp's store goes to the second cache by sectors, those that it fills in part also.
    """
    size = DTYPE_BYTES[spec.dtype]
    outputs = layout.threads // layout.depth_threads * layout.sums
    if layout.depth_threads > 1:
        run, apart = layout.column_block * layout.phases, spec.stride[1] // layout.phases
    else:
        run, apart = layout.column_threads, spec.stride[1]
    run = min(run, WARP)
    sectors = WARP / run * min(run, (run * apart * size - 1) / SECTOR_BYTES + 1)
    if layout.phases < spec.stride[1]:
        sectors *= UNJOINED
    return (
        outputs
        / WARP
        * max(STORE_INSTRUCTIONS / ISSUED_PER_CYCLE, sectors * SECTOR_CYCLES, WARP * size / BYTES_PER_CYCLE)
    )


def grid_cycles(spec: ConvTranspose2dSpec, layout: ThreadLayout, target: Target) -> float:
    """Estimated cycles for all bands, one launch each, on the newest architecture of `target`."""
    limits = ARCHITECTURES[target.gpu_archs[-1]]
    return sum(_band_cycles(spec, layout, shape, limits) for shape in _shapes(spec))


def powers(extent: int, limit: int) -> Sequence[int]:
    """Powers of two up to `limit`, as far as the one that covers `extent`."""
    return [1 << shift for shift in range(limit.bit_length()) if shift == 0 or 1 << (shift - 1) < extent]


def _channel_tiles(channels: int) -> Sequence[int]:
    """Powers of two, and what divides the channels into as few parts without surplus."""
    tiles = powers(channels, MAX_TILE)
    return sorted({*tiles, *(-(-channels // -(-channels // tile)) for tile in (*tiles, MAX_TILE + MAX_TILE // 2))})


def _phase_blocks(spec: ConvTranspose2dSpec, tile: int) -> Sequence[int]:
    """The largest divisor of the number of column phases whose sums fit a thread, if any does."""
    phases, scale = len(spec.axes[1].phases), DTYPE_BYTES[spec.accumulator_dtype] // 4
    fitting = [size for size in range(1, phases + 1) if phases % size == 0 and size * tile * scale <= MAX_SUMS]
    return fitting[-1:]


def thread_layouts(spec: ConvTranspose2dSpec, target: Target, *, staged: bool) -> Iterator[ThreadLayout]:
    """Layouts whose threads, sums and shared memory are within an architecture's limits."""
    channels, one = spec.co // spec.groups, spec.with_batch(1)
    height, width = (axis.widest for axis in spec.axes)
    for channel_tile, column_tile in product(_channel_tiles(channels), powers(width, MAX_TILE)):
        threads = product(
            powers(-(-channels // channel_tile), MAX_THREADS),
            powers(height, MAX_ROWS),
            powers(-(-width // column_tile), WARP),
        )
        for phases in _phase_blocks(spec, channel_tile * column_tile):
            for channel_threads, rows, column_threads in threads:
                count = channel_threads * rows * column_threads
                if count > MAX_THREADS:
                    continue
                layout = ThreadLayout(
                    lanes="ow",
                    co_block=channel_threads * channel_tile,
                    row_block=rows,
                    column_block=column_threads * column_tile,
                    vector_lanes=1,
                    row_chunk=rows,
                    channel_threads=channel_threads,
                    column_threads=column_threads,
                    phases=phases,
                    ci_block=0,
                )
                for depth_threads in _depths(one, layout, target):
                    if count * depth_threads >= min(WARP, channels * height * width):
                        split = replace(layout, depth_threads=depth_threads)
                        yield from _stages(spec, split) if staged else (split,)


def _depths(one: ConvTranspose2dSpec, layout: ThreadLayout, target: Target) -> Iterator[int]:
    """How many threads may share input channels: several where the others of `one` image leave multiprocessors idle."""
    yield 1
    limits = ARCHITECTURES[target.gpu_archs[-1]]
    blocks = max(shape.blocks * shape.tiles(layout) for shape in _shapes(one)) * layout.blocks(one)
    if blocks * layout.threads > limits.processors * FILLING_THREADS // 2:
        return
    for threads in SPLIT_THREADS:
        split = replace(layout, depth_threads=threads // layout.threads)
        shares = 1 < split.depth_threads <= min(MAX_DEPTH_THREADS, one.ci // one.groups)
        if shares and part_bytes(one, split) <= SHARED_BYTES:
            yield split.depth_threads


def _stages(spec: ConvTranspose2dSpec, layout: ThreadLayout) -> Iterator[ThreadLayout]:
    """The layout with about as many channels in a stage as each of `STAGE_BYTES` holds, in steps of equal size."""
    channels, depth = spec.ci // spec.groups, layout.depth_threads
    parts = part_bytes(spec, layout)
    one = shared_bytes(spec, replace(layout, ci_block=1)) - parts
    found = set()
    for limit in STAGE_BYTES:
        most = min(limit, SHARED_BYTES - 64 - parts) // max(one, 1) // depth * depth
        if most > 0:
            steps = -(-channels // most)
            found.add(min(most, -(-channels // (steps * depth)) * depth))
    for size in sorted(found):
        yield replace(layout, ci_block=size)
