"""CUDA: matrix products on tensor cores. For float16 and bfloat16 with 16 channels and more, and tf32 where allowed.

One launch for each patch, the phases that have the same taps on either axis. The outputs of one phase are a matrix
product: weights of ``taps * input channels`` by output channels, times inputs of as many by positions. From

    for n, g, b, ph, pw, rb, cb, wo, wp, ot, pt, oi, pi, th, tw, ko, ki, kj:   acc += weights * inputs
    for n, g, b, ph, pw, rb, cb, wo, wp, ot, pt, oi, pi:                       band = acc + bias

to

    blockIdx.x = n, g, ph, pw, rb, cb, b
      for th, tw, ko:                           a stage: ci_block input channels of one tap
        gather: to registers, then shared       lanes along positions, 16 bytes of channels each
        taps: weights to shared memory          16 bytes each
        for ki:                                 unrolled
          inputs, weights to fragments
          for ot, pt:                           unrolled: threadIdx.y = wo, wp; 16 x 16 (x kj) in one instruction
      for ot, pt:
        sums to shared memory                   a fragment of each warp
        threadIdx.y = wo, wp, threadIdx.x = oi, pi: the output

The inputs of each tap are gathered anew, out of the caches: any stride, dilation and border costs the same, and no
zero is multiplied but those of surplus channels and positions. Rows in shared memory are 16 bytes more than a multiple
of 32 apart, so that eight of them, which are read at a time, lie in different banks. A stage is waited for before it is
multiplied: no copy is asynchronous.

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
    names = ("fetch", "gather", "inputs", "taps", "weights", "acc", "band")
    fetch, gather, inputs, taps, weights, acc, band = (sch.get_sblock(name) for name in names)
    block, fragment = bind_blocks(sch, band)
    sums = store_sums(sch, acc, band, fragment)
    stage, step, part = order_products(sch, acc, block)
    stage_inputs(sch, fetch, gather, inputs, stage, part)
    stage_weights(sch, taps, weights, stage, step)
    multiply(sch, acc, sums)
