"""CPU: vector lanes along groups of one channel each. For depthwise layers in channels_last.

A vector of the input, of so many groups, meets a vector of weights, and nothing is broadcast; the loop nest is that of
`llvm_channels` for one input channel and as many output channels as there are groups:

    for n, b, ph, qh, pw, qw, ob, th, tw:             acc += window * packed
    for n, b, ob, ph, qh, qw, pw:                     band = acc + bias

On a core of a Zen 4 server bilinear/depthwise takes 0.12 ms, 1.5 times as fast as PyTorch in channels_last, and as long
as in NCHW. With lanes along columns, whose outputs leave one by one, it took 1.2.
"""

from collections.abc import Iterator
from math import prod

from tvm.s_tir import Schedule

from convt_tvm.cost import FMA_LATENCY, MISS_BYTES_PER_CYCLE, block_sizes, in_column_chunks, lane_counts
from convt_tvm.depthwise_layout import DepthwiseLayout, joined
from convt_tvm.layout import Layout, bands, is_depthwise, reached_bands, reads_input
from convt_tvm.schedule import find_window, parallelize
from convt_tvm.schedules import llvm_channels
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target

NAME = "llvm_depthwise"
TARGET_KIND = "llvm"

MAX_VECTORS = 4
MAX_COLUMNS = 14
MAX_SHARE = 2
"""The part of the vector registers that sums may take: half. Zen 4: 28 of 32 took 1.27 times as long as 16."""


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Depthwise specs in channels_last that have any product."""
    return is_depthwise(spec) and spec.output_axes == "nhwc" and bool(reached_bands(spec))


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts whose vectors are full and whose sums fit the registers, each with its estimated cycles."""
    width = spec.axes[1].widest
    for lanes in lane_counts(spec, target):
        for vectors in range(1, MAX_VECTORS + 1):
            if spec.groups % (vectors * lanes):
                continue
            for columns in block_sizes(width, MAX_COLUMNS):
                if vectors * columns <= target.vector_registers // MAX_SHARE:
                    layout = DepthwiseLayout("co", vectors * lanes, 1, columns, lanes, 1)
                    layout = in_column_chunks(joined(spec), layout, target)
                    yield layout, _cycles(spec, layout)


def _cycles(spec: ConvTranspose2dSpec, layout: DepthwiseLayout) -> float:
    """Estimated cycles of one core: a load beside each multiply-add, and one of weights for all positions of a tile."""
    one = joined(spec)
    steps = sum(band.row_steps(layout, one.ih) for band in bands(one)) * layout.column_steps(one)
    tiles = one.input_shape[0] * layout.blocks(one) * steps
    vectors = layout.co_block // layout.vector_lanes
    copied = 0.0 if reads_input(spec, layout) else llvm_channels.CYCLES_PER_INPUT
    written = llvm_channels.CYCLES_PER_OUTPUT + llvm_channels.CYCLES_PER_RUN / layout.co_block
    image_bytes = prod(spec.input_shape) * DTYPE_BYTES[spec.dtype]
    cycles: float = (
        tiles * max(vectors * (layout.column_block + 1), FMA_LATENCY)
        + image_bytes / MISS_BYTES_PER_CYCLE
        + prod(spec.input_shape) * copied
        + prod(spec.output_shape) * written
    )
    return cycles


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    llvm_channels.tile(sch, apart=False)
    window = find_window(sch)
    if window is not None:
        n, *loops = sch.get_loops(window)
        parallelize(sch, (n, loops[0]), prod(int(sch.get(loop).extent) for loop in loops))
