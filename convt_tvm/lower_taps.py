"""From scheduled forms that sum channels before taps to the functions of a kernel library.

A vector of positions may end behind the image, and one of columns that a tap reads begin or end outside of it. They
are read by loads that leave lanes out (``vmovups`` with a mask), which LLVM does not make of a condition for each lane.
"""

import functools
from collections.abc import Sequence
from math import gcd
from typing import Any

import tvm
from tvm import DataType, tirx
from tvm.tirx.analysis import undefined_vars

from convt_tvm.compute import IN_VECTORS, SUMS, spec_of, target_of
from convt_tvm.compute_taps import PANEL, PART, PRODUCT, tap_layout_of
from convt_tvm.lower import align_stack, lower_kernel
from convt_tvm.lower_products import define_turns, take_turn
from convt_tvm.shuffle import ramp, transpose_values, vector_dtype
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.statements import (
    LLVM_TYPES,
    at_start,
    find_guard,
    find_load,
    import_llvm,
    inside,
    nest,
    rebuild,
    rewrite,
    sequence,
    split_guard,
    with_value,
)
from convt_tvm.stream import ask_for
from convt_tvm.tap_layout import summed_channels
from convt_tvm.target import Target

__all__ = ["gather_vectors", "lower_tap_kernel"]

Expr = Any
Loop = Any
Statement = Any

_LOAD_WHERE = """
define linkonce_odr hidden {vector} @{name}(ptr %address, {mask} %inside) alwaysinline {{
  %values = call {vector} @llvm.masked.load.v{suffix}.p0(ptr %address, i32 1, {mask} %inside, {vector} zeroinitializer)
  ret {vector} %values
}}

declare {vector} @llvm.masked.load.v{suffix}.p0(ptr, i32, {mask}, {vector})
"""


def lower_tap_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled `function` as ``convt(input, packed, [bias,] output)``."""
    spec, layout, target = spec_of(function), tap_layout_of(function), target_of(function)
    kernel = lower_kernel(function, asks_ahead=False)["convt"]
    has_parts = spec.ci // spec.groups > summed_channels(spec)
    texts: dict[str, str] = {}

    def change(node: Any) -> Statement | None:
        match node:
            case tirx.AllocBuffer() if str(node.buffer.name) == PANEL:
                return tirx.SeqStmt([node, *align_stack(str(node.buffer.dtype))])
            case tirx.AllocBuffer() if str(node.buffer.name).startswith(PART) and has_parts:
                # LLVM, which unrolls few parts, would have sums of all channels in registers besides.
                return tirx.SeqStmt([take_turn(), node])
            case tirx.For():
                loops, store = inside(node)
                name = str(store.buffer.name) if isinstance(store, tirx.BufferStore) else ""
                if name == PANEL and IN_VECTORS in node.annotations:
                    return _transpose(loops, store, spec, target)
                if loops[-1].kind != tirx.ForKind.VECTORIZED:
                    return None
                if name == PANEL:
                    return _copy(loops, store, layout.positions, texts)
        return None

    body = rewrite(gather_vectors(kernel.body), change)
    body = import_llvm(body, "".join(texts.values())) if texts else body
    return tvm.IRModule({"convt": kernel.with_body(define_turns(body) if has_parts else body)})


def gather_vectors(body: Statement) -> Statement:
    """`body` with sums over channels read in vectors where they are added to those over taps."""
    texts: dict[str, str] = {}

    def change(node: Any) -> Statement | None:
        if not isinstance(node, tirx.For):
            return None
        loops, store = inside(node)
        if loops[-1].kind != tirx.ForKind.VECTORIZED or not isinstance(store, tirx.BufferStore):
            return None
        if not str(store.buffer.name).startswith(SUMS) or find_guard(store.value) is None:
            return None
        return _read_vectors(loops, store, find_load(store.value, PRODUCT), texts)

    body = rewrite(body, change)
    return import_llvm(body, "".join(texts.values())) if texts else body


def _copy(loops: Sequence[Loop], store: Any, positions: int, texts: dict[str, str]) -> Statement:
    """The copy of a panel of so many `positions`, which asks for each channel's in the next panel.

    They lie in a cache line of their own, of all channels in as many pages.
    """
    around = [loop for loop in loops if loop.kind == tirx.ForKind.SERIAL]
    vectors = loops[len(around) :]
    load: Any = find_load(store.value, "input")
    *place, position = (at_start(index, vectors) for index in load.indices)
    asked = ask_for(load.source, [[*place, position + positions]], to_write=False)
    converts = load.ty.dtype != store.buffer.dtype
    copied = _convert_vectors(vectors, store) if converts else _read_vectors(vectors, store, load, texts)
    return nest(around, sequence([*asked, copied]))


def _convert_vectors(loops: Sequence[Loop], store: Any) -> Statement:
    """A nest of `loops` that stores vectors of values of 16 bits, for which not every processor has masks.

    One with lanes for which the condition does not hold is stored a value at a time.
    """
    *around, lane = loops
    guard, value = split_guard(store.value)
    whole = nest([lane], tirx.BufferStore(store.buffer, value, store.indices))
    if guard is not None:
        each = rebuild(lane, store, kind=tirx.ForKind.SERIAL)
        whole = tirx.IfThenElse(with_value(guard, lane.loop_var, int(lane.extent) - 1), whole, each)
    return nest(around, whole)


def _transpose(loops: Sequence[Loop], store: Any, spec: ConvTranspose2dSpec, target: Target) -> Statement:
    """The copy of a panel from NHWC, channels of positions to positions of channels, by squares in registers.

    Positions behind the image hold those of the last one: what they give is not read.
    """
    channel, position = loops
    dtype, lanes = str(store.buffer.dtype), target.vector_bytes // DTYPE_BYTES[spec.accumulator_dtype]
    side = gcd(int(channel.extent), lanes)
    load: Any = find_load(store.value, "input")
    *place, first_position, first_channel = (at_start(index, loops) for index in load.indices)
    *to, _, _ = store.indices
    across, along = tirx.Var("channels", "int32"), tirx.Var("positions", "int32")

    def read(row: int, lane: Expr) -> Expr:
        at = tirx.min(first_position + along * side + row, spec.ih * spec.iw - 1)
        return tirx.BufferLoad(load.source, [*place, at, first_channel + across * side + lane]).astype(dtype)

    statements: list[Statement] = []
    for number, values in enumerate(transpose_values(read, side, side, dtype, statements)):
        indices = [*to, across * side + number, ramp(along * side, side)]
        statements.append(tirx.BufferStore(store.buffer, values, indices))
    body = sequence(statements)
    for variable, extent in ((along, position.extent), (across, channel.extent)):
        body = tirx.For(variable, 0, int(extent) // side, tirx.ForKind.SERIAL, body)
    return body


def _read_vectors(loops: Sequence[Loop], store: Any, load: Any, texts: dict[str, str]) -> Statement:
    """A nest of `loops` that stores, or adds, vectors of what `load` reads, in lanes for which a condition holds.

    What does not depend on lanes is asked outside of all loops on which it does not depend either. `texts` takes the
    texts of functions called, by name.
    """
    lane, lanes = loops[-1], int(loops[-1].extent)
    guard = find_guard(store.value)
    by_lane, by_loop = [], dict[int, list[Expr]]()
    for condition in [] if guard is None else _conjuncts(guard):
        variables = set(undefined_vars(condition))
        depth = max((i for i, loop in enumerate(loops, 1) if loop.loop_var in variables), default=0)
        if depth == len(loops):
            by_lane.append(_for_lanes(condition, lane, lanes))
        else:
            by_loop.setdefault(depth, []).append(condition)

    *row, first = (at_start(index, [lane]) for index in load.indices)
    values = tirx.BufferLoad(load.source, [*row, ramp(first, lanes)])
    if by_lane:
        dtype, vector = str(load.ty.dtype), vector_dtype(str(load.ty.dtype), lanes)
        name = f"convt_where_{vector}"
        texts[name] = _text(name, dtype, lanes)
        address = tirx.address_of(tirx.BufferLoad(load.source, [*row, first]))
        values = tirx.call_extern(vector, name, address, functools.reduce(tirx.And, by_lane))
    *place, start = (at_start(index, [lane]) for index in store.indices)
    indices = [*place, ramp(start, lanes)]
    if isinstance(store.value, tirx.Add):
        values = tirx.BufferLoad(store.buffer, indices) + values
    statement: Statement = tirx.BufferStore(store.buffer, values, indices)
    for depth in reversed(range(len(loops))):
        if depth in by_loop:
            statement = tirx.IfThenElse(tirx.all(*by_loop[depth]), statement, None)
        statement = nest(loops[:depth][-1:], statement)
    return statement


def _conjuncts(condition: Expr) -> list[Expr]:
    """The conditions that all have to hold for `condition` to."""
    if isinstance(condition, tirx.And):
        return [*_conjuncts(condition.a), *_conjuncts(condition.b)]
    return [condition]


def _for_lanes(comparison: Any, lane: Loop, lanes: int) -> Expr:
    """A `comparison` for each iteration of the loop `lane`.

    As a rule a side of it grows by one, or is the same in all. But of ``0 <= c - 2*t`` and ``c - 2*t < 2`` TVM makes
    ``t == c // 2``.
    """

    def side(value: Expr) -> Expr:
        values = [with_value(value, lane.loop_var, i) for i in range(lanes)]
        for step, vector in ((1, ramp(values[0], lanes)), (0, tirx.Broadcast(values[0], lanes))):
            if all(tvm.sym.Analyzer().can_prove_equal(each, values[0] + step * i) for i, each in enumerate(values)):
                return vector
        return tirx.Shuffle(values, [tirx.const(i, "int32") for i in range(lanes)])

    return type(comparison)(side(comparison.a), side(comparison.b))


def _text(name: str, dtype: str, lanes: int) -> str:
    """A load of values where a mask holds, zeros elsewhere, in LLVM's language."""
    return _LOAD_WHERE.format(
        name=name,
        vector=f"<{lanes} x {LLVM_TYPES[dtype]}>",
        mask=f"<{lanes} x i1>",
        suffix=f"{lanes}f{DataType(dtype).bits}",
    )
