"""How a phase form is laid out as matrix products for a GPU's tensor cores: integers in, integers out.

The outputs of one row phase and one column phase are a matrix product: weights of ``K = taps * input channels`` by
output channels, times inputs of ``K`` by positions. A thread block computes several column phases, each with products
of its own, from one window of the input.

Positions of a tile are numbered through the rows of that window, those beside the tile's columns included: with
``pitch`` columns in a row, position ``p`` is column ``p % pitch`` of row ``p // pitch``. What a tap reads is then at
``p`` plus a constant of the tap, whatever the tile's width, and any 16 neighbouring positions are one operand of a
product. The sums of positions beside the tile are dropped.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from convt_tvm.layout import Layout
from convt_tvm.phases import Axis
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

__all__ = [
    "FRAGMENT",
    "TAPS",
    "WARP",
    "WINDOW_SKEW",
    "Reach",
    "TensorLayout",
    "fragment_depth",
    "margin_of",
    "pitch_of",
    "reaches_of",
]

FRAGMENT = 16
"""Channels and positions that one warp-level product computes."""
WARP = 32
WINDOW_SKEW = (32, 16)
"""How far positions of a window in shared memory are apart, in bytes: a multiple of the first, plus the second.

Every position may begin a fragment, which is read by eight of them at a time, 16 bytes each: all in different banks.
"""
TAPS = "convt.taps"
"""Annotation of the loops over taps of ``rows`` and of ``columns``, of which not every phase has all."""


def fragment_depth(spec: ConvTranspose2dSpec) -> int:
    """Products that one warp-level product sums: 16 of 16-bit values, 8 of tf32."""
    return 32 // DTYPE_BYTES[spec.dtype]


@dataclass(frozen=True, slots=True)
class Reach:
    """What the phases of one axis read, as blocks need it that compute the same number of taps for each phase.

    Tap ``u`` of phase ``a`` reads input ``q + first + shifts[a] + (most_taps - 1 - u) * step``, where ``first`` and no
    shift depends on the tap. A phase has ``taps[a]`` of them, and where it has none a shift that means nothing.
    """

    first: int
    shifts: tuple[int, ...]
    taps: tuple[int, ...]
    most_taps: int
    step: int

    @property
    def tap_span(self) -> int:
        """How far the taps of one phase are apart."""
        return (self.most_taps - 1) * self.step

    @property
    def shift_step(self) -> int | None:
        """By how much each phase is shifted against the one before; None if that varies."""
        steps = {after - before for before, after in pairwise(self.shifts)} or {0}
        return steps.pop() if len(steps) == 1 else None

    @property
    def span(self) -> int:
        """How far what all phases read for outputs of the same number is apart."""
        return max(self.shifts) + self.tap_span


@lru_cache(maxsize=64)
def reaches_of(spec: ConvTranspose2dSpec) -> tuple[Reach, Reach]:
    """The reach of rows and that of columns."""

    def reach(axis: Axis) -> Reach:
        phases, most_taps = axis.phases, max(1, axis.most_taps)
        lowest = min((phase.base for phase in phases if phase.taps), default=0)
        step = phases[0].input_step
        return Reach(
            first=lowest - (most_taps - 1) * step,
            shifts=tuple(phase.base - lowest if phase.taps else 0 for phase in phases),
            taps=tuple(phase.taps for phase in phases),
            most_taps=most_taps,
            step=step,
        )

    rows, columns = spec.axes
    return reach(rows), reach(columns)


def margin_of(spec: ConvTranspose2dSpec, loaded: int) -> int:
    """As `TensorLayout.margin`."""
    return reaches_of(spec)[1].first % loaded


def pitch_of(spec: ConvTranspose2dSpec, column_block: int, loaded: int) -> int:
    """As `TensorLayout.pitch`."""
    columns = column_block + reaches_of(spec)[1].span + margin_of(spec, loaded)
    return -(-columns // loaded) * loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout(Layout):
    """How a phase form is laid out for tensor cores.

    A thread block computes ``co_block`` channels of ``row_block`` rows of ``column_block`` columns, in one row phase
    and ``phases`` column phases. Weights are packed in the spec's own dtype, by phases, each with as many taps as the
    phase that has most, input channels filled up to whole stages; what there is none of is zeros.

    Parameters
    ----------
    positions
        Positions that a block computes, those beside its tile included: what covers the tile, in whole fragments.
    channel_warps, position_warps, depth_warps
        Warps that share a block's channels of one phase, its positions, and the input channels of a stage, whose sums
        are then added up. Each phase has its own.
    ci_block
        Input channels that are staged in shared memory at a time, for all taps; a multiple of `fragment_depth` for
        each of ``depth_warps``.
    loaded
        Neighbouring columns of the input that a lane loads at once, 1 or 2, both inside of the image or both outside:
        the image has an even number of columns, and so have windows, which begin at even ones.
    """

    positions: int
    channel_warps: int
    position_warps: int
    depth_warps: int
    ci_block: int
    loaded: int

    @property
    def warps(self) -> int:
        """Warps in a block."""
        return self.depth_warps * self.phases * self.channel_warps * self.position_warps

    @property
    def channel_tiles(self) -> int:
        """Fragments of channels that one warp computes."""
        return self.co_block // FRAGMENT // self.channel_warps

    @property
    def position_tiles(self) -> int:
        """Fragments of positions that one warp computes."""
        return self.positions // FRAGMENT // self.position_warps

    @property
    def shape(self) -> tuple[object, ...]:
        """As in `Layout`."""
        return self.channel_tiles, self.position_tiles, self.phases, self.warps, self.depth_warps

    @property
    def sum_order(self) -> tuple[object, ...]:
        """The type, and how many parts a sum has."""
        return type(self), self.depth_warps

    @property
    def sums_skew(self) -> int:
        """Sums that those of each phase are apart in shared memory, besides whole turns of its 32 banks."""
        return max(8, 32 // self.phases) if self.phases > 1 else 0

    def weights_skew(self, spec: ConvTranspose2dSpec) -> tuple[int, int]:
        """How far rows of weights in shared memory are apart, in bytes: a multiple of the first, plus the second.

        A fragment is read by eight rows at a time, 16 bytes each, or of tf32 by four, eight words each: all in
        different banks. The shortest rows are left as they are, where two of the eight share a bank, as half as much
        memory again would be lost.
        """
        size = DTYPE_BYTES[spec.dtype]
        if size == 4:
            return 64, 32
        return 32, 16 if self.co_block * size > 32 else 0

    def steps(self, spec: ConvTranspose2dSpec) -> int:
        """Stages of input channels."""
        return -(-(spec.ci // spec.groups) // self.ci_block)

    def pitch(self, spec: ConvTranspose2dSpec) -> int:
        """Columns in a row of the window of a tile."""
        return pitch_of(spec, self.column_block, self.loaded)

    def margin(self, spec: ConvTranspose2dSpec) -> int:
        """Columns of the window before the first that products read."""
        return margin_of(spec, self.loaded)

    def window_positions(self, spec: ConvTranspose2dSpec) -> int:
        """Positions of the window that the products of a block read, and those loaded along."""
        rows, columns = reaches_of(spec)
        positions = self.positions + rows.tap_span * self.pitch(spec) + columns.span + self.margin(spec)
        return -(-positions // self.loaded) * self.loaded

    def tiles(self, spec: ConvTranspose2dSpec) -> tuple[int, int]:
        """Tiles of rows and of columns that each phase has."""
        height, width = (axis.widest for axis in spec.axes)
        return -(-height // self.row_block), -(-width // self.column_block)

    def packed_shape(self, spec: ConvTranspose2dSpec) -> tuple[int, int, int, int, int]:
        """Shape of the packed weight: ``(groups * blocks, row phases * taps, column phases * taps, ci, co_block)``."""
        rows, columns = (len(reach.taps) * reach.most_taps for reach in reaches_of(spec))
        return spec.groups * self.blocks(spec), rows, columns, self.steps(spec) * self.ci_block, self.co_block

    def packed_dtype(self, spec: ConvTranspose2dSpec) -> str:
        """The dtype of the packed weight: what the products take."""
        return spec.dtype
