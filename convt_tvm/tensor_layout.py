"""How a phase form is laid out as matrix products for a GPU's tensor cores: integers in, integers out.

The outputs of one row phase and one column phase are a matrix product: weights of ``K = taps * input channels`` by
output channels, times inputs of ``K`` by positions. Phases with the same taps on both axes share one; see `patches`.
"""

from dataclasses import dataclass
from functools import lru_cache

from convt_tvm.layout import Band, Layout, bands
from convt_tvm.phases import Phase
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

__all__ = ["FRAGMENT", "SKEW_BYTES", "WARP", "Patch", "TensorLayout", "fragment_depth", "patches"]

FRAGMENT = 16
"""Channels and positions that one warp-level product computes."""
WARP = 32
SKEW_BYTES = 16
"""Between rows in shared memory: eight rows of 16 bytes, which a fragment is read by, then lie in different banks."""


def fragment_depth(spec: ConvTranspose2dSpec) -> int:
    """Products that one warp-level product sums: 16 of 16-bit values, 8 of tf32."""
    return 32 // DTYPE_BYTES[spec.dtype]


@dataclass(frozen=True, slots=True)
class Patch:
    """Row phases and column phases with the same number of taps on either axis: the outputs of one launch.

    ``first_columns`` has, for each column phase, its first kernel column in packed order.
    """

    index: int
    band: Band
    columns: tuple[Phase, ...]
    first_columns: tuple[int, ...]

    @property
    def column_taps(self) -> int:
        """Column taps of each of its phases."""
        return self.columns[0].taps

    @property
    def taps(self) -> int:
        """Kernel taps that reach an output; 0 where outputs hold the bias alone."""
        return self.band.taps * self.column_taps

    @property
    def width(self) -> int:
        """Columns in the widest of its column phases."""
        return max(phase.count for phase in self.columns)


@lru_cache(maxsize=64)
def patches(spec: ConvTranspose2dSpec) -> tuple[Patch, ...]:
    """Patches of `spec`, which together hold every output once."""
    grouped: dict[int, list[tuple[Phase, int]]] = {}
    before = 0
    for phase in spec.axes[1].phases:
        grouped.setdefault(phase.taps, []).append((phase, before))
        before += phase.taps
    pairs = [(band, group) for band in bands(spec) for group in grouped.values()]
    return tuple(
        Patch(index, band, tuple(phase for phase, _ in group), tuple(first for _, first in group))
        for index, (band, group) in enumerate(pairs)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout(Layout):
    """How a phase form is laid out for tensor cores.

    A thread block computes ``co_block`` channels of ``row_block`` rows of ``column_block`` columns of one phase of
    either axis. Weights are packed in the spec's own dtype, input channels filled up with zeros to whole stages.

    Parameters
    ----------
    channel_warps, position_warps
        Warps that share a block's channels, and its positions.
    ci_block
        Input channels of one tap that are staged in shared memory at a time; a multiple of `fragment_depth`.
    """

    channel_warps: int
    position_warps: int
    ci_block: int

    @property
    def warps(self) -> int:
        """Warps in a block."""
        return self.channel_warps * self.position_warps

    @property
    def positions(self) -> int:
        """Positions that a block computes."""
        return self.row_block * self.column_block

    @property
    def channel_tiles(self) -> int:
        """Fragments of channels that one warp computes."""
        return self.co_block // FRAGMENT // self.channel_warps

    @property
    def position_tiles(self) -> int:
        """Fragments of positions that one warp computes."""
        return self.positions // FRAGMENT // self.position_warps

    def steps(self, spec: ConvTranspose2dSpec) -> int:
        """Stages of input channels for each tap."""
        return -(-(spec.ci // spec.groups) // self.ci_block)

    def patch_columns(self, patch: Patch) -> int:
        """Columns computed in each column phase of `patch`."""
        return -(-patch.width // self.column_block) * self.column_block

    def packed_shape(self, spec: ConvTranspose2dSpec) -> tuple[int, int, int, int, int]:
        """Shape of the packed weight: ``(groups * blocks, kh, kw, whole stages of channels, co_block)``."""
        return spec.groups * self.blocks(spec), *spec.kernel_size, self.steps(spec) * self.ci_block, self.co_block

    def packed_dtype(self, spec: ConvTranspose2dSpec) -> str:
        """The dtype of the packed weight: what the products take."""
        return spec.dtype
