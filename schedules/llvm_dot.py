"""CPU: dot products of pairs of bfloat16 (AVX-512 BF16), vector lanes along output channels.

An instruction adds two products to each sum in float32. So a pair of neighbouring input channels stands where a channel
does in `llvm_channels`, whose loop nest and layouts these are, for half the input channels:

    for n, g, b, ph, qh, pw, qw, ob, th, ip, tw:   acc += low(window) * packed[2*ob] + high(window) * packed[2*ob + 1]
    for n, g, b, ob, ph, qh, qw, pw:               band = acc + bias

In the innermost loop a pair of the window, broadcast as 32 bits, meets a vector of weights, packed in bfloat16 with
the two of a pair side by side. NCHW becomes pairs in NHWC by transposes in registers, 16 columns and 16 pairs at a
time. Pairs of outputs are rounded by an instruction before they are transposed: half the shuffles of float32.

"""

from collections.abc import Iterator
from math import gcd, prod

from tvm.s_tir import Schedule

from convt_tvm.compute import IN_VECTORS
from convt_tvm.dot_layout import DotLayout, paired
from convt_tvm.layout import CACHE_LINE_BYTES, Layout, bands, reaches
from convt_tvm.schedule import find_window
from convt_tvm.schedules import llvm_channels
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import TILE_FEATURES, Target

NAME = "llvm_dot"
TARGET_KIND = "llvm"

SLOW_WITH_TILES = 3
"""How many times the estimate a kernel takes on processors with a tile unit (AMX).

On an Emerald Rapids server the instruction did fewer multiply-adds than those of float32; on Zen 4 it is issued as
often, 3.7 G/s, and does twice as many. With it no layout comes before those in float32.
"""


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Specs in bfloat16 that have any product."""
    return spec.dtype == "bfloat16" and any(reaches(spec, band) for band in bands(spec))


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Those of `llvm_channels` for half the input channels, each with its estimated cycles."""
    if not target.multiplies_pairs:
        return
    factor = 1 if TILE_FEATURES.isdisjoint(target.features) else SLOW_WITH_TILES
    for layout, cycles in llvm_channels.layouts(paired(spec), target):
        total = cycles + prod(spec.output_shape) * _split_cycles(spec, layout)
        yield DotLayout(**layout.to_json()), factor * total


def _split_cycles(spec: ConvTranspose2dSpec, layout: Layout) -> float:
    """Cycles for each output for the lines that a run of them shares with its neighbours.

    Runs are half as long as in float32, and few are whole lines unless a tile is chosen for it.
    """
    run = layout.column_block * len(spec.axes[1].phases)
    run_bytes = run * DTYPE_BYTES[spec.dtype]
    lines = (run_bytes + CACHE_LINE_BYTES - gcd(run_bytes, CACHE_LINE_BYTES)) / CACHE_LINE_BYTES
    return llvm_channels.CYCLES_PER_RUN * max(0.0, lines - 1) / run


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    llvm_channels.space(sch)
    window = find_window(sch)
    if window is not None:
        sch.annotate(sch.get_loops(window)[-2], IN_VECTORS, True)
