"""What a GPU, or a processor without TVM's compiler, could do at best: loops of what torch has.

- multiply-adds: a product of square matrices, of the type and with the tensor cores that a workload may use;
- bandwidth: torch's ``copy_``, bytes read plus bytes written: on a processor as many as the spec's tensors have, on a
  GPU the smallest of a few sizes, inside and beyond the last cache, that holds them.
"""

from functools import partial
from typing import Literal

import torch

from convt_tvm.roofline import Loop, Loops
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["GPU_WORKING_SETS", "SIDES", "torch_loops"]

SIDES = {"cpu": 1024, "cuda": 8192}
"""Of the matrices."""
GPU_WORKING_SETS = (1 << 24, 1 << 26, 1 << 30)
LEAST_BYTES = 1 << 20
"""Copied on a processor, beside which a call of torch takes little time."""


def torch_loops(spec: ConvTranspose2dSpec, device: Literal["cpu", "cuda"], dtype: str, threads: int) -> Loops:
    """The loops where torch computes; no call waits for the device.

    Parameters
    ----------
    dtype
        Of the matrices: tensor cores take float16 and bfloat16 as they are, and float32 as tf32 where torch's flag
        allows it during a call.
    threads
        Of a processor: torch's number.
    """
    side, size_bytes = SIDES[device], _working_set(spec.size_bytes, device)
    first, second = (torch.randn((side, side), dtype=getattr(torch, dtype), device=device) for _ in range(2))
    source, copy = torch.ones((2, size_bytes // 8), dtype=torch.float32, device=device)
    return Loops(
        threads,
        dtype,
        Loop(partial(torch.matmul, first, second, out=torch.empty_like(first)), 2 * side**3),
        (Loop(partial(copy.copy_, source), source.nbytes + copy.nbytes),),
    )


def _working_set(size_bytes: int, device: str) -> int:
    if device == "cpu":
        return max(size_bytes, LEAST_BYTES)
    return next((size for size in GPU_WORKING_SETS if size >= size_bytes), GPU_WORKING_SETS[-1])
