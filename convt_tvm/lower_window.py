"""Copies of the input's window, in vectors.

From NCHW to NHWC, or from NHWC to rows of channels, vectors are read as they lie, and their transposes written. Rows
that stay rows begin and end in zeros, and one vector may hold values and zeros: it takes a load that leaves lanes out
(``vmovups`` with a mask). LLVM, given a condition for each value, copies a row of 14 by 3 loads and 5 stores.
"""

from typing import Any

import tvm
from tvm import DataType, tirx

from convt_tvm.compute import IN_VECTORS
from convt_tvm.layout import CACHE_LINE_BYTES, Window
from convt_tvm.shuffle import pieces, ramp, transpose_values, vector_dtype
from convt_tvm.statements import (
    LLVM_TYPES,
    at_start,
    depends_on,
    find_load,
    import_llvm,
    rewrite,
    sequence,
    split_guard,
    with_value,
)
from convt_tvm.target import Target

__all__ = ["fill_window"]

Expr = Any
Statement = Any


FEW_VECTORS, FEW_HALF_VECTORS = 3, 8
"""Vectors in a row of a window beyond which LLVM copies it, as fast or by 3 to 5 % faster: of a cache line, or of half.

Layers of 14 x 14 and 16 x 16 images took 0.89 and 0.94 of the time on an Emerald Rapids server. On a Zen 3 core
15 layers with rows of up to 12 vectors took a median of 0.98 (512 to 3 channels on 40 x 25, rows of 26 values, 0.85 to
0.99), those with more than 8 no less than without.
"""

_LOAD_SOME = """
define linkonce_odr hidden {vector} @{name}(ptr %row, i32 %place, i32 %size) alwaysinline {{
  %one = insertelement {places} poison, i32 %place, i64 0
  %places = shufflevector {places} %one, {places} poison, {places} zeroinitializer
  %each = add {places} %places, {numbers}
  %all = insertelement {places} poison, i32 %size, i64 0
  %sizes = shufflevector {places} %all, {places} poison, {places} zeroinitializer
  %inside = icmp ult {places} %each, %sizes
  %far = sext i32 %place to i64
  %from = getelementptr {element}, ptr %row, i64 %far
  %values = call {vector} @llvm.masked.load.v{suffix}.p0(ptr %from, i32 1, {mask} %inside, {vector} zeroinitializer)
  ret {vector} %values
}}

declare {vector} @llvm.masked.load.v{suffix}.p0(ptr, i32, {mask}, {vector})
"""


def fill_window(body: Statement, window: Window, axes: str, target: Target) -> Statement:
    """`body` with the copy of a `window`, its axes in the order of `axes`, done in vectors.

    A loop over columns with `IN_VECTORS` is replaced by transposes. Inside is a loop over a power of two of channels;
    around are others, over channels and rows. Squares of as many columns and channels as a vector has values are
    transposed at a time, and fill half the vector registers. Of other copies those of short rows of NCHW, with nothing
    to convert, are replaced where the processor has loads that leave lanes out.
    """
    functions: dict[str, str] = {}

    def change(node: Any) -> Statement | None:
        match node:
            case tirx.For(body=tirx.For(body=tirx.BufferStore() as store)) if IN_VECTORS in node.annotations:
                if store.buffer.name == "window":
                    return _transpose(node, store, window, axes, _lanes(store, target))
            case tirx.For(body=tirx.BufferStore() as store) if store.buffer.name == "window" and target.loads_some:
                lanes = _lanes(store, target)
                few = FEW_VECTORS if target.vector_bytes == CACHE_LINE_BYTES else FEW_HALF_VECTORS
                if axes[-1] == "w" and int(node.extent) == window.width <= few * lanes:
                    return _copy_row(node, store, window, lanes, functions)
        return None

    filled = rewrite(body, change)
    return import_llvm(filled, "".join(functions.values())) if functions else filled


def _lanes(store: Any, target: Target) -> int:
    """Values of a vector register."""
    return target.vector_bytes // int(DataType(str(store.buffer.dtype)).itemsize)


def _copy_row(columns: Any, store: Any, window: Window, lanes: int, functions: dict[str, str]) -> Statement | None:
    """A row of one channel; None where it is no row of the input, or not in its dtype.

    `functions` takes the texts of those called, by name.
    """
    dtype, (guard, load) = str(store.buffer.dtype), split_guard(store.value)
    left, right = window.columns_inside
    source = find_load(load, "input")
    if source is None or not source.same_as(load) or not depends_on(source.indices[-1], columns.loop_var):
        return None
    *row, first = (with_value(index, columns.loop_var, left) for index in source.indices)
    *place, _ = store.indices
    size = int(source.source.shape[-1])

    def read(start: int, count: int) -> Expr:
        return tirx.BufferLoad(source.source, [*row, ramp(first + start - left, count)])

    def read_some(start: int, count: int) -> Expr:
        vector = vector_dtype(dtype, count)
        name = f"convt_some_{vector}"
        functions[name] = _load_some_text(name, dtype, count)
        address = tirx.address_of(tirx.BufferLoad(source.source, [*row, tirx.const(0, "int32")]))
        return tirx.call_extern(vector, name, address, first + start - left, tirx.const(size, "int32"))

    def put(start: int, count: int, values: Expr) -> Statement:
        return tirx.BufferStore(store.buffer, values, [*place, ramp(tirx.const(start, "int32"), count)])

    cleared, copied = [], []
    for start, count in pieces(window.width, lanes):
        cleared.append(put(start, count, _zeros(dtype, count)))
        if left <= start and start + count <= right:
            copied.append(put(start, count, read(start, count)))
        elif start + count <= left or right <= start:
            copied.append(cleared[-1])
        else:
            copied.append(put(start, count, read_some(start, count)))
    inside = tirx.const(True, "bool") if guard is None else with_value(guard, columns.loop_var, left)
    if tvm.sym.Analyzer().can_prove(inside):
        return sequence(copied)
    return tirx.IfThenElse(inside, sequence(copied), sequence(cleared))


def _load_some_text(name: str, dtype: str, lanes: int) -> str:
    """A load of values from a place in a row of some size, zeros before and behind it, in LLVM's language."""
    element = LLVM_TYPES[dtype]
    return _LOAD_SOME.format(
        name=name,
        element=element,
        vector=f"<{lanes} x {element}>",
        places=f"<{lanes} x i32>",
        mask=f"<{lanes} x i1>",
        suffix=f"{lanes}f{DataType(dtype).bits}",
        numbers=f"<{', '.join(f'i32 {lane}' for lane in range(lanes))}>",
    )


def _transpose(columns: Any, store: Any, window: Window, axes: str, lanes: int) -> Statement:
    """A row of some channels: zeros to the left and right of the image's, and transposes in between."""
    channels, by_channels = columns.body, axes[-1] == "c"
    first = {axis: at_start(index, [columns, channels]) for axis, index in zip(axes, store.indices, strict=True)}
    # Pairs of channels are no conditional value, but made of two.
    count, dtype, (guard, value) = int(channels.extent), str(store.buffer.dtype), split_guard(store.value)

    def put(column: Expr, channel: Expr, values: Expr, size: int) -> Statement:
        """Store so many values side by side, of channels or of columns from these on."""
        place = {**first, "c": first["c"] + channel, "w": column}
        place[axes[-1]] = ramp(place[axes[-1]], size)
        return tirx.BufferStore(store.buffer, values, [place[axis] for axis in axes])

    def clear(start: int, stop: int) -> list[Statement]:
        column, channel = tirx.Var("w", "int32"), tirx.Var("c", "int32")
        if start == stop:
            return []
        if by_channels:
            return [_loop(column, stop - start, put(column + start, 0, _zeros(dtype, count), count))]
        zero = _zeros(dtype, 1)
        return [_loop(channel, count, _loop(column, stop - start, put(column + start, channel, zero, 1)))]

    def read(channel: Expr, column: Expr) -> Expr:
        return with_value(with_value(value, channels.loop_var, channel), columns.loop_var, column)

    def copy(start: Expr, size: int) -> list[Statement]:
        """So many columns, by squares where they are fewer than the channels, or more."""
        statements: list[Statement] = []
        side = min(size, count)
        for offset in range(0, count if by_channels else size, side):

            def vector(row: int, lane: Expr, offset: int = offset) -> Expr:
                return read(offset + row, start + lane) if by_channels else read(lane, start + offset + row)

            turned = transpose_values(vector, side, size if by_channels else count, dtype, statements)
            for number, values in enumerate(turned):
                place = (start + number, offset) if by_channels else (start + offset, number)
                statements.append(put(*place, values, side))
        return statements

    left, right = window.columns_inside
    whole = (right - left) // lanes
    statements = clear(0, left)
    if whole:
        block = tirx.Var("w", "int32")
        statements.append(_loop(block, whole, tirx.SeqStmt(copy(block * lanes + left, lanes))))
    if (right - left) % lanes:
        for start, size in pieces(right - left, lanes)[whole:]:
            statements += copy(tirx.const(left + start, "int32"), size)
    statements += clear(right, window.width)
    copied = sequence(statements)
    top, bottom = window.rows_inside
    if (top, bottom) == (0, window.height):
        return copied
    inside = tirx.all(first["h"] >= top, first["h"] < bottom)
    if int(store.buffer.shape[axes.index("h")]) < window.height:
        # A chunk's rows are counted from its first, those of the condition from the image's.
        if guard is None:
            return copied
        inside = with_value(guard, columns.loop_var, left)
    return tirx.IfThenElse(inside, copied, clear(0, window.width)[0])


def _zeros(dtype: str, count: int) -> Expr:
    zero = tirx.const(0, dtype)
    return tirx.Broadcast(zero, count) if count > 1 else zero


def _loop(variable: Any, extent: int, body: Statement) -> Statement:
    return tirx.For(variable, tirx.const(0, "int32"), tirx.const(extent, "int32"), tirx.ForKind.SERIAL, body)
