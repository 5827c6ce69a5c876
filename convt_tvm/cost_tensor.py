"""Estimated cost of matrix products on tensor cores: the counterpart of `convt_tvm.cost_cuda`, whose model it shares.

A step of a block is one stage: input channels of one tap. It keeps the multiprocessor busy for the largest of

- its products, at the rate of the tensor cores,
- its reads of fragments from shared memory, 128 bytes a cycle,
- its instructions, four a cycle, of which copying to shared memory takes most,

and it waits for global memory meanwhile. The rates are NVIDIA's published ones; none was measured by this project.
"""

from collections.abc import Iterator
from itertools import product

from convt_tvm.cost_cuda import (
    BYTES_PER_CYCLE,
    CACHE_BYTES_PER_CYCLE,
    GLOBAL_LATENCY,
    ISSUED_PER_CYCLE,
    LAUNCH_CYCLES,
    MAX_REGISTERS,
    RESERVED_SHARED_BYTES,
    SHARED_BYTES,
    SPARE_REGISTERS,
    STORE_INSTRUCTIONS,
    powers,
)
from convt_tvm.gpu import ARCHITECTURES, Limits, capability
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tensor_layout import FRAGMENT, SKEW_BYTES, WARP, Patch, TensorLayout, fragment_depth, patches

__all__ = ["fits_tensor_cores", "tensor_cycles", "tensor_layouts", "tensor_shared_bytes"]

MAX_WARPS = 8
MAX_TILES = 8
"""Fragments of sums that a warp keeps: 8 registers each."""
STAGE_BYTES = (32, 64, 128)
"""Input channels of a stage, in their own dtype."""
MAX_COLUMNS = 64
GATHERED_INSTRUCTIONS = 2.5
"""For an input value copied to shared memory: its load, and a share of coordinates, bounds and a vector's store."""
COPY_INSTRUCTIONS = 8
"""For a vector of weights copied to shared memory."""
PRODUCT_INSTRUCTIONS = 2
"""For one product of fragments; a fragment's load is as many."""
SHARED_BYTES_PER_CYCLE = 128
SECTOR_BYTES = 32
"""What is moved of a row too much, at both ends together: memory moves whole sectors."""
FRAGMENT_REGISTERS = 8
"""Of each lane, for 16 x 16 sums, and for as many 16-bit operands: wmma keeps those twice."""


def fits_tensor_cores(spec: ConvTranspose2dSpec, target: Target) -> bool:
    """Whether tensor cores multiply the spec's dtype on every architecture of `target`, and a group fills fragments.

    float16 everywhere; bfloat16 from sm_80 on; float32 from there on where the target allows tf32.
    """
    oldest = capability(target.gpu_archs[0])
    fits = {"float16": True, "bfloat16": oldest >= (8, 0), "float32": target.allows_tf32 and oldest >= (8, 0)}
    channels = min(spec.ci, spec.co) // spec.groups
    return fits.get(spec.dtype, False) and channels >= FRAGMENT


def tensor_shared_bytes(spec: ConvTranspose2dSpec, layout: TensorLayout) -> int:
    """Shared memory that a block takes for one stage of inputs and weights, and for a fragment of each warp's sums."""
    size = DTYPE_BYTES[spec.dtype]
    inputs = layout.positions * (layout.ci_block * size + SKEW_BYTES)
    weights = layout.ci_block * (layout.co_block * size + SKEW_BYTES)
    sums = layout.warps * FRAGMENT * FRAGMENT * 4
    return inputs + weights + sums


def _registers(layout: TensorLayout) -> int:
    """Of a thread, about."""
    tiles = layout.channel_tiles * layout.position_tiles + layout.channel_tiles + layout.position_tiles
    return tiles * FRAGMENT_REGISTERS + SPARE_REGISTERS + 24


def _patch_cycles(spec: ConvTranspose2dSpec, layout: TensorLayout, patch: Patch, limits: Limits) -> float:
    size, depth = DTYPE_BYTES[spec.dtype], fragment_depth(spec)
    tiles = layout.rows(patch.band) // layout.row_block * (layout.patch_columns(patch) // layout.column_block)
    phases = len(patch.band.phases) * len(patch.columns)
    blocks = spec.input_shape[0] * spec.groups * phases * tiles * layout.blocks(spec)
    sums = layout.co_block * layout.positions
    # Rows that a tile holds whole follow each other in memory.
    runs = 1 if layout.column_block >= spec.iw else layout.row_block
    written = layout.co_block * (layout.positions * size * spec.stride[1] + runs * SECTOR_BYTES)
    store = max(
        sums / WARP * STORE_INSTRUCTIONS / ISSUED_PER_CYCLE,
        sums * size / BYTES_PER_CYCLE,
        written / CACHE_BYTES_PER_CYCLE,
    )
    if not patch.taps:
        return LAUNCH_CYCLES + -(-blocks // limits.processors) * store
    resident = min(
        limits.blocks,
        limits.threads // (layout.warps * WARP),
        limits.registers // (layout.warps * WARP * _registers(layout)),
        limits.shared_bytes // (tensor_shared_bytes(spec, layout) + RESERVED_SHARED_BYTES),
        -(-blocks // limits.processors),
    )
    depths = layout.ci_block // depth
    fragments = layout.channel_tiles + layout.position_tiles
    products = layout.channel_tiles * layout.position_tiles
    gathered, copied = layout.positions * layout.ci_block, layout.co_block * layout.ci_block
    copying = gathered / WARP * GATHERED_INSTRUCTIONS + copied * size / 16 / WARP * COPY_INSTRUCTIONS
    issued = depths * layout.warps * (products + fragments) * PRODUCT_INSTRUCTIONS + copying
    read = depths * layout.warps * fragments * FRAGMENT * depth * size
    busy = max(
        sums * layout.ci_block * size / 2 / limits.tensor_lanes,
        issued / ISSUED_PER_CYCLE,
        read / SHARED_BYTES_PER_CYCLE,
        ((gathered + copied) * size + layout.ci_block * runs * SECTOR_BYTES) / CACHE_BYTES_PER_CYCLE,
    )
    steps = patch.taps * layout.steps(spec)
    waves = -(-blocks // (resident * limits.processors))
    return LAUNCH_CYCLES + waves * (steps * max(resident * busy, busy + GLOBAL_LATENCY) + resident * store)


def tensor_cycles(spec: ConvTranspose2dSpec, layout: TensorLayout, target: Target) -> float:
    """Estimated cycles for all patches, one launch each, on the newest architecture of `target`."""
    limits = ARCHITECTURES[target.gpu_archs[-1]]
    return sum(_patch_cycles(spec, layout, patch, limits) for patch in patches(spec))


def tensor_layouts(spec: ConvTranspose2dSpec) -> Iterator[TensorLayout]:
    """Layouts whose threads, registers and shared memory are within an architecture's limits."""
    channels, depth = spec.co // spec.groups, spec.ci // spec.groups
    height, width = (max(phase.count for phase in axis.phases) for axis in spec.axes)
    tiles = product((1, 2, 4), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8))
    for channel_tiles, position_tiles, channel_warps, position_warps in tiles:
        co_block = channel_tiles * channel_warps * FRAGMENT
        positions = position_tiles * position_warps * FRAGMENT
        if channel_tiles * position_tiles > MAX_TILES or channel_warps * position_warps > MAX_WARPS:
            continue
        if co_block >= 2 * channels and co_block > FRAGMENT:
            continue
        widths = powers(width, min(MAX_COLUMNS, positions))
        for columns in widths:
            rows = positions // columns
            if rows >= 2 * height and (columns < widths[-1] or positions > FRAGMENT):
                continue
            for ci_block in (size // DTYPE_BYTES[spec.dtype] for size in STAGE_BYTES):
                layout = TensorLayout(
                    lanes="ow",
                    co_block=co_block,
                    row_block=rows,
                    column_block=columns,
                    vector_lanes=1,
                    row_chunk=rows,
                    channel_warps=channel_warps,
                    position_warps=position_warps,
                    ci_block=ci_block,
                )
                fits = _registers(layout) <= MAX_REGISTERS and tensor_shared_bytes(spec, layout) <= SHARED_BYTES
                if fits and ci_block < depth + FRAGMENT:
                    yield layout
