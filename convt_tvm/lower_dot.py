"""From scheduled phase forms on pairs of bfloat16 to the functions of a kernel library: sums become dot products."""

from typing import Any

import tvm
from tvm import tirx

from convt_tvm.bfloat16 import PAIR, add_products
from convt_tvm.compute import PARTIAL, layout_of, spec_of
from convt_tvm.layout import Window
from convt_tvm.lower import lower_kernel
from convt_tvm.lower_window import transpose_window
from convt_tvm.rewrite import find_guard, find_load, rewrite
from convt_tvm.shuffle import ramp
from convt_tvm.statements import at_start

__all__ = ["lower_dot_kernel"]

Statement = Any


def lower_dot_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled `function` on pairs as ``convt(input, packed, [bias,] output)``, output NCHW."""
    window = Window.of(spec_of(function), layout_of(function))
    kernel = lower_kernel(function)["convt"]
    return tvm.IRModule({"convt": kernel.with_body(transpose_window(rewrite(kernel.body, _add_products), window))})


def _add_products(node: Any) -> Statement | None:
    """What stands for a loop over lanes that adds the products of a pair of channels; None for any other statement."""
    match node:
        case tirx.For(body=tirx.BufferStore() as store) if str(store.buffer.name).startswith(PARTIAL):
            pair, weight = (find_load(store.value, name) for name in ("window", "packed"))
            if pair is None:
                return None
        case _:
            return None
    lanes = int(node.extent)
    *place, lane = (at_start(index, [node]) for index in store.indices)
    sums = tirx.BufferLoad(store.buffer, [*place, ramp(lane, lanes)])
    *place_of_weight, first = (at_start(index, [node]) for index in weight.indices)
    weights = tirx.BufferLoad(weight.source, [*place_of_weight, ramp(first, 2 * lanes)])
    values = tirx.Broadcast(tirx.BufferLoad(pair.source, pair.indices), lanes)
    added = add_products(sums, tirx.reinterpret(f"{PAIR}x{lanes}", weights), values, lanes)
    statement = tirx.BufferStore(store.buffer, added, [*place, ramp(lane, lanes)])
    guard = find_guard(store.value)
    return statement if guard is None else tirx.IfThenElse(guard, statement, None)
