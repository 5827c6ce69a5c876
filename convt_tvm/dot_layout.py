"""How a phase form is laid out for dot products of pairs of bfloat16: integers in, integers out, as in `layout`."""

from dataclasses import dataclass, replace

from convt_tvm.layout import Layout, Window, crowds
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

__all__ = ["DotLayout", "paired", "reads_pairs"]


def paired(spec: ConvTranspose2dSpec) -> ConvTranspose2dSpec:
    """`spec` with two neighbouring input channels of a group taken for one; a last one alone is a pair as well.

    A pair has the size of an accumulator. So what holds for float32 holds for bfloat16 if one counts pairs: tiles,
    traffic, partial sums.

    >>> paired(ConvTranspose2dSpec(n=1, ci=10, ih=2, iw=2, co=2, kernel_size=2, groups=2, dtype="bfloat16")).ci
    6
    """
    return replace(spec, ci=spec.groups * -(-spec.ci // spec.groups // 2))


def reads_pairs(spec: ConvTranspose2dSpec, layout: Layout) -> bool:
    """Whether dot products read pairs of the input itself, where they are side by side; see `layout.reads_input`."""
    if spec.input_axes == "nchw" or spec.ci // spec.groups % 2:
        return False
    stays = not crowds(layout, spec.ci * DTYPE_BYTES[spec.dtype], (spec.ih, spec.iw))
    return stays and Window.of(spec, layout).is_inside


@dataclass(frozen=True, slots=True)
class DotLayout(Layout):
    """How a phase form is laid out where an instruction multiplies and adds two pairs of bfloat16 in each lane.

    ``lanes`` run along output channels. The window holds pairs of input channels, of 32 bits, and packed weights have
    the two of a pair side by side for each output channel.
    """

    def window_elements(self, spec: ConvTranspose2dSpec) -> int:
        """Number of pairs that are kept of the input."""
        return Layout.window_elements(self, paired(spec))

    def packed_shape(self, spec: ConvTranspose2dSpec) -> tuple[int, int, int, int, int]:
        """Shape of the packed weight: ``(groups * blocks, kh, kw, pairs, co_block * 2)``."""
        *lead, channels = Layout.packed_shape(self, paired(spec))
        blocks, kh, kw, pairs = lead
        return blocks, kh, kw, pairs, 2 * channels

    def packed_dtype(self, spec: ConvTranspose2dSpec) -> str:
        """The dtype of the packed weight: what is multiplied."""
        return spec.dtype
