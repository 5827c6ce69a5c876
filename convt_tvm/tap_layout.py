"""How a phase form is laid out where channels are summed before taps: integers in, integers out, as in `layout`."""

from dataclasses import dataclass
from math import log, prod

from convt_tvm.layout import Layout, bands, met_taps, partial_length
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["TapLayout", "summed_channels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TapLayout(Layout):
    """How a phase form is laid out where channels are summed first, for each tap and each position of the image.

    That is a product of two matrices: the weights, with a row for each output channel and tap of a group, and the
    image, with a column for each of its positions. What it gives are values to gather, one of each tap that reaches an
    output. Positions are numbered through all rows of the image, so that vectors of them are full however narrow it is,
    and there is no border.

    Parameters
    ----------
    weight_rows
        Rows of the weights whose sums are in registers together.
    positions
        Positions whose sums are in registers together, in whole vectors. ``co_block``, ``column_block`` and
        ``vector_lanes`` say how outputs are gathered from these sums.
    """

    weight_rows: int
    positions: int

    @property
    def shape(self) -> tuple[object, ...]:
        """What matters most of a layout: the sums kept in registers."""
        return self.weight_rows, self.positions

    @property
    def skips_rows(self) -> bool:
        """There are no rows of a border to read."""
        return False

    def matrix_rows(self, spec: ConvTranspose2dSpec) -> int:
        """Rows of the weights of a group, with those of zeros that fill up the last tile."""
        return self.row_tiles(spec) * self.weight_rows

    def row_tiles(self, spec: ConvTranspose2dSpec) -> int:
        """Tiles of rows of the weights of a group."""
        return -(-(spec.co // spec.groups * prod(spec.kernel_size)) // self.weight_rows)

    def panels(self, spec: ConvTranspose2dSpec) -> int:
        """Tiles of positions of an image."""
        return -(-spec.ih * spec.iw // self.positions)

    def window_elements(self, spec: ConvTranspose2dSpec) -> int:
        """Number of values that are kept of the input, with zeros that fill up the last tile of positions."""
        return spec.input_shape[0] * spec.ci * self.panels(spec) * self.positions

    def packed_shape(self, spec: ConvTranspose2dSpec) -> tuple[int, int, int, int, int]:
        """Shape of the packed weight: ``(groups * row tiles, 1, 1, ci/groups, weight_rows)``."""
        return spec.groups * self.row_tiles(spec), 1, 1, spec.ci // spec.groups, self.weight_rows


def summed_channels(spec: ConvTranspose2dSpec) -> int:
    """Input channels that are summed in registers, which divide their number; see `layout.partial_sum`."""
    channels, taps = spec.ci // spec.groups, max(prod(met_taps(spec, band)) for band in bands(spec))
    if taps == 1:
        return channels
    goal = partial_length(channels * taps)
    sizes = (size for size in range(1, channels + 1) if channels % size == 0)
    return min(sizes, key=lambda size: abs(log(size / goal)))
