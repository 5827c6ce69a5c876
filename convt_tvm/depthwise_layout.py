"""How a phase form is laid out for one channel in each group: integers in, integers out, as in `convt_tvm.layout`."""

from dataclasses import dataclass, replace

from convt_tvm.layout import Layout
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["DepthwiseLayout", "joined"]


def joined(spec: ConvTranspose2dSpec) -> ConvTranspose2dSpec:
    """A depthwise `spec` with its groups taken for one of as many output channels and a single input channel.

    What holds for its output channels holds for groups: blocks, packed weights, sums. Not what is read.
    """
    return replace(spec, ci=1, groups=1)


@dataclass(frozen=True, slots=True)
class DepthwiseLayout(Layout):
    """How a phase form is laid out where lanes run along groups of one channel each.

    ``co_block`` is then a number of groups, and divides theirs.
    """

    def packed_shape(self, spec: ConvTranspose2dSpec) -> tuple[int, int, int, int, int]:
        """Shape of the packed weight: ``(blocks, kh, kw, 1, co_block)``."""
        return Layout.packed_shape(self, joined(spec))
