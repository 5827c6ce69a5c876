"""From scheduled phase forms on pairs of bfloat16 to the functions of a kernel library: sums become dot products.

TVM computes bfloat16 in float32, arguments of instructions included. So the two instructions that take and give
bfloat16 come as functions of LLVM, on bits, which LLVM puts in the place of their calls:

- ``vdpbf16ps`` adds to each of its sums two products. It takes subnormal numbers for zero.
- ``vcvtneps2bf16`` rounds a vector of sums, for which TVM's own arithmetic takes five instructions. It takes subnormal
  numbers for zero.
"""

from typing import Any

import tvm
from tvm import ir, tirx

from convt_tvm.compute import PARTIAL, layout_of, spec_of
from convt_tvm.compute_dot import PAIR
from convt_tvm.layout import Window
from convt_tvm.lower import lower_kernel
from convt_tvm.lower_window import transpose_window
from convt_tvm.rewrite import find_guard, find_load, rewrite
from convt_tvm.statements import at_start
from convt_tvm.shuffle import ramp

__all__ = ["lower_dot_kernel"]

_LANES = (16, 8, 4)
"""Vectors of float32 for which there are instructions."""
_FUNCTIONS = """
declare <{n} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{n} x float>, <{m} x bfloat>, <{m} x bfloat>)
define linkonce_odr hidden <{n} x float> @convt_dot{n}(<{n} x float> %s, <{n} x i32> %a, <{n} x i32> %b) alwaysinline {{
  %x = bitcast <{n} x i32> %a to <{m} x bfloat>
  %y = bitcast <{n} x i32> %b to <{m} x bfloat>
  %r = call <{n} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{n} x float> %s, <{m} x bfloat> %x, <{m} x bfloat> %y)
  ret <{n} x float> %r
}}
define linkonce_odr hidden <{n} x i16> @convt_narrow{n}(<{n} x float> %s) alwaysinline {{
  %x = fptrunc <{n} x float> %s to <{n} x bfloat>
  %r = bitcast <{n} x bfloat> %x to <{n} x i16>
  ret <{n} x i16> %r
}}
"""

Statement = Any


def lower_dot_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled `function` on pairs as ``convt(input, packed, [bias,] output)``, output NCHW."""
    spec, layout = spec_of(function), layout_of(function)
    lanes = layout.vector_lanes
    kernel = lower_kernel(function)["convt"]

    def change(node: Any) -> Statement | None:
        match node:
            case tirx.For(body=tirx.BufferStore() as store) if str(store.buffer.name).startswith(PARTIAL):
                return _dot(node, lanes)
            case tirx.BufferStore(value=tirx.Cast() as cast):
                return _narrow(node, cast)
        return None

    functions = "".join(_FUNCTIONS.format(n=n, m=2 * n, bits=32 * n) for n in _LANES)
    body = transpose_window(rewrite(kernel.body, change), Window.of(spec, layout))
    imported = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", ir.StringImm(functions), body)
    return tvm.IRModule({"convt": kernel.with_body(imported)})


def _dot(loop: Any, lanes: int) -> Statement | None:
    """What stands for a loop over lanes that adds the products of a pair of channels; None for one that adds none."""
    store = loop.body
    pair, weight = (find_load(store.value, name) for name in ("window", "packed"))
    if pair is None:
        return None
    *place, lane = (at_start(index, [loop]) for index in store.indices)
    sums = tirx.BufferLoad(store.buffer, [*place, ramp(lane, lanes)])
    *place_of_weight, first = (at_start(index, [loop]) for index in weight.indices)
    weights = tirx.BufferLoad(weight.source, [*place_of_weight, ramp(first, 2 * lanes)])
    added = tirx.call_pure_extern(
        f"float32x{lanes}",
        f"convt_dot{lanes}",
        sums,
        tirx.reinterpret(f"{PAIR}x{lanes}", weights),
        tirx.Broadcast(tirx.BufferLoad(pair.source, pair.indices), lanes),
    )
    statement = tirx.BufferStore(store.buffer, added, [*place, ramp(lane, lanes)])
    guard = find_guard(store.value)
    return statement if guard is None else tirx.IfThenElse(guard, statement, None)


def _narrow(store: Any, cast: Any) -> Statement | None:
    """A store of a vector of sums as bfloat16; None for one of fewer lanes than there is an instruction for."""
    lanes = int(tvm.DataType(str(cast.ty.dtype)).lanes)
    if lanes not in _LANES:
        return None
    bits = tirx.call_pure_extern(f"uint16x{lanes}", f"convt_narrow{lanes}", cast.value)
    return tirx.BufferStore(store.buffer, tirx.reinterpret(str(cast.ty.dtype), bits), store.indices)
