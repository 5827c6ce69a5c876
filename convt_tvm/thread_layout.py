"""How a phase form is laid out for the threads of a GPU: integers in, integers out, as in `convt_tvm.layout`."""

from dataclasses import dataclass
from itertools import accumulate

from convt_tvm.layout import Layout
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["ThreadLayout", "kernel_rows", "row_starts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadLayout(Layout):
    """How a phase form is laid out for the threads of a GPU.

    A thread block computes ``co_block`` channels of ``row_block`` rows of ``column_block`` columns, in ``phases``
    column phases. Lanes, here the threads of a warp, run along columns, then rows, then channels. Kernel rows are
    packed by row phase, as kernel columns are by column phase.

    Parameters
    ----------
    channel_threads, column_threads
        Threads that share a block's channels, and its columns; every row has its own.
    ci_block
        Input channels whose values and weights are staged in shared memory at a time, a divisor of ``ci/groups``; 0
        where threads read both from global memory.
    """

    channel_threads: int
    column_threads: int
    ci_block: int

    @property
    def threads(self) -> int:
        """Threads in a block."""
        return self.channel_threads * self.row_block * self.column_threads

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


def row_starts(spec: ConvTranspose2dSpec) -> tuple[int, ...]:
    """For each row phase, how many kernel rows the phases before it have."""
    return tuple(accumulate((phase.taps for phase in spec.axes[0].phases), initial=0))[:-1]


def kernel_rows(spec: ConvTranspose2dSpec) -> tuple[int, ...]:
    """For each kernel row, its place where rows are ordered by row phase, as `kernel_columns` orders columns."""
    order = [row for phase in spec.axes[0].phases for row in phase.kernel_indices]
    order += [row for row in range(spec.kernel_size[0]) if row not in order]
    return tuple(order.index(row) for row in range(spec.kernel_size[0]))
