"""How the sums of a tile go from registers to memory in whole vectors: transposed, or phases by turns, if need be."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from tvm import tirx

from convt_tvm.bfloat16 import LANES, transpose_pairs
from convt_tvm.shuffle import binary, define, extract, interleave, pieces, ramp, transpose, transpose_values
from convt_tvm.spec import Pair
from convt_tvm.statements import on_stack, rebuild, sequence, with_value

__all__ = ["store_channels", "store_columns", "store_places", "store_positions", "stream_columns"]

Expr = Any
Loop = Any
Put = Callable[[int, Expr, Any, int], Any]
"""The statement that stores a vector of so many values: at a channel and a place in the row, counted from a tile's.

The values are side by side in memory: along the row, or channels of one place in channels_last.
"""


def store_channels(
    loops: Sequence[Loop], value: Expr, position: Expr, count: int, positions: int, store: Put, *, pairs: bool
) -> Any:
    """Store the first `count` of the `positions` in a row, for as many channels as a vector has lanes.

    `loops` are that over lanes and those that count the position. With `pairs`, two values next to each other are
    rounded and then moved together.
    """
    lane, *others = loops
    lanes = int(lane.extent)
    staged, statements = _stage([*others, lane], value, [position, lane.loop_var], (positions, lanes))
    pairs = pairs and lanes in LANES
    for start, size in pieces(count, 2 * lanes if pairs else lanes):
        vectors = [tirx.BufferLoad(staged, [start + i, ramp(0, lanes)]) for i in range(size)]
        if pairs and size > 1:
            columns = list(transpose_pairs(vectors, lanes, statements))
        else:
            columns = list(transpose(vectors, lanes, value.ty.dtype, statements))
        statements += [store(channel, start, vector, size) for channel, vector in enumerate(columns)]
    return sequence(statements)


def store_positions(
    loops: Sequence[Loop],
    value: Expr,
    position: Expr,
    count: int,
    positions: int,
    store: Put,
    left: Expr | None,
    channels: int,
) -> Any:
    """Store the first `count` of the `positions` in a row, all channels of one side by side.

    `loops` are as for `store_channels`. Of the `channels` of a group some may be `left` for a vector that is not full.
    """
    lane, *others = loops
    lanes = int(lane.extent)
    staged, statements = _stage([*others, lane], value, [position, lane.loop_var], (positions, lanes))
    vectors = [tirx.BufferLoad(staged, [i, ramp(0, lanes)]) for i in range(count)]
    whole = sequence([store(0, i, vector, lanes) for i, vector in enumerate(vectors)])
    if left is not None:
        some = [
            store(offset, i, extract(vector, offset, size, lanes), size)
            for i, vector in enumerate(vectors)
            for offset, size in binary(channels % lanes)
        ]
        rest = tirx.IfThenElse(left > 0, sequence(some), None) if some else None
        whole = tirx.IfThenElse(left >= lanes, whole, rest)
    return sequence([*statements, whole])


def store_columns(
    loops: Sequence[Loop],
    value: Expr,
    place: Sequence[Expr],
    count: int,
    shape: Pair,
    lanes: int,
    store: Put,
) -> Any:
    """Store the first `count` positions in a row of one channel, where vectors of columns are by turns of each phase.

    `loops` count the `place`: a phase and a column of the tile, whose `shape` is in phases and columns.
    """
    staged, statements = _stage(loops, value, place, shape)
    for number, vector in enumerate(_weave(staged, shape, lanes, statements)):
        start = number * lanes
        for offset, size in binary(max(0, min(lanes, count - start))):
            statements.append(store(0, start + offset, extract(vector, offset, size, lanes), size))
    return sequence(statements)


def stream_columns(
    loops: Sequence[Loop],
    value: Expr,
    place: Sequence[Expr],
    count: int,
    shape: Pair,
    carried: Any,
    line: Callable[..., Any],
    *,
    at_end: bool,
) -> Any:
    """Write what `store_columns` stores in whole cache lines; a row's last tile writes its last line as well.

    `carried` holds the vector before the tile's first, and `line` writes the line that ends among the values of a
    vector: at a position, of the vector before and it.
    """
    lanes = int(carried.indices[-1].lanes)
    staged, statements = _stage(loops, value, place, shape)
    vectors = [define(carried, lanes, value.ty.dtype, statements)]
    vectors += _weave(staged, shape, lanes, statements)
    used = -(-count // lanes)
    for number, (before, now) in enumerate(pairwise(vectors[: used + 1])):
        statements.append(line(number * lanes, before, now, at_end=at_end and number == used - 1))
    last = vectors[used]
    if at_end:
        statements.append(line(used * lanes, last, last, at_end=True))
    else:
        statements.append(tirx.BufferStore(carried.source, last, carried.indices))
    return sequence(statements)


def store_places(
    loops: tuple[Loop | None, Loop | None, Loop],
    value: Expr,
    count: int,
    shape: Pair,
    lanes: int,
    store: Put,
    left: Expr | None,
    channels: int,
) -> Any:
    """Store the first `count` positions in a row, the channels of each side by side, where vectors are of columns.

    `loops` count the channels, phases and columns of a tile; there is none for what is counted once. The tile's `shape`
    is in channels and phases. Of the `channels` of a group some may be `left` for a block that is not full. Phases and
    vectors stay loops: unrolled, fcn8s/up8 took 13 seconds to compile.
    """
    (channel, phase, column), (block, phases) = loops, shape
    residue = 0 if phase is None else phase.loop_var

    def some(filled: int, first: Expr, room: int) -> Any:
        """A vector of columns, the first of which is `first`, where there is `room` for positions in the row."""
        statements = list[Any]()
        for start, size in pieces(filled, lanes):

            def read(row: int, lane: Expr, start: int = start) -> Expr:
                of_channel = value if channel is None else with_value(value, channel.loop_var, start + row)
                return with_value(of_channel, column.loop_var, first + lane)

            vectors = transpose_values(read, size, lanes, value.ty.dtype, statements)
            for lane, vector in enumerate(vectors):
                stored = store(start, (first + lane) * phases + residue, vector, size)
                if (lane + 1) * phases <= room:
                    statements.append(stored)
                elif lane * phases < room:
                    statements.append(tirx.IfThenElse(lane * phases + residue < room, stored, None))
        return sequence(statements)

    def every(filled: int) -> Any:
        """All vectors of columns of a phase."""
        whole, rest = divmod(count, lanes * phases)
        number, parts = tirx.Var("vector", "int32"), list[Any]()
        if whole:
            full = some(filled, number * lanes, lanes * phases)
            parts.append(tirx.For(number, 0, whole, tirx.ForKind.SERIAL, full))
        if rest:
            parts.append(some(filled, whole * lanes, rest))
        return sequence(parts)

    body, last = every(block), channels % block
    if left is not None:
        body = tirx.IfThenElse(left >= block, body, every(last))
    return body if phase is None else rebuild(phase, body, kind=tirx.ForKind.SERIAL)


def _stage(loops: Sequence[Loop], value: Expr, indices: Sequence[Expr], shape: Pair) -> tuple[Any, list[Any]]:
    """A buffer in registers with `value` at `indices` for all of `loops`, the last of them as a vector.

    Or as some, of a power of two of lanes: LLVM takes 48 apart (kernelbench/75 took three times as long).
    """
    staged = tirx.decl_buffer(shape, value.ty.dtype, name="staged")
    *loops, lane = loops
    extent = int(lane.extent)
    size = extent & -extent
    if size < extent:
        number, place = tirx.Var("vector", "int32"), tirx.Var("lane", "int32")
        value, *indices = (with_value(each, lane.loop_var, number * size + place) for each in (value, *indices))
        loops.append(tirx.For(number, 0, extent // size, tirx.ForKind.UNROLLED, lane.body))
        lane = tirx.For(place, 0, size, tirx.ForKind.VECTORIZED, lane.body)
    nest = rebuild(lane, tirx.BufferStore(staged, value, indices), kind=tirx.ForKind.VECTORIZED)
    for loop in reversed(loops):
        nest = rebuild(loop, nest, kind=tirx.ForKind.UNROLLED)
    return staged, [on_stack(tirx.AllocBuffer(staged)), nest]


def _weave(staged: Any, shape: Pair, lanes: int, statements: list[Any]) -> Iterator[Any]:
    """Vectors of a row, whose values a buffer of that `shape`, in phases and columns, has by turns of each phase."""
    phases, columns = shape
    for first in range(0, columns, lanes):
        by_phase = [tirx.BufferLoad(staged, [phase, ramp(first, lanes)]) for phase in range(phases)]
        yield from interleave(by_phase, lanes, str(staged.dtype), statements)
