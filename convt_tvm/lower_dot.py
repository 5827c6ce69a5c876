"""From scheduled phase forms on pairs of bfloat16 to the functions of a kernel library: sums become dot products."""

from typing import Any

import tvm
from tvm import tirx

from convt_tvm.bfloat16 import PAIR, add_products, pair_at
from convt_tvm.compute import PARTIAL, layout_of, spec_of
from convt_tvm.layout import Window
from convt_tvm.lower import lower_kernel
from convt_tvm.lower_window import transpose_window
from convt_tvm.shuffle import ramp
from convt_tvm.statements import at_start, element_number, find_guard, find_load, inside, nest, rewrite

__all__ = ["lower_dot_kernel"]

Expr = Any
Statement = Any


def lower_dot_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled `function` on pairs as ``convt(input, packed, [bias,] output)``, output NCHW."""
    window = Window.of(spec_of(function), layout_of(function))
    kernel = lower_kernel(function)["convt"]
    return tvm.IRModule({"convt": kernel.with_body(transpose_window(rewrite(kernel.body, _multiply), window))})


def _multiply(node: Any) -> Statement | None:
    """What stands for a nest of loops that adds products of pairs to partial sums; None for any other statement."""
    loops, node = inside(node)
    guard = None
    if isinstance(node, tirx.IfThenElse):
        # Where column phases are not unrolled `lower_kernel` has put it there.
        guard, node = node.condition, node.then_case
    if not (loops and isinstance(node, tirx.BufferStore) and str(node.buffer.name).startswith(PARTIAL)):
        return None
    window, image, weight = (find_load(node.value, name) for name in ("window", "input", "packed"))
    pair = image if window is None else window
    if pair is None or weight is None:
        return None
    lane = loops[-1]
    lanes = int(lane.extent)

    # Unrolled loops and the one around them read at constant distances from one address. Where they are sums of indices
    # of 32 bits LLVM makes vectors of those, to take them apart again (dilated/k3d2, two thirds as fast).
    within = next((i for i in reversed(range(len(loops) - 1)) if loops[i].kind != tirx.ForKind.UNROLLED), 0)
    first = [at_start(index, loops[within:]) for index in pair.indices]
    offset = tvm.sym.Analyzer().simplify(element_number(pair.source, pair.indices) - element_number(pair.source, first))
    # Of the image the first of a pair's two elements was found.
    offset = offset if window is not None else tvm.sym.Analyzer().simplify(tirx.indexdiv(offset, 2))
    value = pair_at(tirx.address_of(tirx.BufferLoad(pair.source, first)), offset)

    *place, start = (at_start(index, [lane]) for index in node.indices)
    sums = tirx.BufferLoad(node.buffer, [*place, ramp(start, lanes)])
    *place_of_weight, first_weight = (at_start(index, [lane]) for index in weight.indices)
    weights = tirx.BufferLoad(weight.source, [*place_of_weight, ramp(first_weight, 2 * lanes)])
    added = add_products(sums, tirx.reinterpret(f"{PAIR}x{lanes}", weights), tirx.Broadcast(value, lanes), lanes)
    body = tirx.BufferStore(node.buffer, added, [*place, ramp(start, lanes)])
    guard = find_guard(node.value) if guard is None else guard
    if guard is not None:
        body = tirx.IfThenElse(guard, body, None)
    return nest(loops[:-1], body)
