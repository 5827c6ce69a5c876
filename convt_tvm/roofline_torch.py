"""What a GPU, or a processor without TVM's compiler, could do at best: measured with what torch has.

- multiply-adds: a product of square matrices, of the type and with the tensor cores that a workload may use;
- bandwidth: torch's ``copy_``, bytes read plus bytes written, over working sets inside and beyond the last cache.
"""

import functools
from collections.abc import Callable
from time import perf_counter
from typing import Any, Literal

import torch

from convt_tvm.measure import TimeCalls
from convt_tvm.place import Place
from convt_tvm.roofline import WORKING_SETS, Bandwidth, Limits

__all__ = ["GPU_WORKING_SETS", "SIDES", "measure_limits"]

SIDES = {"cpu": 1024, "cuda": 8192}
"""Of the matrices."""
GPU_WORKING_SETS = (1 << 24, 1 << 26, 1 << 30)
_SAMPLES = 5


@functools.cache
def measure_limits(device: Literal["cpu", "cuda"], dtype: str, threads: int, *, tf32: bool = False) -> Limits:
    """Measure where torch computes, once a process for each type; of five samples the best counts.

    Parameters
    ----------
    dtype
        Of the matrices: tensor cores take float16 and bfloat16 as they are.
    threads
        Of a processor; torch's number, which this sets.
    tf32
        Whether float32 may be multiplied as tf32.
    """
    settings: Any = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, tf32
    if device == "cpu":
        torch.set_num_threads(threads)
    time_calls = Place(device).time_calls() or _on_processor
    try:
        side = SIDES[device]
        first, second = (torch.randn((side, side), dtype=getattr(torch, dtype), device=device) for _ in range(2))
        product = torch.empty_like(first)

        def multiply() -> None:
            torch.matmul(first, second, out=product)

        multiply()
        flops = 2 * side**3 / min(time_calls(multiply, 1) for _ in range(_SAMPLES))
    finally:
        settings.allow_tf32 = before
    sizes = GPU_WORKING_SETS if device == "cuda" else WORKING_SETS
    bandwidths = tuple(Bandwidth(size, _bandwidth(device, time_calls, size, max(sizes))) for size in sizes)
    return Limits(threads, dtype, flops, bandwidths)


def _on_processor(function: Callable[[], object], calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        function()
    return perf_counter() - start


def _bandwidth(device: str, time_calls: TimeCalls, size: int, largest: int) -> float:
    source, copy = torch.ones((2, size // 8), dtype=torch.float32, device=device)
    calls = max(1, largest // size)

    def copy_all() -> None:
        copy.copy_(source)

    return calls * size / min(time_calls(copy_all, calls) for _ in range(_SAMPLES))
