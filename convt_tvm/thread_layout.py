"""How a phase form is laid out for the threads of a GPU: integers in, integers out, as in `convt_tvm.layout`."""

from dataclasses import dataclass
from itertools import accumulate
from math import gcd

from convt_tvm.layout import Layout
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

__all__ = [
    "BATCH",
    "MAX_FETCHED",
    "VECTOR_BYTES",
    "ThreadLayout",
    "kernel_rows",
    "row_alignment",
    "row_starts",
    "weight_vector",
]

VECTOR_BYTES = 16
"""The widest access to memory of one thread."""
BATCH = 16
"""Loads of one thread that are in flight together, where values are not fetched a step ahead."""
MAX_FETCHED = 32
"""Registers, of 4 bytes, that a thread fetches the next step's values to; where a step takes more, it waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadLayout(Layout):
    """How a phase form is laid out for the threads of a GPU.

    A thread block computes ``co_block`` channels of ``row_block`` rows of ``column_block`` columns, in ``phases``
    column phases. Lanes, here the threads of a warp, run along columns, then rows, then channels. Kernel rows are
    packed by row phase, as kernel columns are by column phase, and input channels filled up with zeros to whole steps.

    Parameters
    ----------
    channel_threads, column_threads
        Threads that share a block's channels, and its columns; every row has its own.
    ci_block
        Input channels whose values and weights are staged in shared memory at a time, a multiple of `depth_threads`; 0
        where threads read both from global memory.
    depth_threads
        Threads that share an output's input channels; their sums are added up in shared memory.
    """

    channel_threads: int
    column_threads: int
    ci_block: int
    depth_threads: int = 1

    @property
    def sum_order(self) -> tuple[object, ...]:
        """As in `Layout`: which input channels are summed together."""
        shared = self.depth_threads > 1
        return type(self), self.depth_threads, self.depth_block if shared else 0

    @property
    def shape(self) -> tuple[object, ...]:
        """As in `Layout`."""
        return self.channel_tile, self.column_tile, self.phases, self.depth_threads

    @property
    def lanes_block(self) -> int:
        """Threads that share a block's positions; warps are made of them first."""
        return self.row_block * self.column_threads

    @property
    def threads(self) -> int:
        """Threads in a block."""
        return self.depth_threads * self.channel_threads * self.lanes_block

    @property
    def depth_block(self) -> int:
        """Input channels that a block works through in a step."""
        return self.ci_block or self.depth_threads

    def steps(self, spec: ConvTranspose2dSpec) -> int:
        """Steps of all input channels of a group."""
        return -(-(spec.ci // spec.groups) // self.depth_block)

    def packed_shape(self, spec: ConvTranspose2dSpec) -> tuple[int, int, int, int, int]:
        """Shape of the packed weight: ``(groups * blocks, kh, kw, whole steps of channels, co_block)``."""
        return spec.groups * self.blocks(spec), *spec.kernel_size, self.steps(spec) * self.depth_block, self.co_block

    @property
    def channel_tile(self) -> int:
        """Neighbouring channels that one thread computes."""
        return self.co_block // self.channel_threads

    @property
    def column_tile(self) -> int:
        """Columns that one thread computes, ``column_threads`` apart: those of a warp lie side by side."""
        return self.column_block // self.column_threads

    @property
    def sums(self) -> int:
        """Accumulators of one thread."""
        return self.channel_tile * self.column_tile * self.phases


def row_alignment(layout: ThreadLayout) -> tuple[int, int]:
    """Factor and offset of the distance of staged rows: lanes that have neighbouring rows then read different banks.

    An odd multiple of ``column_threads``, of which there are a power of two.
    """
    return 2 * layout.column_threads, layout.column_threads


def weight_vector(spec: ConvTranspose2dSpec, layout: ThreadLayout) -> int:
    """Neighbouring weights that are copied at a time."""
    return gcd(VECTOR_BYTES // DTYPE_BYTES[spec.accumulator_dtype], layout.co_block)


def row_starts(spec: ConvTranspose2dSpec) -> tuple[int, ...]:
    """For each row phase, how many kernel rows the phases before it have."""
    return tuple(accumulate((phase.taps for phase in spec.axes[0].phases), initial=0))[:-1]


def kernel_rows(spec: ConvTranspose2dSpec) -> tuple[int, ...]:
    """For each kernel row, its place where rows are ordered by row phase, as `kernel_columns` orders columns."""
    order = [row for phase in spec.axes[0].phases for row in phase.kernel_indices]
    order += [row for row in range(spec.kernel_size[0]) if row not in order]
    return tuple(order.index(row) for row in range(spec.kernel_size[0]))
