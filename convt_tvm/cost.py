"""Estimated cost of a register-tiled phase form: the rule that picks a default schedule without a search.

The innermost loops of every CPU schedule here are an outer product: `Tile.vectors` vectors times `Tile.broadcasts`
scalars are multiplied and added into as many accumulators, for each kernel tap and input channel. A core that issues
two vector multiply-adds a cycle, with a latency of four cycles, needs for one such step at least

- half a cycle for each multiply-add,
- two thirds of a cycle for each load, one per vector and one per scalar,
- the time in which its vectors stream from the second cache, if no other step reads the same,
- four cycles over the number of column phases worked on together, since a sum waits for the one before it.

The cost of a layout is its number of steps, surplus lanes and columns included, times the largest of these, plus what
it costs to bring in the input, to write the output, and to read from beyond the second cache. Cycles are good for
ranking layouts of one workload on one core, and for nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from convt_tvm.layout import Layout, bands
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = [
    "Costs",
    "Tile",
    "band_cycles",
    "block_sizes",
    "blocks_outermost",
    "core_cycles",
    "lane_counts",
    "phase_block",
]

FMA_PER_CYCLE = 2
LOADS_PER_CYCLE = 1.5
"""Of the two or three that a core can issue, what is left beside multiply-adds (pose/2: tiles of 1 x 24 and 2 x 12)."""
FMA_LATENCY = 4
LANES_PER_CYCLE = 32
"""Multiply-adds of single lanes, for telling large layers from small ones: those of AVX-512 in float32."""
CACHE_BYTES = 1 << 20
"""Size of the second cache to rely on: that of a server core; half of a core of this project's measurements."""
MISS_BYTES_PER_CYCLE = 7
"""What one core reads from beyond the second cache: 18 GB/s at 2.7 GHz on an Emerald Rapids server."""
STREAM_BYTES_PER_CYCLE = 32
"""What it reads from the second cache while it computes; 48 when it does nothing else."""
STALL_BYTES_PER_CYCLE = 128
"""What of that is not hidden: 13 % at 16 bytes a cycle (dilated/k3d2, 8 against 10 channels in a block)."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The accumulators of one column phase: ``vectors`` along the lanes times ``broadcasts`` across them."""

    vectors: int
    broadcasts: int

    def fits(self, target: Target, phases: int = 1) -> bool:
        """Whether the accumulators of so many column phases leave registers for one row of vectors and one scalar."""
        return self.vectors * self.broadcasts * phases + self.vectors + 1 <= target.vector_registers

    def step_cycles(self, target: Target, phases: int, reuse: int) -> float:
        """Cycles for one tap of one input channel in one column phase.

        `phases` column phases are worked on together, and `reuse` such steps read the same vectors.
        """
        products = self.vectors * self.broadcasts
        streamed_bytes = self.vectors * target.vector_bytes / reuse
        limit = max(
            products / FMA_PER_CYCLE,
            (self.vectors + self.broadcasts) / LOADS_PER_CYCLE,
            FMA_LATENCY / phases,
            streamed_bytes / STREAM_BYTES_PER_CYCLE,
        )
        return limit + streamed_bytes / STALL_BYTES_PER_CYCLE


@dataclass(frozen=True, slots=True)
class Costs:
    """What a schedule pays besides its sums: for bringing one input value into the window, and writing one output."""

    cycles_per_input: float
    cycles_per_output: float


def lane_counts(spec: ConvTranspose2dSpec, target: Target) -> tuple[int, ...]:
    """Vector lengths to choose from, in accumulators: the full vector, its half and its quarter."""
    full = target.vector_bytes // DTYPE_BYTES[spec.accumulator_dtype]
    return tuple(full >> shift for shift in range(3) if full >> shift >= 2)


def phase_block(spec: ConvTranspose2dSpec, target: Target, tile: Tile) -> int:
    """How many column phases to work on together: the largest divisor of their number whose accumulators fit."""
    phases = len(spec.axes[1].phases)
    return max((k for k in range(1, phases + 1) if phases % k == 0 and tile.fits(target, k)), default=1)


def blocks_outermost(spec: ConvTranspose2dSpec, layout: Layout) -> bool:
    """Whether to run over all rows for one block of channels, and not over all blocks for one row.

    The first reads the image once for each block, the second the weights once for each row; whichever fits the second
    cache is read again from there. Of what does not fit, the choice moves less.
    """
    return _block_traffic(spec, layout) <= _row_traffic(spec, layout)


def _weight_bytes(spec: ConvTranspose2dSpec) -> int:
    return prod(spec.weight_shape) * DTYPE_BYTES[spec.accumulator_dtype]


def _image_bytes(spec: ConvTranspose2dSpec) -> int:
    return spec.ci * spec.ih * spec.iw * DTYPE_BYTES[spec.accumulator_dtype]


def _block_traffic(spec: ConvTranspose2dSpec, layout: Layout) -> int:
    """Bytes from beyond the second cache when blocks of channels are the outer loop."""
    image, weights = _image_bytes(spec), _weight_bytes(spec)
    repeats = 1 if image <= CACHE_BYTES else layout.blocks(spec) * sum(len(band.phases) for band in bands(spec))
    return spec.n * (image * repeats + weights)


def _row_traffic(spec: ConvTranspose2dSpec, layout: Layout) -> int:
    """Bytes from beyond the second cache when rows are the outer loop."""
    image, weights = _image_bytes(spec), _weight_bytes(spec)
    repeats = 1 if weights <= CACHE_BYTES else max(layout.rows(band) // layout.row_block for band in bands(spec))
    return spec.n * (image + weights * repeats)


def band_cycles(spec: ConvTranspose2dSpec) -> float:
    """Roughly what all bands cost one core: multiply-adds, one cycle for each output, and the weights from memory."""
    sums = spec.multiply_adds / LANES_PER_CYCLE
    return sums + prod(spec.output_shape) + _weight_bytes(spec) / MISS_BYTES_PER_CYCLE


def core_cycles(
    spec: ConvTranspose2dSpec, layout: Layout, tile: Tile, target: Target, *, phases: int, reuse: int, costs: Costs
) -> float:
    """Estimated cycles of one core for `spec` in `layout`; see `Tile.step_cycles` for `phases` and `reuse`."""
    column_taps = sum(phase.taps for phase in spec.axes[1].phases)
    tile_rows = sum(len(band.phases) * layout.rows(band) // layout.row_block * band.taps for band in bands(spec))
    tile_columns = layout.columns(spec) // layout.column_block
    blocks = spec.n * spec.groups * layout.blocks(spec)
    steps = blocks * tile_rows * tile_columns * column_taps * (spec.ci // spec.groups)
    return (
        steps * tile.step_cycles(target, phases, reuse)
        + prod(spec.input_shape) * costs.cycles_per_input
        + prod(spec.output_shape) * costs.cycles_per_output
        + min(_block_traffic(spec, layout), _row_traffic(spec, layout)) / MISS_BYTES_PER_CYCLE
    )


def block_sizes(extent: int, limit: int) -> Iterable[int]:
    """Block sizes up to `limit` that differ in the number of blocks of `extent`, each the smallest for its number."""
    seen = set()
    for size in range(min(extent, limit), 0, -1):
        count = -(-extent // size)
        if count not in seen:
            seen.add(count)
            yield -(-extent // count)
