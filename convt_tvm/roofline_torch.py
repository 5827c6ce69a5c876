"""What a GPU, a processor's tile unit, or a processor without TVM's compiler could do at best: loops of what torch has.

- multiply-adds: a product of square matrices, of the type and with the tensor cores that a workload may use;
- bandwidth: torch's ``copy_``, bytes read plus bytes written: on a processor as many as the spec's tensors have, on a
  GPU the smallest of a few sizes, inside and beyond the last cache, that holds them.
"""

from functools import partial
from typing import Literal

import torch

from convt_tvm.roofline import Loop, Loops
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["GPU_WORKING_SETS", "SIDES", "multiply_matrices", "torch_loops"]

SIDES = {"cpu": 1024, "cuda": 8192}
"""Of the matrices."""
GPU_WORKING_SETS = (1 << 24, 1 << 26, 1 << 30)
LEAST_BYTES = 1 << 20
"""Copied on a processor, beside which a call of torch takes little time."""


def multiply_matrices(device: Literal["cpu", "cuda"], dtype: str) -> Loop:
    """Multiply-adds where torch computes, on its number of threads; no call waits for the device.

    Tensor cores and tile units take float16 and bfloat16 as they are, tensor cores also float32 as tf32, where torch's
    flag allows it during a call.
    """
    side = SIDES[device]
    first, second = (torch.randn((side, side), dtype=getattr(torch, dtype), device=device) for _ in range(2))
    return Loop(partial(torch.matmul, first, second, out=torch.empty_like(first)), 2 * side**3)


def torch_loops(spec: ConvTranspose2dSpec, device: Literal["cpu", "cuda"], dtype: str, threads: int) -> Loops:
    """The loops where torch computes; no call waits for the device.

    Parameters
    ----------
    dtype
        Of the matrices.
    threads
        Of a processor: torch's number.
    """
    size_bytes = _working_set(spec.size_bytes, device)
    source, copy = torch.ones((2, size_bytes // 8), dtype=torch.float32, device=device)
    move = Loop(partial(copy.copy_, source), source.nbytes + copy.nbytes)
    return Loops(threads, dtype, multiply_matrices(device, dtype), (move,))


def _working_set(size_bytes: int, device: str) -> int:
    if device == "cpu":
        return max(size_bytes, LEAST_BYTES)
    return next((size for size in GPU_WORKING_SETS if size >= size_bytes), GPU_WORKING_SETS[-1])
