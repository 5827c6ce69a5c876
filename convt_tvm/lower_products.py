"""Sums of products as statements on vectors, with what they read of the image at constant distances from one address.

With lanes along channels a value of the image meets a vector of weights. Left as an index each of a tile's values is a
sum of numbers of 32 bits; LLVM makes vectors of those, to take them apart again in the innermost loop. It did in 2 of
25 layers drawn, and in 6 of 25 in channels_last; dilated/k3d2 in bfloat16 took half as long again.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import tvm
from tvm import tirx

from convt_tvm.compute import PARTIAL
from convt_tvm.shuffle import ramp
from convt_tvm.statements import (
    at_start,
    depends_on,
    element_number,
    find_guard,
    find_load,
    import_llvm,
    inside,
    nest,
    rewrite,
)

__all__ = ["multiply_from_one_address", "multiply_vectors"]

Expr = Any
Statement = Any
Read: TypeAlias = Callable[[Expr, Expr], Expr]
"""The value so many elements after an address."""
Add: TypeAlias = Callable[[Expr, Expr, Callable[[int], Expr], int], Expr]
"""Sums plus the products of a value with as many weights, which the function given loads, in so many lanes."""

_READ = """
define linkonce_odr hidden {llvm} @convt_{dtype}_at(ptr %address, i32 %offset) alwaysinline {{
  %far = sext i32 %offset to i64
  %place = getelementptr {llvm}, ptr %address, i64 %far
  %value = load {llvm}, ptr %place, align 1
  ret {llvm} %value
}}
"""
_LLVM_TYPES = {"float32": "float", "float64": "double"}


def multiply_vectors(body: Statement, dtype: str) -> Statement:
    """`body` with its sums of products of `dtype` on vectors, lanes along channels."""

    def read(address: Expr, offset: Expr) -> Expr:
        return tirx.call_extern(dtype, f"convt_{dtype}_at", address, offset)

    def add(sums: Expr, value: Expr, weights: Callable[[int], Expr], lanes: int) -> Expr:
        return sums + tirx.Broadcast(value, lanes) * weights(lanes)

    rewritten = multiply_from_one_address(body, dtype, read, add)
    return import_llvm(rewritten, _READ.format(llvm=_LLVM_TYPES[dtype], dtype=dtype))


def multiply_from_one_address(body: Statement, dtype: str, read: Read, add: Add) -> Statement:
    """`body` with each nest of loops that adds products to partial sums replaced.

    Those that read images of `dtype`, and whose innermost loop, over channels, is to become vectors.
    """

    def change(node: Any) -> Statement | None:
        loops, node = inside(node)
        guard = None
        if isinstance(node, tirx.IfThenElse):
            # Where column phases are not unrolled the condition is around the sum already.
            guard, node = node.condition, node.then_case
        if not (loops and isinstance(node, tirx.BufferStore) and str(node.buffer.name).startswith(PARTIAL)):
            return None
        window, image, weight = (find_load(node.value, name) for name in ("window", "input", "packed"))
        load = image if window is None else window
        lane = loops[-1]
        if load is None or weight is None or str(load.ty.dtype) != dtype or lane.kind != tirx.ForKind.VECTORIZED:
            return None
        if any(depends_on(index, lane.loop_var) for index in load.indices):
            # Lanes along groups read vectors of the image.
            return None
        lanes = int(lane.extent)

        # Unrolled loops and the one around them.
        within = next((i for i in reversed(range(len(loops) - 1)) if loops[i].kind != tirx.ForKind.UNROLLED), 0)
        first = [at_start(index, loops[within:]) for index in load.indices]
        offset = element_number(load.source, load.indices) - element_number(load.source, first)
        address = tirx.address_of(tirx.BufferLoad(load.source, first))
        value = read(address, tvm.sym.Analyzer().simplify(offset))

        *place, start = (at_start(index, [lane]) for index in node.indices)
        sums = tirx.BufferLoad(node.buffer, [*place, ramp(start, lanes)])
        *place_of_weight, first_weight = (at_start(index, [lane]) for index in weight.indices)

        def weights(count: int) -> Expr:
            return tirx.BufferLoad(weight.source, [*place_of_weight, ramp(first_weight, count)])

        added = add(sums, value, weights, lanes)
        statement = tirx.BufferStore(node.buffer, added, [*place, ramp(start, lanes)])
        guard = find_guard(node.value) if guard is None else guard
        if guard is not None:
            statement = tirx.IfThenElse(guard, statement, None)
        return nest(loops[:-1], statement)

    return rewrite(body, change)
