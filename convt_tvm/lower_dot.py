"""From scheduled phase forms on pairs of bfloat16 to the functions of a kernel library: sums become dot products."""

from collections.abc import Callable
from typing import Any

import tvm
from tvm import tirx

from convt_tvm.bfloat16 import PAIR, add_products, pair_at
from convt_tvm.compute import layout_of, spec_of, target_of
from convt_tvm.dot_layout import reads_pairs
from convt_tvm.lower import lower_kernel
from convt_tvm.lower_products import asks_for_weights, multiply_from_one_address

__all__ = ["lower_dot_kernel"]

Expr = Any


def lower_dot_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled `function` on pairs as ``convt(input, packed, [bias,] output)``."""
    spec, layout, target = spec_of(function), layout_of(function), target_of(function)
    kernel = lower_kernel(function)["convt"]
    # Of the input itself what is found is the first element of a pair.
    dtype, size = (spec.dtype, 2) if reads_pairs(spec, layout) else (PAIR, 1)

    def read(address: Expr, offset: Expr, lanes: int) -> Expr:
        return pair_at(address, tvm.sym.Analyzer().simplify(tirx.indexdiv(offset, size)))

    def add(sums: Expr, pair: Expr, weights: Callable[[int], Expr], lanes: int) -> Expr:
        pairs = tirx.reinterpret(f"{PAIR}x{lanes}", weights(2 * lanes))
        return add_products(sums, pairs, tirx.Broadcast(pair, lanes), lanes)

    asks_ahead = asks_for_weights(spec, layout, target)
    body = multiply_from_one_address(kernel.body, dtype, read, add, asks_ahead=asks_ahead)
    return tvm.IRModule({"convt": kernel.with_body(body)})
