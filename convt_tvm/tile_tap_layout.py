"""How a phase form is laid out where a tile unit sums channels before taps: integers in, integers out."""

from dataclasses import dataclass

from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.tap_layout import TapLayout
from convt_tvm.tile_layout import TileLayout

__all__ = ["TileTapLayout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileTapLayout(TapLayout):
    """A `TapLayout` whose products are of bfloat16, in a processor's tile unit: of 16 rows of weights or fewer each.

    Of ``weight_rows`` and ``positions`` the sums are in tile registers together, of all channels of a group.
    """

    @property
    def tiles(self) -> TileLayout:
        """How the tile registers are shared out, rows of weights in place of output channels."""
        return TileLayout(
            lanes="ow",
            co_block=self.weight_rows,
            row_block=1,
            column_block=self.column_block,
            vector_lanes=self.vector_lanes,
            row_chunk=1,
            positions=self.positions,
        )

    def pairs(self, spec: ConvTranspose2dSpec) -> int:
        """Pairs of input channels of a group, with those of zeros that fill up the last step."""
        return self.tiles.steps(spec) * self.tiles.pairs(spec)

    def window_elements(self, spec: ConvTranspose2dSpec) -> int:
        """Number of values that are kept of the input, with zeros that fill up the last step and the last tile."""
        return spec.input_shape[0] * spec.groups * 2 * self.pairs(spec) * self.panels(spec) * self.positions

    def packed_shape(self, spec: ConvTranspose2dSpec) -> tuple[int, int, int, int, int]:
        """Shape of the packed weight: ``(groups * row tiles, 1, 1, steps, weight_rows * 2*pairs of a step)``."""
        steps, pairs = self.tiles.steps(spec), self.tiles.pairs(spec)
        return spec.groups * self.row_tiles(spec), 1, 1, steps, self.weight_rows * 2 * pairs

    def packed_dtype(self, spec: ConvTranspose2dSpec) -> str:
        """The dtype of the packed weight: what tiles multiply."""
        return spec.dtype
