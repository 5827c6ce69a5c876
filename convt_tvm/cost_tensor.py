"""Estimated cost of matrix products on tensor cores: the counterpart of `convt_tvm.cost_cuda`, whose model it shares.

A step of a block is one stage: some input channels of its window, and their weights of all taps. It keeps the
multiprocessor busy for the largest of

- its products, at the rate of the tensor cores, those of surplus positions, channels and border columns included,
- what it moves in and out of shared memory, 96 bytes a cycle,
- its instructions, four a cycle, of which copying to shared memory takes most,
- what it fetches from the second cache.

A block alone takes longer: it waits for global memory, unless it has fetched the stage during the one before, and its
warps work through their products one after the other. Blocks of a multiprocessor overlap. The rates are NVIDIA's
published ones; the latencies, and the rates of shared memory, were fitted to what an H200 took. By
``tuning_logs/bench/cuda-sm_90-NVIDIA-H200.jsonl`` the default takes 1.07 times as long as the tuned kernel in tf32,
1.06 in float16 and 1.10 in bfloat16, in the geometric mean of the public workloads; at worst 2.04 times, where threads
compute dcgan/1 by default.
"""

from collections.abc import Iterator
from itertools import product
from math import inf, prod

from convt_tvm.cost_cuda import (
    BYTES_PER_CYCLE,
    CACHE_BYTES_PER_CYCLE,
    ISSUED_PER_CYCLE,
    LAUNCH_CYCLES,
    RESERVED_SHARED_BYTES,
    SHARED_BYTES,
)
from convt_tvm.gpu import ARCHITECTURES, capability
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tensor_layout import FRAGMENT, WARP, WINDOW_SKEW, TensorLayout, fragment_depth, pitch_of, reaches_of
from convt_tvm.thread_layout import MAX_FETCHED, VECTOR_BYTES

__all__ = ["fits_tensor_cores", "tensor_cycles", "tensor_layouts", "tensor_shared_bytes"]

MAX_WARPS = 16
MAX_TILES = 16
"""Fragments of sums that a warp keeps: 8 registers each."""
MAX_PHASES = 8
STAGE_BYTES = (32, 64, 128, 256, 512)
"""Input channels of a stage, in their own dtype."""
COLUMNS = (16, 32, 64, 128)
"""Columns of a tile, besides all there are."""
LOAD_INSTRUCTIONS = 1.5
"""For a load of input values that are copied to shared memory: itself, and a share of coordinates and bounds; and one
for each value."""
COPY_INSTRUCTIONS = 8
"""For a vector of weights copied to shared memory."""
PRODUCT_INSTRUCTIONS = 2
"""For one product of fragments; a fragment's load is as many."""
STORE_INSTRUCTIONS = 10
"""For each output: bounds, bias, address, store; and as many sums as there are depths to load and add."""
SHARED_BYTES_PER_CYCLE = 96
READ_CYCLES = 4
"""For a warp's load of input values, in the unit that also serves shared memory."""
SECTOR_BYTES = 32
STAGE_LATENCY = 1000
"""Cycles from asking global memory for a stage until after the barrier."""
STEP_LATENCY = 30
"""Cycles from reading fragments until their first product is done; a warp's next step follows it."""
PRODUCT_CYCLES = 16
"""For a product of fragments on the quarter of a multiprocessor that a warp runs on."""
STORE_LATENCY = 75
"""Cycles for a fragment of each warp's sums: two barriers, and shared memory written and read."""
SUM_REGISTERS, OPERAND_REGISTERS = 8, 4
"""Of each lane, for a fragment."""
SPARE_REGISTERS = 40
"""Of a thread, besides sums and operands: addresses, loop counters, bounds."""
BLOCK_REGISTERS = 65536


def fits_tensor_cores(spec: ConvTranspose2dSpec, target: Target) -> bool:
    """Whether tensor cores multiply the spec's dtype on every architecture of `target`, and a group fills fragments.

    float16 everywhere; bfloat16 from sm_80 on; float32 from there on where the target allows tf32.
    """
    oldest = capability(target.gpu_archs[0])
    fits = {"float16": True, "bfloat16": oldest >= (8, 0), "float32": target.allows_tf32 and oldest >= (8, 0)}
    channels = min(spec.ci, spec.co) // spec.groups
    return fits.get(spec.dtype, False) and channels >= FRAGMENT


def _skewed(length: int, skew: tuple[int, int]) -> int:
    """The distance of rows of `length` bytes: the next that is a multiple of the first of `skew` plus the second."""
    factor, offset = skew
    return length + (offset - length) % factor


def _stage_rows(spec: ConvTranspose2dSpec, layout: TensorLayout) -> int:
    """Rows of weights in a stage: taps of all phases times input channels."""
    rows, columns = reaches_of(spec)
    return rows.most_taps * columns.most_taps * layout.phases * layout.ci_block


def tensor_shared_bytes(spec: ConvTranspose2dSpec, layout: TensorLayout) -> int:
    """Shared memory that a block takes for one stage of inputs and weights, and for a fragment of each warp's sums."""
    size = DTYPE_BYTES[spec.dtype]
    inputs = layout.window_positions(spec) * _skewed(layout.ci_block * size, WINDOW_SKEW)
    weights = _stage_rows(spec, layout) * _skewed(layout.co_block * size, layout.weights_skew(spec))
    sums = layout.warps * FRAGMENT * FRAGMENT * 4 + layout.depth_warps * layout.phases * layout.sums_skew * 4
    return -(-inputs // 64) * 64 + -(-weights // 64) * 64 + sums


def _fetched(spec: ConvTranspose2dSpec, layout: TensorLayout) -> int:
    """Registers of a thread for what it copies of a stage: a narrow load of the window has one as well."""
    size, threads = DTYPE_BYTES[spec.dtype], layout.warps * WARP
    vector = VECTOR_BYTES // size
    window, weights = layout.window_positions(spec) * layout.ci_block, _stage_rows(spec, layout) * layout.co_block
    loads = -(-window // (vector * layout.loaded) // threads) * vector
    return loads * max(1, layout.loaded * size // 4) + -(-weights // vector // threads) * 4


def _registers(spec: ConvTranspose2dSpec, layout: TensorLayout) -> int:
    """Of a thread, about: sums, operands, and what it fetches of the next stage."""
    operands = (layout.channel_tiles + 1) * OPERAND_REGISTERS
    fetched = min(_fetched(spec, layout), MAX_FETCHED) if layout.steps(spec) > 1 else 0
    return layout.channel_tiles * layout.position_tiles * SUM_REGISTERS + operands + fetched + SPARE_REGISTERS


def tensor_cycles(spec: ConvTranspose2dSpec, layout: TensorLayout, target: Target) -> float:
    """Estimated cycles on the newest architecture of `target`."""
    limits, size = ARCHITECTURES[target.gpu_archs[-1]], DTYPE_BYTES[spec.dtype]
    rows, columns = reaches_of(spec)
    phases = len(rows.taps) * (len(columns.taps) // layout.phases)
    blocks = spec.input_shape[0] * spec.groups * phases * prod(layout.tiles(spec)) * layout.blocks(spec)
    most = rows.most_taps * columns.most_taps
    met = sum(rows.taps) * sum(columns.taps) / (len(rows.taps) * len(columns.taps))
    threads = layout.warps * WARP
    resident = min(
        limits.blocks,
        limits.threads // threads,
        limits.registers // (threads * _registers(spec, layout)),
        limits.shared_bytes // (tensor_shared_bytes(spec, layout) + RESERVED_SHARED_BYTES),
        -(-blocks // limits.processors),
    )

    if resident < 1:
        return inf
    tiles = layout.channel_tiles * layout.position_tiles
    depths = layout.ci_block // fragment_depth(spec) // layout.depth_warps
    sums = layout.phases * layout.co_block * layout.positions
    gathered = layout.window_positions(spec) * layout.ci_block
    loads = gathered / WARP / layout.loaded
    copied = _stage_rows(spec, layout) * layout.co_block
    products = met * depths * layout.warps
    fragments = layout.channel_tiles + layout.position_tiles
    copying = loads * LOAD_INSTRUCTIONS + gathered / WARP + copied * size / 16 / WARP * COPY_INSTRUCTIONS
    in_shared = products * (layout.channel_tiles + layout.position_tiles) * FRAGMENT * 32
    runs = -(-layout.window_positions(spec) // (spec.iw if layout.pitch(spec) >= spec.iw else layout.pitch(spec)))
    fetched = (gathered + copied) * size + (layout.ci_block * runs * SECTOR_BYTES if runs > 1 else 0)
    busy = max(
        sums * met * layout.ci_block * size / 2 / limits.tensor_lanes,
        (products * (tiles + fragments) * PRODUCT_INSTRUCTIONS + copying) / ISSUED_PER_CYCLE,
        (in_shared + (gathered + copied) * size) / SHARED_BYTES_PER_CYCLE + loads * READ_CYCLES,
        fetched / CACHE_BYTES_PER_CYCLE,
    )
    working = busy / 2 + most * depths * (STEP_LATENCY + tiles * PRODUCT_CYCLES * size / 2)
    ahead = layout.steps(spec) > 1 and _fetched(spec, layout) <= MAX_FETCHED
    alone = max(working, STAGE_LATENCY) if ahead else working + STAGE_LATENCY

    outputs = layout.phases * layout.co_block * layout.row_block * layout.column_block
    spread = spec.stride[1] / layout.phases
    issued = sums / WARP * (STORE_INSTRUCTIONS + 2 * layout.depth_warps) / ISSUED_PER_CYCLE
    sectors = outputs * size * min(spread, SECTOR_BYTES / size)
    store = issued + max(outputs * size / BYTES_PER_CYCLE, sectors / CACHE_BYTES_PER_CYCLE)
    waves = -(-blocks // (resident * limits.processors))
    reading = layout.steps(spec) * max(resident * busy, alone)
    return LAUNCH_CYCLES + waves * (reading + max(resident * store, tiles * STORE_LATENCY))


def tensor_layouts(spec: ConvTranspose2dSpec) -> Iterator[TensorLayout]:
    """Layouts whose threads, registers and shared memory are within an architecture's limits."""
    channels, in_channels = spec.co // spec.groups, spec.ci // spec.groups
    size, depth = DTYPE_BYTES[spec.dtype], fragment_depth(spec)
    count = len(spec.axes[1].phases)
    joined = max(phases for phases in range(1, MAX_PHASES + 1) if count % phases == 0)
    stages = [stage // size for stage in STAGE_BYTES if stage // size < in_channels + depth]
    warps = product((1, 2, 4), (1, 2, 4), sorted({1, joined}), (1, 2, 4, 8))
    for channel_warps, position_warps, phases, depth_warps in warps:
        if channel_warps * position_warps * phases * depth_warps > MAX_WARPS:
            continue
        for channel_tiles, position_tiles in product((1, 2, 4), (1, 2, 4)):
            co_block, positions = channel_tiles * channel_warps * FRAGMENT, position_tiles * position_warps * FRAGMENT
            if channel_tiles * position_tiles > MAX_TILES or (co_block >= 2 * channels and co_block > FRAGMENT):
                continue
            for row_block, column_block, loaded in _tiles(spec, positions):
                for ci_block in stages:
                    if ci_block % (depth_warps * depth):
                        continue
                    layout = TensorLayout(
                        lanes="ow",
                        co_block=co_block,
                        row_block=row_block,
                        column_block=column_block,
                        vector_lanes=1,
                        row_chunk=row_block,
                        phases=phases,
                        positions=positions,
                        channel_warps=channel_warps,
                        position_warps=position_warps,
                        depth_warps=depth_warps,
                        ci_block=ci_block,
                        loaded=loaded,
                    )
                    registers = min(255, BLOCK_REGISTERS // (layout.warps * WARP))
                    if tensor_shared_bytes(spec, layout) <= SHARED_BYTES and _registers(spec, layout) <= registers:
                        yield layout


def _tiles(spec: ConvTranspose2dSpec, positions: int) -> Iterator[tuple[int, int, int]]:
    """Rows and columns of tiles that so many positions cover, and half as many would not, widest first; and `loaded`.

    One at a time is left out where two cost nothing. Of places that phases shift by uneven steps TVM cannot tell which
    words they are in.
    """
    height, width = (axis.widest for axis in spec.axes)
    in_pairs = spec.iw % 2 == 0 and reaches_of(spec)[1].shift_step is not None
    for columns in sorted({width, *(size for size in COLUMNS if size < width)}, reverse=True):
        pairs = in_pairs and (columns == width or columns % 2 == 0)
        for loaded in (2, 1) if pairs else (1,):
            pitch = pitch_of(spec, columns, loaded)
            rows = min(height, (positions - columns) // pitch + 1)
            if rows < 1 or (loaded == 1 and pairs and pitch == pitch_of(spec, columns, 2)):
                continue
            rows = -(-height // -(-height // rows))
            if positions == FRAGMENT or (rows - 1) * pitch + columns > positions // 2:
                yield rows, columns, loaded
