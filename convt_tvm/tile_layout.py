"""How a phase form is laid out for a processor's tile unit: integers in, integers out, as in `convt_tvm.layout`."""

from dataclasses import dataclass, replace

from convt_tvm.layout import Band, Layout, Window, bands
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["REGISTERS", "TILE_CHANNELS", "TILE_POSITIONS", "TILE_ROWS", "TileLayout"]

REGISTERS = 8
"""Tile registers of a core."""
TILE_ROWS = 16
"""Rows of a tile register, of 64 bytes each: output channels in sums and weights, pairs of input channels in images."""
TILE_POSITIONS = 16
"""Sums in float32 that a row holds."""
TILE_CHANNELS = 32
"""Input channels in bfloat16 that a row holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLayout(Layout):
    """How a phase form is laid out for a processor's tile unit.

    The positions of a phase are numbered through all rows: position ``q = row * pitch + column`` reads the image, whose
    rows are ``pitch`` apart as well, at ``q`` plus what the tap adds. Positions beyond a row's end are computed and
    dropped. So a tile is full however narrow the image is.

    Sums have a row for each channel and ``lanes`` run along positions (``ow``), which an image in pairs of channels is
    read for; or a row for each position and ``lanes`` along channels (``co``), where an image in NHWC is read as it is.

    Parameters
    ----------
    positions
        Positions whose sums are in registers together; a multiple of `TILE_POSITIONS`. ``column_block`` and
        ``vector_lanes`` say how sums are stored.
    """

    positions: int

    @property
    def skips_rows(self) -> bool:
        """A tile of positions reads the border of a row as well."""
        return False

    def skips_columns(self, spec: ConvTranspose2dSpec) -> bool:
        """As `skips_rows`."""
        return False

    @property
    def by_positions(self) -> bool:
        """Whether sums have a row for each position, and not for each channel."""
        return self.lanes == "co"

    @property
    def channel_tiles(self) -> int:
        """Tiles that share a block's channels."""
        return -(-self.co_block // TILE_ROWS)

    @property
    def tile_channels(self) -> int:
        """Channels in each of these."""
        return self.co_block // self.channel_tiles

    @property
    def position_tiles(self) -> int:
        """Tiles that share the positions whose sums are in registers together."""
        return self.positions // TILE_POSITIONS

    def steps(self, spec: ConvTranspose2dSpec) -> int:
        """Steps in which the input channels of a group are summed."""
        return -(-spec.ci // spec.groups // TILE_CHANNELS)

    def pairs(self, spec: ConvTranspose2dSpec) -> int:
        """Pairs of input channels in a step; those beyond the last channel hold zeros."""
        return -(-spec.ci // spec.groups // (2 * self.steps(spec)))

    def window(self, spec: ConvTranspose2dSpec) -> Window:
        """What the taps read for the columns of the output."""
        return Window.of(spec, replace(self, column_block=1, column_chunk=0))

    def pitch(self, spec: ConvTranspose2dSpec) -> int:
        """Values from one row of the image to the next: the border to the right of one is that to the left of the next.

        A column beyond the pitch is one of the next row, and has to lie in its border.
        """
        window = self.window(spec)
        left, right = window.columns_inside
        return max(1, right, window.width - left)

    def columns(self, spec: ConvTranspose2dSpec) -> int:
        """Number of columns computed in each column phase: whole chunks."""
        whole = self.column_chunk or self.column_block
        return -(-spec.axes[1].widest // whole) * whole

    def chunk_columns(self, spec: ConvTranspose2dSpec) -> int:
        """Columns in a chunk of columns; all where there are no such chunks."""
        return self.column_chunk or self.columns(spec)

    def chunks(self, spec: ConvTranspose2dSpec, band: Band) -> int:
        """Chunks in each row phase of `band`: of rows, times those of columns."""
        return self.rows(band) // self.chunk(band) * self.column_chunks(spec)

    def chunk_positions(self, spec: ConvTranspose2dSpec, band: Band) -> int:
        """Positions in a chunk of `band`, as far as its last row is stored."""
        return (self.chunk(band) - 1) * self.pitch(spec) + self.chunk_columns(spec)

    def chunk_tiles(self, spec: ConvTranspose2dSpec, band: Band) -> int:
        """Tiles of ``positions`` for these."""
        return -(-self.chunk_positions(spec, band) // self.positions)

    def image_rows(self, spec: ConvTranspose2dSpec) -> int:
        """Rows of the image kept, with zeros behind it for the last tile of positions to read."""
        window, pitch = self.window(spec), self.pitch(spec)
        return window.height + -(-(window.width + self.columns(spec) + self.positions) // pitch)

    def reads_input(self, spec: ConvTranspose2dSpec) -> bool:
        """Whether tiles of positions read the input itself: in NHWC, whole steps of channels, and nothing beyond it.

        The last tile of a chunk then ends with it: its first positions may be some of the tile before.
        """
        if not self.by_positions or spec.input_axes != "nhwc":
            return False
        window, whole = self.window(spec), 2 * self.pairs(spec) * self.steps(spec) == spec.ci // spec.groups
        last_column = max(phase.base for phase in spec.axes[1].phases)

        def end(band: Band) -> int:
            """The place behind the last one that is read."""
            first_row = self.rows(band) - self.chunk(band) + max(phase.base for phase in band.phases)
            first = first_row * spec.iw + self.columns(spec) - self.chunk_columns(spec)
            return first + max(self.positions, self.chunk_positions(spec, band)) + last_column

        inside = window.is_inside and (window.height, window.width) == (spec.ih, spec.iw)
        return whole and inside and max(map(end, bands(spec))) <= spec.ih * spec.iw

    def window_elements(self, spec: ConvTranspose2dSpec) -> int:
        """Number of values that are kept of the input, zeros of steps and rows included."""
        channels = spec.groups * self.steps(spec) * 2 * self.pairs(spec)
        return spec.input_shape[0] * channels * self.image_rows(spec) * self.pitch(spec)

    def packed_shape(self, spec: ConvTranspose2dSpec) -> tuple[int, int, int, int, int]:
        """Shape of the packed weight: ``(groups * blocks, kh, kw, steps, co_block * 2*pairs)``."""
        pairs = self.pairs(spec)
        return spec.groups * self.blocks(spec), *spec.kernel_size, self.steps(spec), self.co_block * 2 * pairs

    def packed_dtype(self, spec: ConvTranspose2dSpec) -> str:
        """The dtype of the packed weight: what tiles multiply."""
        return spec.dtype
