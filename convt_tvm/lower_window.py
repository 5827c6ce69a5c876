"""From NCHW to NHWC, or from NHWC to rows of channels: reads vectors as they lie, and writes their transposes."""

from typing import Any

from tvm import DataType, tirx

from convt_tvm.compute import IN_VECTORS
from convt_tvm.layout import Window
from convt_tvm.shuffle import pieces, ramp, transpose_values
from convt_tvm.statements import at_start, rewrite, sequence, with_value

__all__ = ["transpose_window"]

Expr = Any
Statement = Any


def transpose_window(body: Statement, window: Window, axes: str, vector_bytes: int) -> Statement:
    """`body` with the loop over columns that has `IN_VECTORS` replaced, of a `window` with its `axes` in that order.

    Inside is a loop over a power of two of channels; around are others, over channels and rows. Squares of as many
    columns and channels as a vector has values are transposed at a time, and fill half the vector registers.
    """

    def change(node: Any) -> Statement | None:
        match node:
            case tirx.For(body=tirx.For(body=tirx.BufferStore() as store)) if IN_VECTORS in node.annotations:
                if store.buffer.name == "window":
                    lanes = vector_bytes // DataType(str(store.buffer.dtype)).itemsize
                    return _copy_rows(node, store, window, axes, lanes)
        return None

    return rewrite(body, change)


def _copy_rows(columns: Any, store: Any, window: Window, axes: str, lanes: int) -> Statement:
    """A row of some channels: zeros to the left and right of the image's, and transposes in between."""
    channels, by_channels = columns.body, axes[-1] == "c"
    first = {axis: at_start(index, [columns, channels]) for axis, index in zip(axes, store.indices, strict=True)}
    count, dtype = int(channels.extent), str(store.buffer.dtype)
    value = store.value if window.is_inside else store.value.args[1]

    def put(column: Expr, channel: Expr, values: Expr, size: int) -> Statement:
        """Store so many values side by side, of channels or of columns from these on."""
        place = {**first, "c": first["c"] + channel, "w": column}
        place[axes[-1]] = ramp(place[axes[-1]], size)
        return tirx.BufferStore(store.buffer, values, [place[axis] for axis in axes])

    def clear(start: int, stop: int) -> list[Statement]:
        zero, column, channel = tirx.const(0, dtype), tirx.Var("w", "int32"), tirx.Var("c", "int32")
        if start == stop:
            return []
        if by_channels:
            zeros = tirx.Broadcast(zero, count) if count > 1 else zero
            return [_loop(column, stop - start, put(column + start, 0, zeros, count))]
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
    return tirx.IfThenElse(tirx.all(first["h"] >= top, first["h"] < bottom), copied, clear(0, window.width)[0])


def _loop(variable: Any, extent: int, body: Statement) -> Statement:
    return tirx.For(variable, tirx.const(0, "int32"), tirx.const(extent, "int32"), tirx.ForKind.SERIAL, body)
