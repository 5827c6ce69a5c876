"""How sums leave for the output: which store writes what, in which order, and by way of which buffers.

A declaration's outputs have the extents that suit a schedule; here their stores become stores to the real tensor,
narrowed where a surplus was computed, and in whole vectors (`convt_tvm.tile_stores`) where they can be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import tvm
from tvm import DataType, tirx

from convt_tvm.bfloat16 import LANES, narrow
from convt_tvm.compute import IN_VECTORS, has_surplus_images, is_known, phase_value
from convt_tvm.layout import CACHE_LINE_BYTES, PAST_CACHES_BYTES, Band, Layout, bands, partial_sum, reaches
from convt_tvm.shuffle import pieces, ramp, vector_dtype
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.statements import (
    Clip,
    at_start,
    depends_on,
    find_store,
    nest,
    on_stack,
    rebuild,
    sequence,
    tensor,
    with_value,
)
from convt_tvm.stream import ask_for, copy_past_caches, end_copies, put_line
from convt_tvm.target import Target
from convt_tvm.tile_stores import store_channels, store_columns, store_places, store_positions, stream_columns

__all__ = ["Outputs", "last_band"]

SHORT_LOOP = 16
"""Iterations below which LLVM, vectorising a loop, leaves none over: it masks them."""
MIN_PRODUCTS = 16
"""Products in a partial sum that give cache lines the time to come (with 4, bilinear/depthwise took 4 % longer)."""

MAX_ASKED = 32
"""Cache lines in a row asked for one after the other; more are in a loop (fcn8s/up8 in channels_last has 256, which
took half a second to compile)."""

Expr = Any
Loop = Any


@dataclass
class _Gathered:
    """The rows of a task, gathered in a buffer.

    Attributes
    ----------
    buffer
        Of channels, rows and columns.
    starts
        The first position of the rows in each band.
    copy
        Makes the statement that copies a channel's rows from one byte to another.
    size_bytes
        Of a channel's rows.
    copied_bytes
        How many of them the tiles copy.
    """

    buffer: Any
    starts: dict[int, Expr]
    copy: Callable[[Expr, Expr, Expr], Any]
    size_bytes: Expr
    copied_bytes: Expr = field(default_factory=lambda: tirx.const(0, "int32"))


@dataclass
class Outputs:
    """What replaces the stores to the bands of a scheduled phase form.

    Parameters
    ----------
    spec, layout, target
        Of the phase form.
    batch
        Its number of images, which may be a variable.
    """

    spec: ConvTranspose2dSpec
    layout: Layout
    target: Target
    batch: Expr
    tensor: Any = field(init=False)
    """The output, its axes in the order of its memory."""
    _gathered: _Gathered | None = field(init=False, default=None)
    _carried: Any = field(init=False, default=None)
    """With ``streams``: the last vector of the tile before, for each channel of a block."""

    def __post_init__(self) -> None:
        """Declare the output."""
        self.tensor = tensor("output", self._place(self.batch, *self.spec.output_shape[1:]), self.spec.dtype)

    def store(self, band: Band, loops: Sequence[Loop], node: Any) -> Any:
        """What replaces `loops`, directly around the store `node` to a band."""
        spec, layout = self.spec, self.layout
        n, g, b, ob, ph, qh, qw, pw = self._indices(node)
        channels, phases, columns = spec.co // spec.groups, len(spec.axes[1].phases), int(node.buffer.shape[-2])
        stride_w = spec.stride[1]
        channel, row = b * layout.co_block + ob, self._row(band, ph, qh)
        rows = [] if layout.rows(band) == band.rows else [Clip(qh, 0, band.rows)]
        filled = [Clip(channel, 0, channels)] if channels % layout.co_block else []

        def write(value: Expr, ob: Expr, column: Expr) -> Any:
            if self._gathered is not None:
                first, buffer = self._gathered.starts[band.index] * spec.stride[0], self._gathered.buffer
                return tirx.BufferStore(buffer, _as_bits(value, str(buffer.dtype)), [ob, row - first, column])
            place = self._place(n, g * channels + b * layout.co_block + ob, row, column)
            return tirx.BufferStore(self.tensor, value, place)

        if not reaches(spec, band):
            # The bias alone: whole rows.
            if self._carried is not None:
                filling = self._fill_row([n, g * channels + channel, row, 0], node.value)
                return nest(_outside_rows(loops, node), filling, [*filled, *rows])
            column = tirx.Var("column", "int32")
            whole_row = tirx.For(column, 0, spec.ow, tirx.ForKind.SERIAL, node)
            around = [*_outside_rows(loops, node), whole_row]
            if self._is_nhwc:
                around.sort(key=lambda loop: depends_on(ob, loop.loop_var))
                if _counts_by_one(ob, around[-1].loop_var):
                    left = channels - channel if filled else None
                    place = self._fill_place(around[-1], node.value, ob, partial(write, column=column), left)
                    return nest(around[:-1], place, rows)
            return nest(around, write(node.value, ob, column), [*filled, *rows])

        # Columns in which every phase lies inside the output, and phases of the one column that may follow them.
        whole = (spec.ow - phases) // stride_w + 1
        rest = max(0, spec.ow - whole * stride_w)
        outside = next((i for i, loop in enumerate(loops) if IN_VECTORS in loop.annotations), None)
        if self._is_nhwc and not filled:
            loops = [*self._unmasked(loops[:outside], ob), *([] if outside is None else loops[outside:])]
        if outside is None:
            statement, clips = write(node.value, ob, qw * stride_w + pw), [*filled, *rows]
            if columns == whole:
                return nest(loops, statement, clips)
            nests = [nest(loops, statement, [*clips, Clip(qw, 0, whole)])]
            if rest:
                nests.append(nest(loops, statement, [*clips, Clip(qw, whole, whole + 1), Clip(pw, 0, rest)]))
            return sequence(nests)

        if self._carried is not None:
            # Sums are in registers only where constants number them, and LLVM unrolls nothing as long as this.
            loops = [*_unroll(loops[:outside], lambda loop: depends_on(ob, loop.loop_var)), *loops[outside:]]
        inner = loops[outside:]
        first_lane, first_channel, first_column = (at_start(index, inner) for index in (ob, channel, qw))
        by_channels = layout.lanes == "co"
        cast = isinstance(node.value, tirx.Cast)
        value = node.value.value if cast else node.value

        def put(lane: int, position: Expr, vector: Any, size: int) -> Any:
            if not cast or str(vector.ty.dtype).startswith(spec.dtype):
                stored = vector
            elif self._narrows and size in LANES:
                stored = narrow(vector, size)
            else:
                stored = tirx.Cast(vector_dtype(spec.dtype, size), vector)
            channel, column = first_lane + lane, first_column * stride_w + position
            if self._is_nhwc:
                return write(stored, ramp(channel, size), column)
            statement = write(stored, channel, ramp(column, size))
            if not (filled and by_channels):
                return statement
            return tirx.IfThenElse(first_channel + lane < channels, statement, None)

        def tile(count: int, *, at_end: bool) -> Any:
            column = qw - first_column
            if by_channels:
                position, positions = column * phases + pw, layout.column_block * phases
                if self._is_nhwc:
                    left = channels - first_channel if filled else None
                    return store_positions(inner, value, position, count, positions, put, left, channels)
                return store_channels(inner, value, position, count, positions, put, pairs=self._narrows)
            if self._is_nhwc:
                left = channels - first_channel if filled else None
                by_channel, by_phase = (
                    next((loop for loop in inner if depends_on(each, loop.loop_var)), None) for each in (ob, pw)
                )
                counted, shape = (by_channel, by_phase, inner[-1]), (layout.co_block, phases)
                return store_places(counted, value, count, shape, layout.vector_lanes, put, left, channels)
            shape = phases, layout.column_block
            loops = sorted(inner, key=lambda loop: not loop.loop_var.same_as(pw))
            if self._carried is not None:
                line = partial(self._line, [n, g * channels + channel, row, 0], first_column * stride_w)
                carried = tirx.BufferLoad(self._carried, [ob, ramp(0, layout.vector_lanes)])
                return stream_columns(loops, value, (pw, column), count, shape, carried, line, at_end=at_end)
            return store_columns(loops, value, (pw, column), count, shape, layout.vector_lanes, put)

        size = layout.column_block
        body = tile(size * phases, at_end=False)
        if columns != whole or self._carried is not None:
            # Where the last tile with an output begins, and the outputs that are left for it.
            last = (spec.axes[1].widest - 1) // size * size
            narrower = tile(spec.ow - last * stride_w, at_end=True)
            if last + size < columns:
                narrower = tirx.IfThenElse(first_column == last, narrower, None)
            body = tirx.IfThenElse(first_column < last, body, narrower) if last else narrower
        return nest(loops[:outside], body, rows if by_channels or self._is_nhwc else [*filled, *rows])

    def _unmasked(self, loops: Sequence[Loop], ob: Expr) -> list[Loop]:
        """`loops` with a short one over channels unrolled, whose bfloat16 LLVM would else store by a mask of its own.

        It vectorises loops of fewer than 16 iterations with what is left over in a constant mask, and where that has
        one lane it writes four bytes; see `convt_tvm.statements.Clip`. Seen with 9 channels.
        """

        def is_short(loop: Loop) -> bool:
            constant = isinstance(loop.extent, tirx.IntImm | int)
            return constant and 1 < int(loop.extent) < SHORT_LOOP and _counts_by_one(ob, loop.loop_var)

        if self.spec.dtype != "bfloat16":
            return list(loops)
        return _unroll(loops, is_short)

    def _indices(self, node: Any) -> list[Expr]:
        """The indices of a store to a band; of a tile's images that are beyond the last each is the last, as when read.

        A tile takes in the last as well, so that no other thread stores it.
        """
        n, *others = node.indices
        if has_surplus_images(self.layout, self.batch):
            n = tirx.min(n, self.batch - 1)
        return [n, *others]

    def _place(self, n: Expr, channel: Expr, row: Expr, column: Expr) -> list[Expr]:
        """The indices of a value of the output."""
        place = {"n": n, "c": channel, "h": row, "w": column}
        return [place[axis] for axis in self.spec.output_axes]

    @property
    def _is_nhwc(self) -> bool:
        """Whether the channels of a place are side by side in memory, and not the places of a channel."""
        return self.spec.output_axes == "nhwc"

    @property
    def _is_large(self) -> Expr:
        """Whether an output that streams is too large for the caches; one of a known batch size would not otherwise."""
        if self._batch_is_known:
            return tirx.const(1, "bool")
        return self.batch >= -(-PAST_CACHES_BYTES // (prod(self.spec.output_shape[1:]) * DTYPE_BYTES[self.spec.dtype]))

    @property
    def _batch_is_known(self) -> bool:
        return is_known(self.batch)

    @property
    def _narrows(self) -> bool:
        """Whether instructions round what is stored."""
        return self.spec.dtype == "bfloat16" and self.target.multiplies_pairs

    def _row(self, band: Band, ph: Expr, qh: Expr) -> Expr:
        """The output row of position `qh` in phase `ph` of `band`."""
        return qh * self.spec.stride[0] + phase_value([phase.residue for phase in band.phases], ph)

    def ahead(self, band: Band, loops: Sequence[Loop], node: Any) -> list[Any]:
        """What to do before the sums of a tile that `node`, in `loops`, stores, and beside them.

        To ask for the lines it will write, or to copy some of the rows that were gathered before.
        """
        if self._gathered is not None:
            return self._copy_along(band, loops, node, self._gathered) if band == last_band(self.spec) else []
        spec, layout = self.spec, self.layout
        output_bytes = prod(spec.output_shape) * DTYPE_BYTES[spec.dtype]
        # Of a batch of any size one image may be one of many.
        fits = self._batch_is_known and output_bytes <= self.target.cache_bytes
        waits = prod(partial_sum(spec, band)) >= MIN_PRODUCTS
        if layout.taps != "inner" or fits or not waits:
            return []
        n, g, b, ob, ph, qh, qw, _ = self._indices(node)
        channels, phases = spec.co // spec.groups, len(spec.axes[1].phases)
        channel = tirx.min(g * channels + b * layout.co_block + ob, spec.co - 1)
        row, first = self._row(band, ph, tirx.min(qh, band.rows - 1)), at_start(qw, loops)
        size, line = layout.column_block * phases, CACHE_LINE_BYTES // DTYPE_BYTES[spec.dtype]
        around = _outside_rows(loops, node)
        if self._is_nhwc:
            # A line holds channels side by side, of one column or of several.
            line = max(1, line // spec.co)
            beside = [loop for loop in around if _counts_by_one(ob, loop.loop_var)]
            around = [loop for loop in around if loop not in beside]
            channel = at_start(channel, beside)

        def ask(column: Expr) -> Any:
            return sequence(ask_for(self.tensor, [self._place(n, channel, row, column)], to_write=True))

        number, lines = tirx.Var("line", "int32"), -(-(size - 1) // line)
        offset = tirx.min(number * line, size - 1)
        kind = tirx.ForKind.UNROLLED if lines < MAX_ASKED else tirx.ForKind.SERIAL
        asked = tirx.For(number, 0, lines + 1, kind, ask(tirx.min(first * spec.stride[1] + offset, spec.ow - 1)))
        if self._carried is not None:
            # Of a row's lines those at its ends go through the caches.
            ends = {0: 0, layout.columns(spec) - layout.column_block: spec.ow - 1}
            some = sequence([tirx.IfThenElse(first == tile, ask(column), None) for tile, column in ends.items()])
            asked = some if self._batch_is_known else tirx.IfThenElse(self._is_large, some, asked)
        for loop in reversed(around):
            asked = tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, asked)
        return [asked]

    def _copy_along(self, band: Band, loops: Sequence[Loop], node: Any, gathered: _Gathered) -> list[Any]:
        """Copy a part of the rows that are complete: those before a tile's, in equal shares for all tiles of its rows.

        There are few lines in a share, so that the core takes on their stores and goes on with sums.
        """
        spec, layout = self.spec, self.layout
        _, _, b, _, ph, qh, qw, _ = node.indices
        tiles, channels = layout.columns(spec) // layout.column_block, layout.co_block
        row, column = (at_start(index, loops) for index in (qh, qw))
        row_bytes = spec.stride[0] * spec.ow * DTYPE_BYTES[spec.dtype]
        run = layout.row_block * row_bytes
        # Simplified: what cancels in a condition has the pass FlattenBuffer divide by zero.
        simplify = tvm.sym.Analyzer().simplify
        before = simplify(row - gathered.starts[band.index]) * row_bytes - run

        shares = len(band.phases) * tiles
        pieces = max(1, shares // channels)
        size = -(-run // pieces)
        each = -(-channels * pieces // shares)
        piece = tirx.Var("piece", "int32")
        share = ph * tiles + simplify(tirx.indexdiv(column, layout.column_block))
        number = share * each + piece
        ob, part = tirx.indexdiv(number, pieces), tirx.indexmod(number, pieces)
        first, stop = (before + tirx.min(count * size, run) for count in (part, part + 1))
        filled = tirx.min(channels, spec.co // spec.groups - b * channels)
        copied = gathered.copy(ob, tirx.min(first, gathered.size_bytes), tirx.min(stop, gathered.size_bytes))
        copied = tirx.IfThenElse(tirx.all(before >= 0, ob < filled), copied, None)
        gathered.copied_bytes = tirx.min((layout.chunk(band) - layout.row_block) * row_bytes, gathered.size_bytes)
        return [tirx.For(piece, 0, each, tirx.ForKind.SERIAL, copied)]

    def pass_caches(self, loop: Loop, visit: Callable[[Any], Any]) -> Any:
        """The body of `loop`, one of whose iterations writes a run of rows of each channel of a block."""
        return self._stream(loop, visit) if self.layout.streams else self._gather(loop, visit)

    def _stream(self, loop: Loop, visit: Callable[[Any], Any]) -> Any:
        """That body, whose vectors go past the caches, each joined with the one before in its row to a cache line."""
        shape = self.layout.co_block, self.layout.vector_lanes
        self._carried = carried = tirx.decl_buffer(shape, self.spec.dtype, name="carried")
        body = visit(loop.body)
        self._carried = None
        return tirx.SeqStmt([on_stack(tirx.AllocBuffer(carried)), body, *end_copies(self.target.arch)])

    def _line(self, row: Sequence[Expr], first: Expr, position: int, before: Expr, now: Expr, *, at_end: bool) -> Any:
        """The statement that writes the line ending among `now`, at a position of the tile that is `first` in its row.

        `row` has the indices of the row's first value. A tile's first vector may be that of the row.
        """
        begin, address = (tirx.address_of(tirx.BufferLoad(self.tensor, place)) for place in ([0, 0, 0, 0], row))
        size = self.spec.ow if at_end or position == 0 else None
        return put_line(self._is_large, begin, address, first + position, before, now, size)

    def _fill_row(self, row: Sequence[Expr], value: Expr) -> Any:
        """A row that is the same value all over, past the caches."""
        number, lanes = tirx.Var("number", "int32"), self.layout.vector_lanes
        vector = tirx.Broadcast(value, lanes)
        line = self._line(row, number * lanes, 0, vector, vector, at_end=True)
        return tirx.For(number, 0, -(-self.spec.ow // lanes) + 1, tirx.ForKind.SERIAL, line)

    def _fill_place(
        self, lane: Loop, value: Expr, ob: Expr, put: Callable[[Expr, Expr], Any], left: Expr | None
    ) -> Any:
        """The channels that `lane` counts, of one place, in vectors; some may be `left` where a block is not full.

        Left to itself LLVM makes vectors of a channel's places, and scatters them: 32 to 64 channels with 3 x 3 taps 2
        apart and stride 5, where 16 of 25 outputs are the bias alone, took 2.6 times as long on a Zen 4 core.
        """
        count, channels = int(lane.extent), self.spec.co // self.spec.groups

        def some(start: int, size: int) -> Any:
            if isinstance(value, tirx.FloatImm) and size > 1:
                # Of a constant in bfloat16 TVM makes no vector.
                zeros = tirx.Cast(vector_dtype(self.spec.dtype, size), tirx.Broadcast(tirx.const(value.value), size))
                return put(zeros, ramp(at_start(ob, [lane]) + start, size))
            number = tirx.Var("lane", "int32")
            at = (with_value(each, lane.loop_var, start + number) for each in (value, ob))
            return tirx.For(number, 0, size, tirx.ForKind.VECTORIZED, put(*at))

        def every(filled: int) -> Any:
            limit = self.target.vector_bytes // DTYPE_BYTES[self.spec.accumulator_dtype]
            return sequence([some(start, size) for start, size in pieces(filled, limit)])

        if left is None:
            return every(count)
        first_left, rest = at_start(left, [lane]), channels % count
        ending = tirx.IfThenElse(first_left > 0, every(rest), None) if rest else None
        return tirx.IfThenElse(first_left >= count, every(count), ending)

    def _gather(self, loop: Loop, visit: Callable[[Any], Any]) -> Any:
        """That body, whose rows are gathered in a buffer first.

        Its runs then go past the caches: most of them beside the sums of the last band, the others after them.
        """
        spec, layout = self.spec, self.layout
        found = {band.index: place for band in bands(spec) if (place := find_store(loop.body, (f"band{band.index}",)))}
        if len(found) < len(bands(spec)):
            raise AssertionError(f"a task gathers bands {sorted(found)} of {len(bands(spec))}, and writes all rows")
        starts = {index: at_start(store.indices[5], loops) for index, (loops, store) in found.items()}
        # Of the loop that bands are joined in, the variable is that of the one done first.
        loops, store = min(found.items(), key=lambda item: item[0] == last_band(spec).index)[1]
        n, g, b = (at_start(index, loops) for index in store.indices[:3])
        rows = min(spec.oh, max(layout.chunk(band) for band in bands(spec)) * spec.stride[0])
        channels = spec.co // spec.groups

        # TVM keeps buffers of bfloat16 in float32.
        dtype = "uint16" if spec.dtype == "bfloat16" else spec.dtype
        buffer = tirx.decl_buffer((layout.co_block, rows, spec.ow), dtype, name="gathered")

        first_row = at_start(store.indices[5], loops) * spec.stride[0]
        run_bytes = tirx.min(rows, spec.oh - first_row) * (spec.ow * DTYPE_BYTES[spec.dtype])

        def copy(ob: Expr, first_byte: Expr, stop_byte: Expr) -> Any:
            target = tirx.BufferLoad(self.tensor, [n, g * channels + b * layout.co_block + ob, first_row, 0])
            source = tirx.BufferLoad(buffer, [ob, 0, 0])
            addresses = tirx.address_of(target), tirx.address_of(source)
            return copy_past_caches(*addresses, first_byte, stop_byte, run_bytes)

        self._gathered = gathered = _Gathered(buffer, starts, copy, run_bytes)
        body = visit(loop.body)
        self._gathered = None
        ob = tirx.Var("ob", "int32")
        rest = copy(ob, gathered.copied_bytes, run_bytes)
        copies = tirx.For(ob, 0, tirx.min(layout.co_block, channels - b * layout.co_block), tirx.ForKind.SERIAL, rest)
        return tirx.SeqStmt([on_stack(tirx.AllocBuffer(buffer)), body, copies, *end_copies(self.target.arch)])


def last_band(spec: ConvTranspose2dSpec) -> Band:
    """The band that a task gathers last: that with the most products, beside which there is time to copy."""
    return max(bands(spec), key=lambda band: band.taps * len(band.phases) if reaches(spec, band) else 0)


def _counts_by_one(index: Expr, variable: Any) -> bool:
    """Whether `index` grows by one with `variable`."""
    step = with_value(index, variable, 1) - with_value(index, variable, 0)
    return bool(tvm.sym.Analyzer().can_prove_equal(step, 1))


def _outside_rows(loops: Sequence[Loop], store: Any) -> list[Loop]:
    """Those of `loops` that do not count columns or column phases of a `store` to a band."""
    return [loop for loop in loops if not any(depends_on(index, loop.loop_var) for index in store.indices[6:])]


def _unroll(loops: Sequence[Loop], wanted: Callable[[Loop], bool]) -> list[Loop]:
    """`loops`, those that are `wanted` so unrolled."""
    return [rebuild(loop, loop.body, kind=tirx.ForKind.UNROLLED) if wanted(loop) else loop for loop in loops]


def _as_bits(value: Expr, dtype: str) -> Expr:
    """`value`, for a buffer of `dtype`: that of the value, or unsigned integers of the same size."""
    lanes = int(DataType(str(value.ty.dtype)).lanes)
    if str(value.ty.dtype).startswith(dtype):
        return value
    if isinstance(value, tirx.Cast | tirx.FloatImm):
        return _round_to_bfloat16(value.value if isinstance(value, tirx.Cast) else tirx.const(value.value), lanes)
    return tirx.reinterpret(vector_dtype(dtype, lanes), value)


def _round_to_bfloat16(value: Expr, lanes: int) -> Expr:
    """The bits of float32 rounded to bfloat16, to even where it lies in the middle; no NaN becomes a number."""

    def constant(number: int) -> Expr:
        one = tirx.const(number, "uint32")
        return tirx.Broadcast(one, lanes) if lanes > 1 else one

    number = tirx.reinterpret(vector_dtype("uint32", lanes), value)
    last = tirx.bitwise_and(tirx.shift_right(number, constant(16)), constant(1))
    rounded = tirx.shift_right(number + last + constant(0x7FFF), constant(16))
    quiet = tirx.bitwise_or(tirx.shift_right(number, constant(16)), constant(0x40))
    is_nan = tirx.bitwise_and(number, constant(0x7FFFFFFF)) > constant(0x7F800000)
    return tirx.Cast(vector_dtype("uint16", lanes), tirx.Select(is_nan, quiet, rounded))
