"""What this machine could do at best: its limits, measured, and the time they allow a spec.

Measured in this process, on as many threads as the kernels get:

- multiply-adds: 12 vector accumulators a thread, each multiplied by and added to a register, over and over. Twelve
  chains cover a latency of four cycles times two units with some to spare, and nothing is loaded in the loop;
- bandwidth, for the working sets of `WORKING_SETS`: the faster of reading (into 8 vector accumulators) and copying
  (torch's ``copy_``, bytes read plus bytes written). A spec is bound by the one for the smallest of these working sets
  that holds its tensors, or by the largest.

Half-width types are summed in float32, so float32's multiply-adds are their limit; but for bfloat16 where a processor
has dot products of it, two multiply-adds in each lane.
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from convt_tvm import runtime
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["WORKING_SETS", "Bandwidth", "Bound", "Limits", "bound", "measure_limits"]

ACCUMULATORS = 12
READ_ACCUMULATORS = 8
WORKING_SETS = (1 << 19, 1 << 21, 1 << 23, 1 << 25, 1 << 27)
"""512 KiB, half of a server core's second cache, to 128 MiB, beyond the last cache of most; all threads together."""

_SAMPLE_SECS = 0.015
_SAMPLES = 5
_PASS_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes read or written in a second by all threads, over a working set of so many bytes."""

    size_bytes: int
    bytes_per_sec: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What `measure_limits` found; ``flops_per_sec`` counts a multiply-add as two."""

    threads: int
    dtype: str
    flops_per_sec: float
    bandwidths: tuple[Bandwidth, ...]

    def bandwidth_for(self, size_bytes: int) -> Bandwidth:
        """The bandwidth of the smallest working set of at least this size, or of the largest."""
        return next((each for each in self.bandwidths if each.size_bytes >= size_bytes), self.bandwidths[-1])


@dataclass(frozen=True, slots=True)
class Bound:
    """The time below which `Limits` cannot compute a spec.

    Every useful product has to be made and every tensor moved once: the larger of the two times binds.
    """

    flops: int
    size_bytes: int
    flops_per_sec: float
    bandwidth: Bandwidth

    @property
    def compute_secs(self) -> float:
        """Of the multiply-adds."""
        return self.flops / self.flops_per_sec

    @property
    def memory_secs(self) -> float:
        """Of moving input, weight, bias and output once."""
        return self.size_bytes / self.bandwidth.bytes_per_sec

    @property
    def secs(self) -> float:
        """The larger of both."""
        return max(self.compute_secs, self.memory_secs)

    @property
    def by(self) -> Literal["compute", "memory"]:
        """Which of both it is."""
        return "compute" if self.compute_secs >= self.memory_secs else "memory"


def bound(spec: ConvTranspose2dSpec, limits: Limits) -> Bound:
    """The roofline of `spec` under limits measured for it."""
    return Bound(2 * spec.multiply_adds, spec.size_bytes, limits.flops_per_sec, limits.bandwidth_for(spec.size_bytes))


def measure_limits(dtype: str, threads: int) -> Limits:
    """Measure this machine; about a second, and as long again for compiling the first time.

    Sets TVM's and torch's thread pools to `threads` and leaves them so. Of five samples the best counts: a limit is
    what the machine can do when nothing else disturbs it.

    Parameters
    ----------
    dtype
        ``float32`` or ``float64``: a spec's ``accumulator_dtype``; or ``bfloat16``, for its dot products.
    """
    runtime.set_num_threads(threads)
    torch.set_num_threads(threads)
    library = _library(dtype, threads)
    sums = _sums_dtype(dtype)
    # Configures this thread's pool, which a function that is not one of our kernels would not do.
    runtime.get_num_threads()
    values = torch.ones((threads, ACCUMULATORS, _lanes(sums)), dtype=getattr(torch, sums))
    steps = 100_000
    secs = _best_secs(lambda: library.multiply_add(values, steps))
    flops = (2 if sums == dtype else 4) * values.numel() * steps / secs
    return Limits(
        threads,
        dtype,
        flops,
        tuple(Bandwidth(size, _bandwidth(library, sums, threads, size)) for size in WORKING_SETS),
    )


def _bandwidth(library: Any, dtype: str, threads: int, size: int) -> float:
    torch_dtype = getattr(torch, dtype)
    row = (READ_ACCUMULATORS, _lanes(dtype))
    sums = torch.zeros((threads, *row), dtype=torch_dtype)
    rows = size // (threads * sums[0].numel() * sums.element_size())
    data = torch.ones((threads, rows, *row), dtype=torch_dtype)
    repeats = max(1, _PASS_BYTES // size)
    read = _best_secs(lambda: library.read(data, sums, repeats))
    source, copy = data.flatten()[: data.numel() // 2], data.flatten()[data.numel() // 2 :]

    def copy_all() -> None:
        for _ in range(repeats):
            copy.copy_(source)

    return repeats * data.numel() * data.element_size() / min(read, _best_secs(copy_all))


def _best_secs(function: Callable[[], object]) -> float:
    """Shortest time of a call: of several samples, each a loop of some length."""

    def run(calls: int) -> float:
        start = perf_counter()
        for _ in range(calls):
            function()
        return (perf_counter() - start) / calls

    run(1)
    calls = max(1, round(_SAMPLE_SECS / run(1)))
    return min(run(calls) for _ in range(_SAMPLES))


def _sums_dtype(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


def _lanes(dtype: str) -> int:
    return Target.parse("llvm").vector_bytes // torch.finfo(getattr(torch, dtype)).bits * 8


@functools.cache
def _library(dtype: str, threads: int) -> Any:
    """The loaded functions ``multiply_add(values, steps)`` and ``read(data, sums, repeats)``."""
    import tvm_ffi

    with tempfile.TemporaryDirectory(prefix="convt-tvm-limits-") as scratch:
        path = Path(scratch) / "limits.so"
        _compile(dtype, threads, path)
        # An opened library stays mapped when its file is gone.
        return tvm_ffi.load_module(str(path))


def _compile(dtype: str, threads: int, path: Path) -> None:
    import tvm
    from tvm.script import tirx as T

    from convt_tvm.bfloat16 import PAIR, add_products, define_functions

    pairs, dtype = dtype == "bfloat16", _sums_dtype(dtype)
    lanes = _lanes(dtype)
    # The annotation keeps what is local on the stack, where constant indices turn it into registers.
    on_stack = {"disable_lower_builtin": T.bool(True)}

    every_lane = T.Ramp(0, 1, lanes)

    def step(sums: Any) -> Any:
        """What a multiply-add, or a dot product of pairs, makes of a vector of sums."""
        if pairs:
            ones = T.Broadcast(T.Cast(PAIR, 0x3F803F80), lanes)
            return add_products(sums, ones, ones, lanes)
        half = T.Broadcast(T.cast(0.5, dtype), lanes)
        return sums * half + half

    @T.prim_func  # type: ignore[untyped-decorator]
    def multiply_add(values: T.Buffer((threads, ACCUMULATORS, lanes), dtype), steps: T.int64):  # type: ignore[no-untyped-def, valid-type]  # noqa: ANN202
        T.func_attr({"global_symbol": "multiply_add"})
        for t in T.parallel(threads):
            acc = T.alloc_buffer((ACCUMULATORS, lanes), dtype, scope="local", annotations=on_stack)
            for j in T.unroll(ACCUMULATORS):
                for lane in T.vectorized(lanes):
                    acc[j, lane] = values[t, j, lane]
            for _ in T.serial(steps):
                for j in T.unroll(ACCUMULATORS):
                    acc[j, every_lane] = step(acc[j, every_lane])
            for j in T.unroll(ACCUMULATORS):
                for lane in T.vectorized(lanes):
                    values[t, j, lane] = acc[j, lane]

    @T.prim_func  # type: ignore[untyped-decorator]
    def read(whole: T.handle, sums: T.Buffer((threads, READ_ACCUMULATORS, lanes), dtype), repeats: T.int64):  # type: ignore[no-untyped-def, valid-type]  # noqa: ANN202
        T.func_attr({"global_symbol": "read"})
        rows = T.int64()
        data = T.match_buffer(whole, (threads, rows, READ_ACCUMULATORS, lanes), dtype)
        for t in T.parallel(threads):
            acc = T.alloc_buffer((READ_ACCUMULATORS, lanes), dtype, scope="local", annotations=on_stack)
            for j in T.unroll(READ_ACCUMULATORS):
                for lane in T.vectorized(lanes):
                    acc[j, lane] = T.cast(0, dtype)
            for _ in T.serial(repeats):
                for k in T.serial(rows):
                    for j in T.unroll(READ_ACCUMULATORS):
                        for lane in T.vectorized(lanes):
                            acc[j, lane] = acc[j, lane] + data[t, k, j, lane]
            for j in T.unroll(READ_ACCUMULATORS):
                for lane in T.vectorized(lanes):
                    sums[t, j, lane] = acc[j, lane]

    target = Target.parse("llvm").to_tvm()
    # As in `compiler.compile_module`.
    with target, tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        if pairs:
            multiply_add = multiply_add.with_body(define_functions(multiply_add.body))
        module = tvm.IRModule({"multiply_add": multiply_add, "read": read})
        tvm.compile(module, target=target).export_library(str(path))
