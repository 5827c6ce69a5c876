"""CUDA: matrix products on tensor cores. For float16 and bfloat16 with 16 channels and more, and tf32 where allowed.

One launch. The outputs of one phase are a matrix product: weights of ``taps * input channels`` by output channels,
times inputs of as many by positions. A block computes one row phase and several column phases. From

    for n, g, ph, rb, cb, ko, p, k:                                                window = input, or 0 at the border
    for n, g, b, ph, pb, rb, cb, wd, wi, wc, wp, ot, pt, oi, pi, ko, th, tw, ki, kj:  acc += weights * inputs
    for n, g, b, ph, pb, rb, cb, ot, pt, wc, oi, wp, pi, wi:                       band = acc of all wd + bias

to

    blockIdx.x = n, g, ph, pb, rb, cb, b
    for ko:                                   a stage: ci_block input channels
      window: to registers, then shared       the window; lanes along columns, 16 bytes of channels each
      taps: weights to shared memory          of all taps, 16 bytes each
      for ki: for th, tw:                     threadIdx.y = wd, wi, wc, wp
        weights to fragments
        for pt: inputs to a fragment          the window from the tap's place on
          for ot:                             16 x 16 (x kj), two instructions
    for ot, pt:
      sums to shared memory                   a fragment of each warp
      threadIdx.y, threadIdx.x = wc, oi, wp, pi, wi: the output, columns of all phases side by side

Inputs are fetched once for all taps and for the column phases of a block, two columns at a time where rows are even,
and a tap is a place in the window to read from: see `convt_tvm.tensor_layout`. Any stride, dilation and border costs
the same. Zeros are multiplied for surplus channels, and products thrown away for positions beside a tile and beyond the
image. Warps ``wd`` share the input channels of a stage, and their sums are added up in one order: layers of few
positions and many channels have few blocks, each of which waits for its stages one after the other. The bits of a sum
depend on how many ``wd`` there are and on nothing else of a layout. A stage is on its way to registers while the one
before is multiplied (`convt_tvm.lower_prefetch`); no copy is asynchronous.

Fragments are read by ldmatrix and multiplied by mma.sync (``cuda/warp_matrix.h``), which need 16-byte addresses and no
more, so that no two lanes want the same bank. By wmma, whose matrices begin at multiples of 32 bytes, half of the reads
were conflicts, and unet/up1 took 54 us in tf32 where it takes 37 now, pose/1 47 and 29, maskrcnn/mask 31 and 21.

What limits it: unet/up1 in tf32, the one layer behind cuDNN (36.6 us, cuDNN 36.0), by an H200's counters: the unit of
shared memory is 74 % busy, tensor cores 38 %, instructions are issued in 23 % of the cycles, and warps wait for shared
memory most (3.4 cycles for each instruction; 0.5 for barriers, 0.2 for global memory). Its 128 blocks are one for each
multiprocessor, of eight warps, which copy and multiply by turns. Room for two stages, with one barrier each, was tried
and gained nothing. wgmma reads shared memory by itself, and the tensor memory accelerator writes it; neither is used.

float16 and bfloat16 are multiplied exactly and summed in float32, which GPUs round in their own way; float32 is rounded
to tf32 first, and only where the target says ``+tf32``.
"""

from collections.abc import Iterator

from tvm.s_tir import Schedule

from convt_tvm.cost_tensor import fits_tensor_cores, tensor_cycles, tensor_layouts
from convt_tvm.layout import Layout
from convt_tvm.schedule_tensor import bind_blocks, multiply, order_products, stage_inputs, stage_weights, store_sums
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tensor_layout import reaches_of

NAME = "cuda_tensor"
TARGET_KIND = "cuda"


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Where some tap reaches the output, and sums are not kept in float64; `layouts` knows what the target has."""
    rows, columns = reaches_of(spec)
    return spec.accumulator_dtype == "float32" and any(rows.taps) and any(columns.taps)


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Layouts within the limits of threads, registers and shared memory, each with its estimated cycles."""
    for layout in tensor_layouts(spec) if fits_tensor_cores(spec, target) else ():
        yield layout, tensor_cycles(spec, layout, target)


def space(sch: Schedule) -> None:
    """Schedule the matrix products in `sch` in place; deterministic for a declaration."""
    names = ("fetch", "gather", "window", "inputs", "taps", "weights", "acc", "band")
    *copies, inputs, taps, weights, acc, band = (sch.get_sblock(name) for name in names)
    block, fragment = bind_blocks(sch, band)
    sums = store_sums(sch, acc, band, fragment)
    stage, step, part = order_products(sch, acc, block)
    stage_inputs(sch, copies, inputs, stage, part)
    stage_weights(sch, taps, weights, stage, step)
    multiply(sch, acc, sums)
