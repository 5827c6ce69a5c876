"""What this machine could do at best: its limits, and the time they allow a spec.

On shared machines the speed changes within seconds, by up to two times. So limits are loops that take turns with the
kernels in `convt_tvm.measure.interleaved`, on as many threads:

- multiply-adds: 12 vector accumulators a thread, each multiplied by and added to a register, over and over. Twelve
  chains cover a latency of four cycles times two units with some to spare, and nothing is loaded in the loop;
- bandwidth: as many bytes read as the spec reads, into 8 vector accumulators, and as many written as its output has,
  by turns in blocks of `BLOCK_ROWS`. What fits into caches stays there from call to call, as the kernels' tensors do.
  Once with plain stores and once with stores past the caches; the faster of both is the limit. All in huge pages.

Half-width types are summed in float32, so float32's multiply-adds are their limit; but for bfloat16 where a processor
has dot products of it, two multiply-adds in each lane.
"""

import functools
import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from convt_tvm import runtime
from convt_tvm.huge_pages import anonymous_memory
from convt_tvm.measure import TimeCalls, interleaved
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["Bound", "Limits", "Loop", "Loops", "bound", "measure", "processor_loops"]

ACCUMULATORS = 12
STEPS = 100_000
"""Of the multiply-adds in a call: some 200 microseconds."""

ROW_VECTORS = 8
"""Vectors of a row, and accumulators that rows are added to."""
BLOCK_ROWS = 8
"""Rows read and written by turns: 4 KiB with AVX-512, so that reads and writes overlap.

On an Emerald Rapids server, 12 MB read and 8 MB written took 0.82 of the time of blocks of 256 rows."""
CALL_BYTES = 8 << 20
"""Moved by each thread in a call at least: some 30 microseconds from the first cache, beside 2 for the call itself."""

_ROUNDS = 5
_SAMPLE_SECS = 0.015


@dataclass(frozen=True, slots=True)
class Loop:
    """A function, and how many operations it makes or bytes it moves in a call."""

    run: Callable[[], object]
    amount: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do in a second; ``flops_per_sec`` counts a multiply-add as two.

    ``bytes_per_sec`` are those read and written by all threads, for one spec's tensors.
    """

    threads: int
    dtype: str
    flops_per_sec: float
    bytes_per_sec: float


@dataclass(frozen=True, slots=True)
class Loops:
    """What finds the limits for a spec: to be timed beside kernels; keeps memory of the spec's size.

    Attributes
    ----------
    threads, dtype
        As in `Limits`.
    multiply_adds
        Its amount counts a multiply-add as two.
    moves
        Ways to move bytes, of which the fastest counts.
    """

    threads: int
    dtype: str
    multiply_adds: Loop
    moves: tuple[Loop, ...]

    @property
    def _named(self) -> dict[str, Loop]:
        """Under names that no implementation has."""
        moves = {f"limit: bytes, way {number}": loop for number, loop in enumerate(self.moves, 1)}
        return {"limit: multiply-adds": self.multiply_adds, **moves}

    @property
    def functions(self) -> dict[str, Callable[[], object]]:
        """What `convt_tvm.measure.interleaved` takes, under names that no implementation has."""
        return {name: loop.run for name, loop in self._named.items()}

    def limits(self, samples: Mapping[str, Sequence[float]], of: Callable[[Sequence[float]], float] = median) -> Limits:
        """The limits by what `interleaved` gave for `functions`, perhaps among others, and one number `of` each."""
        flops, *moved = (loop.amount / of(samples[name]) * 1e6 for name, loop in self._named.items())
        return Limits(self.threads, self.dtype, flops, max(moved))


@dataclass(frozen=True, slots=True)
class Bound:
    """The time below which `Limits` cannot compute a spec.

    Every useful product has to be made and every tensor moved once: the larger of the two times binds.
    """

    flops: int
    size_bytes: int
    flops_per_sec: float
    bytes_per_sec: float

    @property
    def compute_secs(self) -> float:
        """Of the multiply-adds."""
        return self.flops / self.flops_per_sec

    @property
    def memory_secs(self) -> float:
        """Of moving input, weight, bias and output once."""
        return self.size_bytes / self.bytes_per_sec

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
    return Bound(2 * spec.multiply_adds, spec.size_bytes, limits.flops_per_sec, limits.bytes_per_sec)


def measure(loops: Loops, *, settle_secs: float = 0.005, time_calls: TimeCalls | None = None) -> Limits:
    """Limits where there are no kernels to take turns with: of five samples of each loop the best counts.

    That is what the machine can do when nothing else disturbs it.

    Parameters
    ----------
    settle_secs, time_calls
        As in `convt_tvm.measure.interleaved`.
    """
    samples = interleaved(
        loops.functions,
        rounds=_ROUNDS,
        min_sample_secs=_SAMPLE_SECS,
        settle_secs=settle_secs,
        time_calls=time_calls,
    )
    return loops.limits(samples, min)


def processor_loops(spec: ConvTranspose2dSpec, dtype: str, threads: int) -> Loops:
    """The loops for this processor; compiled once for each dtype and number of threads.

    Parameters
    ----------
    dtype
        ``float32`` or ``float64``: a spec's ``accumulator_dtype``; or ``bfloat16``, for its dot products.
    threads
        What `convt_tvm.runtime.set_num_threads` was told.
    """
    library = _library(dtype, threads)
    # Configures this thread's pool, which a function that is not one of our kernels would not do.
    runtime.get_num_threads()
    sums = _sums_dtype(dtype)
    values = torch.ones((threads, ACCUMULATORS, _lanes(sums)), dtype=getattr(torch, sums))
    flops = (2 if sums == dtype else 4) * values.numel() * STEPS
    written_bytes = prod(spec.output_shape) * DTYPE_BYTES[spec.dtype]
    source, target = (_rows(size, sums, threads) for size in (spec.size_bytes - written_bytes, written_bytes))
    size_bytes = source.nbytes + target.nbytes
    blocks = -(-size_bytes // (BLOCK_ROWS * source[0, 0].nbytes * threads))
    passes = -(-CALL_BYTES * threads // size_bytes)
    return Loops(
        threads,
        dtype,
        Loop(functools.partial(library.multiply_add, values, STEPS), flops),
        tuple(
            Loop(functools.partial(move, source, target, blocks, passes), passes * size_bytes)
            for move in (library.move, library.move_past_caches)
        ),
    )


def _rows(size_bytes: int, dtype: str, threads: int) -> torch.Tensor:
    """Memory of so many bytes at least, full of ones: ``(threads, rows, ROW_VECTORS, lanes)``."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    row = (ROW_VECTORS, _lanes(dtype))
    row_bytes = prod(row) * torch_dtype.itemsize
    shape = (threads, max(1, -(-size_bytes // (threads * row_bytes))), *row)
    memory = anonymous_memory(prod(shape) * torch_dtype.itemsize)
    rows = torch.empty(shape, dtype=torch_dtype) if memory is None else torch.frombuffer(memory, dtype=torch_dtype)
    return rows.view(shape).fill_(1)


def _sums_dtype(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


def _lanes(dtype: str) -> int:
    return Target.parse("llvm").vector_bytes * 8 // torch.finfo(getattr(torch, dtype)).bits


@functools.cache
def _library(dtype: str, threads: int) -> Any:
    """The loaded functions ``multiply_add(values, steps)`` and ``move[_past_caches](source, target, blocks, passes)``.

    A block of the moves is a part of the source's rows to read, and the same part of the target's to write.
    """
    import tvm_ffi

    with tempfile.TemporaryDirectory(prefix="convt-tvm-limits-") as scratch:
        path = Path(scratch) / "limits.so"
        _compile(dtype, threads, path)
        # TVM's parser leaves the frames of all its callers in cycles, which keep their tensors.
        gc.collect()
        # An opened library stays mapped when its file is gone.
        return tvm_ffi.load_module(str(path))


_STORE = "convt_store_past_caches"


def _define_store(body: Any, dtype: str, lanes: int) -> Any:
    """`body` with the function `_STORE` to call, which stores a vector past the caches."""
    from convt_tvm.statements import import_llvm

    bits = torch.finfo(getattr(torch, dtype)).bits
    vector = f"<{lanes} x {'double' if bits == 64 else 'float'}>"
    text = f"""
define linkonce_odr hidden void @{_STORE}(ptr %to, {vector} %value) alwaysinline {{
  store {vector} %value, ptr %to, align {lanes * bits // 8}, !nontemporal !0
  ret void
}}

!0 = !{{i32 1}}
"""
    return import_llvm(body, text)


def _compile(dtype: str, threads: int, path: Path) -> None:
    import tvm
    from tvm.script import tirx as T

    from convt_tvm.bfloat16 import PAIR, add_products, define_functions
    from convt_tvm.stream import end_copies

    pairs, dtype = dtype == "bfloat16", _sums_dtype(dtype)
    lanes = _lanes(dtype)
    host = Target.parse("llvm")
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

    def mover(name: str, *, past: bool) -> Any:
        def store(target: Any, place: list[Any], value: Any) -> None:
            if past:
                T.evaluate(T.call_extern("void", _STORE, T.address_of(target[(*place, 0)]), value))
            else:
                T.buffer_store(target, value, [*place, every_lane])

        def finish() -> None:
            for statement in end_copies(host.arch) if past else ():
                T.evaluate(statement.value)

        @T.prim_func  # type: ignore[untyped-decorator]
        def move(whole_source: T.handle, whole_target: T.handle, blocks: T.int64, passes: T.int64):  # type: ignore[no-untyped-def]  # noqa: ANN202
            T.func_attr({"global_symbol": name})
            reads = T.int64()
            writes = T.int64()
            source = T.match_buffer(whole_source, (threads, reads, ROW_VECTORS, lanes), dtype)
            target = T.match_buffer(whole_target, (threads, writes, ROW_VECTORS, lanes), dtype)
            for t in T.parallel(threads):
                acc = T.alloc_buffer((ROW_VECTORS, lanes), dtype, scope="local", annotations=on_stack)
                for j in T.unroll(ROW_VECTORS):
                    for lane in T.vectorized(lanes):
                        acc[j, lane] = T.cast(0, dtype)
                for _ in T.serial(passes):
                    for b in T.serial(blocks):
                        for k in T.serial(T.truncdiv(b * reads, blocks), T.truncdiv((b + 1) * reads, blocks)):
                            for j in T.unroll(ROW_VECTORS):
                                for lane in T.vectorized(lanes):
                                    acc[j, lane] = acc[j, lane] + source[t, k, j, lane]
                        for k in T.serial(T.truncdiv(b * writes, blocks), T.truncdiv((b + 1) * writes, blocks)):
                            for j in T.unroll(ROW_VECTORS):
                                store(target, [t, k, j], acc[j, every_lane])
                finish()

        return move.with_body(_define_store(move.body, dtype, lanes)) if past else move

    processor = host.to_tvm()
    # As in `compiler.compile_module`.
    with processor, tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        if pairs:
            multiply_add = multiply_add.with_body(define_functions(multiply_add.body))
        moves = {name: mover(name, past=past) for name, past in (("move", False), ("move_past_caches", True))}
        module = tvm.IRModule({"multiply_add": multiply_add, **moves})
        tvm.compile(module, target=processor).export_library(str(path))
