"""From NCHW to NHWC by vectors: reads them along the columns of channels, and writes their transposes."""

from typing import Any

from tvm import DataType, tirx

from convt_tvm.compute import IN_VECTORS
from convt_tvm.layout import Window
from convt_tvm.shuffle import pieces, ramp, transpose_values
from convt_tvm.statements import at_start, rewrite, sequence, with_value

__all__ = ["transpose_window"]

Expr = Any
Statement = Any


def transpose_window(body: Statement, window: Window, vector_bytes: int) -> Statement:
    """`body` with the loop over the window's columns that has `IN_VECTORS` replaced.

    Inside is a loop over a power of two of channels; around are others, over channels and rows. Squares of as many
    columns and channels as a vector has values are transposed at a time, and fill half the vector registers.
    """

    def change(node: Any) -> Statement | None:
        match node:
            case tirx.For(body=tirx.For(body=tirx.BufferStore() as store)) if IN_VECTORS in node.annotations:
                if store.buffer.name == "window":
                    lanes = vector_bytes // DataType(str(store.buffer.dtype)).itemsize
                    return _copy_rows(node, store, window, lanes)
        return None

    return rewrite(body, change)


def _copy_rows(columns: Any, store: Any, window: Window, lanes: int) -> Statement:
    """A row of some channels: zeros to the left and right of the image's, and transposes in between."""
    channels = columns.body
    n, row, _, first = (at_start(index, [columns, channels]) for index in store.indices)
    count, dtype = int(channels.extent), str(store.buffer.dtype)
    value = store.value if window.is_inside else store.value.args[1]

    def put(column: Expr, channel: Expr, values: Expr, size: int) -> Statement:
        return tirx.BufferStore(store.buffer, values, [n, row, column, ramp(channel, size)])

    def clear(start: int, stop: int) -> list[Statement]:
        zero, column = tirx.const(0, dtype), tirx.Var("w", "int32")
        zeros = tirx.Broadcast(zero, count) if count > 1 else zero
        return [_loop(column, stop - start, put(column + start, first, zeros, count))] if start < stop else []

    def copy(start: Expr, size: int) -> list[Statement]:
        """So many columns, by squares where they are fewer than the channels."""
        statements: list[Statement] = []
        side = min(size, count)
        for offset in range(0, count, side):

            def read(channel: int, lane: Expr, offset: int = offset) -> Expr:
                of_channel = with_value(value, channels.loop_var, offset + channel)
                return with_value(of_channel, columns.loop_var, start + lane)

            transposed = transpose_values(read, side, size, dtype, statements)
            statements += [put(start + j, first + offset, values, side) for j, values in enumerate(transposed)]
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
    return tirx.IfThenElse(tirx.all(row >= top, row < bottom), copied, clear(0, window.width)[0])


def _loop(variable: Any, extent: int, body: Statement) -> Statement:
    return tirx.For(variable, tirx.const(0, "int32"), tirx.const(extent, "int32"), tirx.ForKind.SERIAL, body)
