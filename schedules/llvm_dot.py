"""CPU: dot products of pairs of bfloat16 (AVX-512 BF16), vector lanes along output channels.

An instruction adds two products to each sum in float32. So a pair of neighbouring input channels stands where a channel
does in `llvm_channels`, whose loop nest and layouts these are, for half the input channels:

    for n, g, b, ph, qh, pw, qw, ob, th, ip, tw:   acc += low(window) * packed[2*ob] + high(window) * packed[2*ob + 1]
    for n, g, b, ob, ph, qh, qw, pw:               band = acc + bias

In the innermost loop a pair of the window, broadcast as 32 bits, meets a vector of weights, packed in bfloat16 with
the two of a pair side by side. NCHW becomes pairs in NHWC by transposes in registers, 16 columns and 16 pairs at a
time. Pairs of outputs are rounded by an instruction before they are transposed: half the shuffles of float32.

What it brings, in milliseconds on one core of a Zen 4 server whose dot products peak at 232 GFLOP/s, NCHW, weights
packed (by turns in one process, median of 5 rounds, answers checked):

    =================  =========  ========  ==========  ===================  =======
    workload           this       float32   PyTorch's   ... channels_last    of peak
    =================  =========  ========  ==========  ===================  =======
    dcgan/2            0.26       0.532     3.31        0.706                85 %
    dcgan/3            0.265      0.522     1.09        0.417                96 %
    dcgan/4            0.282      0.576     0.593       0.355                96 %
    unet/up1           20.5       39.8      27.1        21.0                 90 %
    unet/up4           6.90       11.4      13.8        5.52                 67 %
    pose/1             4.18       7.21      17.0        6.32                 72 %
    pose/2             1.68       3.53      3.58        2.12                 96 %
    maskrcnn/mask      8.14       16.3      13.7        9.57                 87 %
    pointpillars/up4   17.3       34.9      31.2        17.3                 88 %
    hifigan/up1        1.28       2.69      7.56        5.17                 89 %
    grouped/4          0.327      0.576     0.749       0.408                74 %
    dilated/k3d2       1.27       2.66      3.43        1.29                 94 %
    sam/up1            2.62       5.12      5.00        2.53                 88 %
    =================  =========  ========  ==========  ===================  =======

What limits it:

- What is not a product, for 64 to 256 input channels and one tap (unet/up4, sam/up1, pointpillars/up4), where PyTorch
  in channels_last has neither pairs to make nor transposes to store. Of unet/up4 a tenth of the time makes pairs (a
  third before it was done by transposes) and another tenth stores. In channels_last these kernels have neither too:
  1.03 to 1.08 times as fast as PyTorch's.
- Runs of outputs that share cache lines with their neighbours: with tiles of 13 columns, 52 bytes of a row, unet/up4
  took a tenth longer than with 16, a whole line.
- Weights: dcgan/2 reads 4 MB, pose/1 17 MB. With ``taps="outer"`` and 32 channels in a block pose/1 took 3.6 ms; the
  cost rule holds the two for equal.
- Memory. In hours in which the same machine issued 2.2 G instead of 3.6 G multiply-adds a second, unet/up4 was at 1.48
  of float32's speed, and behind PyTorch in channels_last were also pointpillars/up4 (0.89) and unet/up1 (0.97).
"""

from collections.abc import Iterator
from dataclasses import replace
from math import gcd, prod

from tvm.s_tir import Schedule

from convt_tvm.dot_layout import DotLayout, paired, reads_pairs
from convt_tvm.layout import CACHE_LINE_BYTES, Layout, reached_bands
from convt_tvm.processor import TILE_FEATURES
from convt_tvm.schedules import llvm_channels
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target

NAME = "llvm_dot"
TARGET_KIND = "llvm"

SLOW_WITH_TILES = 3
"""How many times the estimate a kernel takes on processors with a tile unit (AMX).

On an Emerald Rapids server the instruction did fewer multiply-adds than those of float32; on Zen 4 it is issued as
often, 3.7 G/s, and does twice as many. With it no layout comes before those in float32.
"""


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Specs in bfloat16 that have any product."""
    return spec.dtype == "bfloat16" and bool(reached_bands(spec))


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Those of `llvm_channels` for half the input channels, each with its estimated cycles.

    Neither in chunks of columns nor copied by chunk, of which nothing was measured on such processors.
    """
    if not target.multiplies_pairs:
        return
    factor = 1 if TILE_FEATURES.isdisjoint(target.features) else SLOW_WITH_TILES
    pairs = paired(spec)
    for layout, cycles in llvm_channels.layouts(pairs, target):
        if layout.by_chunk:
            continue
        layout = replace(layout, column_chunk=0)
        total = cycles + prod(spec.output_shape) * _split_cycles(spec, layout)
        if reads_pairs(spec, layout):
            total -= prod(pairs.input_shape) * llvm_channels.CYCLES_PER_INPUT
        yield DotLayout(**layout.to_json()), factor * total


def _split_cycles(spec: ConvTranspose2dSpec, layout: Layout) -> float:
    """Cycles for each output for the lines that a run of them shares with its neighbours.

    Runs are half as long as in float32, and few are whole lines unless a tile is chosen for it.
    """
    run = llvm_channels.outputs_in_run(spec, layout)
    run_bytes = run * DTYPE_BYTES[spec.dtype]
    lines = (run_bytes + CACHE_LINE_BYTES - gcd(run_bytes, CACHE_LINE_BYTES)) / CACHE_LINE_BYTES
    cycles: float = llvm_channels.CYCLES_PER_RUN * max(0.0, lines - 1) / run
    return cycles


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    llvm_channels.space(sch)
