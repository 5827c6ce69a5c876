"""From scheduled phase forms to the two functions of a kernel library.

`compute` declares outputs whose extents suit a schedule: row bands apart, channel blocks and columns rounded up. Here
each store to such an output becomes a store to the real tensor, guarded where the declaration computes a surplus. It
happens after scheduling, so that a schedule sees a plain perfect loop nest, and before vectorisation, so that no
store is executed out of bounds by a lane.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm import ir, s_tir, tirx

from convt_tvm.compute import IN_VECTORS, SKIPS_ROWS, SUMS, layout_of, lookup, spec_of
from convt_tvm.layout import CACHE_LINE_BYTES, Band, Window, bands, kernel_columns
from convt_tvm.shuffle import binary, extract, interleave, pieces, ramp, transpose
from convt_tvm.spec import Pair

__all__ = ["at_start", "flatten_blocks", "lower_kernel", "lower_pack", "on_stack"]

MAX_STACK_BYTES = 32 << 10
"""Largest buffer on a thread's stack: a row of accumulators, not the input's window."""

Expr = Any
Loop = Any
Store = Callable[[Sequence[Loop], Any], Any]
"""Makes the statement that replaces the loops directly around a store, and the store."""


def flatten_blocks(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """`function` as loops, allocations and stores, without blocks."""
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        tirx.transform.StmtSimplify(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerOpaqueBlock(),
    ]
    module = tvm.ir.transform.Sequential(passes)(tvm.IRModule({"main": function}))
    return module["main"]


def on_stack(node: Any) -> Any:
    """The allocation `node`, on the stack if it is small: LLVM keeps values in registers only if no pointer escapes.

    TVM allocates 1 KiB and more from a pool, in a call for each task.
    """
    buffer = node.buffer
    elements = prod(buffer.shape)
    if not isinstance(elements, int | tirx.IntImm):
        return node
    if int(elements) * tvm.DataType(str(buffer.dtype)).itemsize > MAX_STACK_BYTES:
        return node
    return tirx.AllocBuffer(buffer, {**node.annotations, "disable_lower_builtin": tirx.const(1, "bool")})


def _align_stack(dtype: str) -> list[Any]:
    """Statements that make LLVM begin the stack of the function around them at a cache line.

    It does so for a variable that is a vector and has to be in memory, and TVM asks for 16 bytes at most. The sums
    beside which partial sums are in registers are spilled there: at any address they take 3 to 9 % of a kernel's time
    more (kernelbench/75, seed/rect, dcgan/4), as each vector lies in two lines.
    """
    lanes = CACHE_LINE_BYTES // tvm.DataType(dtype).itemsize
    line = tirx.decl_buffer((1,), f"{dtype}x{lanes}", name="line")
    flag = tirx.const(1, "bool")
    zeros = tirx.Broadcast(tirx.const(0, dtype), lanes)
    allocation = tirx.AllocBuffer(line, {"tirx.volatile": flag, "disable_lower_builtin": flag})
    return [allocation, tirx.BufferStore(line, zeros, [tirx.const(0, "int32")])]


def _loop(loop: Loop, body: Any, first: Expr = None, extent: Expr = None, kind: Any = None) -> Any:
    """`loop` around another body, over other values or of another kind if they are given."""
    first = loop.min if first is None else first
    extent = loop.extent if extent is None else extent
    kind = loop.kind if kind is None else kind
    return tirx.For(loop.loop_var, first, extent, kind, body, loop.thread_binding, loop.annotations, loop.step)


def _replace_stores(statement: Any, stores: Mapping[str, Store], skip: Callable[[Any], Any]) -> Any:
    """`statement` with each store to a buffer that `stores` names replaced, loops directly around it included.

    `skip` replaces loops with `SKIPS_ROWS`.
    """

    def visit(node: Any, loops: tuple[Loop, ...] = ()) -> Any:
        match node:
            case tirx.For() if SKIPS_ROWS in node.annotations:
                replaced = skip(node)
                for loop in reversed(loops):
                    replaced = _loop(loop, replaced)
                return replaced
            case tirx.For() if isinstance(node.body, tirx.For | tirx.BufferStore):
                return visit(node.body, (*loops, node))
            case tirx.BufferStore() if str(node.buffer.name) in stores:
                return stores[str(node.buffer.name)](loops, node)
            case _:
                replaced = visit_parts(node)
                for loop in reversed(loops):
                    replaced = _loop(loop, replaced)
                return replaced

    def visit_parts(node: Any) -> Any:
        match node:
            case tirx.SeqStmt():
                return tirx.SeqStmt([visit(part) for part in node.seq])
            case tirx.For():
                return _loop(node, visit(node.body))
            case tirx.IfThenElse():
                other = None if node.else_case is None else visit(node.else_case)
                return tirx.IfThenElse(node.condition, visit(node.then_case), other)
            case tirx.AttrStmt():
                return tirx.AttrStmt(node.node, node.attr_key, node.value, visit(node.body))
            case tirx.AllocBuffer() if str(node.buffer.name).startswith(SUMS):
                return tirx.SeqStmt([on_stack(node), *_align_stack(str(node.buffer.dtype))])
            case tirx.AllocBuffer():
                return on_stack(node)
            case tirx.BufferStore() | tirx.DeclBuffer() | tirx.Bind() | tirx.Evaluate() | tirx.AssertStmt():
                return node
            case _:
                raise AssertionError(f"a scheduled phase form holds an unexpected {type(node).__name__}")

    return visit(statement)


def _find_load(node: Any, buffer: str) -> Any:
    """A load from `buffer` in an expression or a nest of loops around a store; None if there is none."""
    if isinstance(node, ir.TensorLoad):
        return node if node.source.name == buffer else None
    parts = [getattr(node, field, None) for field in ("body", "value", "a", "b")]
    if isinstance(node, ir.Call):
        parts += node.args
    found = (_find_load(part, buffer) for part in parts if part is not None)
    return next((load for load in found if load is not None), None)


def _skip_rows(nest: Any, axis: int, inside: Pair) -> Any:
    """`nest`, if any row of the window that it reads is `inside`; `axis` is where the window's indices name the row."""
    load = _find_load(nest, "window")
    if load is None:
        return nest
    first = last = load.indices[axis]
    loop = nest
    while isinstance(loop, tirx.For):
        first, last = _with_value(first, loop.loop_var, 0), _with_value(last, loop.loop_var, loop.extent - 1)
        loop = loop.body
    return tirx.IfThenElse(tirx.all(last >= inside[0], first < inside[1]), nest, None)


@dataclass(frozen=True)
class _Clip:
    """The part ``first <= index < stop`` of the values that an index expression takes."""

    index: Expr
    first: int
    stop: int

    def apply(self, loops: Sequence[Loop], ranges: dict[Any, tuple[Expr, Expr]], checks: list[Expr]) -> None:
        """Narrow the innermost of `loops` that the index counts with, or else add a check.

        The range of a loop, not a predicate in it: that leaves LLVM plain loops to vectorise. Given predicates it makes
        masked stores, and LLVM 22 for x86 writes four bytes where a truncating store of 16-bit values has a constant
        mask of one lane (bfloat16, 17 columns in vectors of 8).
        """
        for loop in reversed(loops):
            base = _with_value(self.index, loop.loop_var, 0)
            if tvm.sym.Analyzer().can_prove_equal(self.index - base, loop.loop_var):
                zero, extent = tirx.const(0, "int32"), loop.extent
                first = tirx.min(tirx.max(self.first - base, zero), extent)
                stop = tirx.min(tirx.max(self.stop - base, zero), extent)
                ranges[loop.loop_var] = first, tirx.max(stop - first, zero)
                return
        checks += [self.index >= self.first, self.index < self.stop]


def _with_value(expression: Expr, variable: Any, value: Expr) -> Expr:
    """`expression` where `variable` is `value`, simplified."""
    analyzer = tvm.sym.Analyzer()
    analyzer.bind(variable, tirx.const(value, "int32") if isinstance(value, int) else value)
    return analyzer.simplify(expression)


def at_start(expression: Expr, loops: Sequence[Loop]) -> Expr:
    """`expression` in the first iteration of `loops`."""
    for loop in loops:
        expression = _with_value(expression, loop.loop_var, 0)
    return expression


def _nest(loops: Sequence[Loop], store: Any, clips: Sequence[_Clip] = ()) -> Any:
    """`store` in `loops`, for the values that all of `clips` keep."""
    ranges: dict[Any, tuple[Expr, Expr]] = {}
    checks: list[Expr] = []
    for clip in clips:
        clip.apply(loops, ranges, checks)
    body = tirx.IfThenElse(tirx.all(*checks), store, None) if checks else store
    for loop in reversed(loops):
        body = _loop(loop, body, *ranges.get(loop.loop_var, (None, None)))
    return body


def _stage(loops: Sequence[Loop], value: Expr, indices: Sequence[Expr], shape: Pair) -> tuple[Any, list[Any]]:
    """A buffer in registers with `value` at `indices` for all of `loops`, the last of them as a vector."""
    staged = tirx.decl_buffer(shape, value.ty.dtype, name="staged")
    nest = tirx.BufferStore(staged, value, indices)
    for loop in reversed(loops):
        nest = _loop(loop, nest, kind=tirx.ForKind.VECTORIZED if loop is loops[-1] else tirx.ForKind.UNROLLED)
    return staged, [on_stack(tirx.AllocBuffer(staged)), nest]


def _store_channels(
    loops: Sequence[Loop], value: Expr, position: Expr, count: int, positions: int, store: Callable[..., Any]
) -> Any:
    """Store the first `count` of the `positions` in a row, for as many channels as a vector has lanes.

    `loops` are that over lanes and those that count the position.
    """
    lane, *others = loops
    lanes = int(lane.extent)
    staged, statements = _stage([*others, lane], value, [position, lane.loop_var], (positions, lanes))
    for start, size in pieces(count, lanes):
        vectors = [tirx.BufferLoad(staged, [start + i, ramp(0, lanes)]) for i in range(size)]
        columns = list(transpose(vectors, lanes, value.ty.dtype, statements))
        statements += [store(channel, start, vector, size) for channel, vector in enumerate(columns)]
    return tirx.SeqStmt(statements)


def _store_columns(
    loops: Sequence[Loop],
    value: Expr,
    place: Sequence[Expr],
    count: int,
    shape: Pair,
    lanes: int,
    store: Callable[..., Any],
) -> Any:
    """Store the first `count` positions in a row of one channel, where vectors of columns are by turns of each phase.

    `loops` count the `place`: a phase and a column of the tile, whose `shape` is in phases and columns.
    """
    phases, columns = shape
    staged, statements = _stage(loops, value, place, shape)
    for first in range(0, columns, lanes):
        vectors = [tirx.BufferLoad(staged, [phase, ramp(first, lanes)]) for phase in range(phases)]
        woven = interleave(vectors, lanes, value.ty.dtype, statements)
        for start, vector in zip(range(first * phases, count, lanes), woven, strict=False):
            for offset, size in binary(min(lanes, count - start)):
                statements.append(store(0, start + offset, extract(vector, offset, size, lanes), size))
    return tirx.SeqStmt(statements)


def _assemble(
    function: tirx.PrimFunc, name: str, output: Any, stores: Mapping[str, Store], skip: Callable[[Any], Any]
) -> tvm.IRModule:
    """A module with `function` as `name`, its outputs joined in `output` by `stores`."""
    function = flatten_blocks(function)
    inputs = [buffer for buffer in function.params if str(buffer.name) not in stores]
    body = _replace_stores(function.body, stores, skip)
    joined = tirx.PrimFunc([*inputs, output], body, function.ret_type)
    module = tvm.IRModule({name: joined.with_attrs({**function.attrs, "global_symbol": name})})
    # A store in two nests has left their loop variables defined twice.
    return tirx.transform.ConvertSSA()(module)


def lower_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled phase form `function` as ``convt(input, packed, [bias,] output)``, output NCHW."""
    spec, layout = spec_of(function), layout_of(function)
    window = Window.of(spec, layout)
    channels = spec.co // spec.groups
    (stride_h, stride_w), columns = spec.stride, layout.columns(spec)
    batch = function.params[0].shape[0]
    output = _buffer("output", (batch, *spec.output_shape[1:]), spec.dtype)

    phases = len(spec.axes[1].phases)
    # Columns in which every phase lies inside the output, and phases of the one column that may follow them.
    whole = (spec.ow - phases) // stride_w + 1
    rest = max(0, spec.ow - whole * stride_w)

    def store_band(band: Band) -> Store:
        residues = [phase.residue for phase in band.phases]

        def store(loops: Sequence[Loop], node: Any) -> Any:
            n, g, b, ob, ph, qh, qw, pw = node.indices
            channel = b * layout.co_block + ob
            row, column = qh * stride_h + lookup(residues, ph), qw * stride_w + pw
            statement = tirx.BufferStore(output, node.value, [n, g * channels + channel, row, column])
            rows = [] if layout.rows(band) == band.rows else [_Clip(qh, 0, band.rows)]
            filled = [_Clip(channel, 0, channels)] if channels % layout.co_block else []

            def one_by_one(loops: Sequence[Loop], clips: Sequence[_Clip]) -> Any:
                if columns == whole:
                    return _nest(loops, statement, clips)
                nests = [_nest(loops, statement, [*clips, _Clip(qw, 0, whole)])]
                if rest:
                    nests.append(_nest(loops, statement, [*clips, _Clip(qw, whole, whole + 1), _Clip(pw, 0, rest)]))
                return tirx.SeqStmt(nests) if len(nests) > 1 else nests[0]

            outside = next((i for i, loop in enumerate(loops) if IN_VECTORS in loop.annotations), None)
            if outside is None:
                return one_by_one(loops, [*filled, *rows])
            inner = loops[outside:]
            first_channel, first_column = at_start(channel, inner), at_start(qw, inner)
            by_channels = layout.lanes == "co"
            cast = isinstance(node.value, tirx.Cast)
            value = node.value.value if cast else node.value

            def put(lane: int, position: int, vector: Any, size: int) -> Any:
                stored = tirx.Cast(f"{spec.dtype}x{size}" if size > 1 else spec.dtype, vector) if cast else vector
                place = [n, g * channels + first_channel + lane, row, ramp(first_column * stride_w + position, size)]
                statement = tirx.BufferStore(output, stored, place)
                if not (filled and by_channels):
                    return statement
                return tirx.IfThenElse(first_channel + lane < channels, statement, None)

            def tile(count: int) -> Any:
                column = qw - first_column
                if by_channels:
                    return _store_channels(inner, value, column * phases + pw, count, layout.column_block * phases, put)
                shape = phases, layout.column_block
                loops = sorted(inner, key=lambda loop: not loop.loop_var.same_as(pw))
                return _store_columns(loops, value, (pw, column), count, shape, layout.vector_lanes, put)

            size = layout.column_block
            body = tile(size * phases)
            if columns != whole:
                # Where the last tile begins, and the outputs that are left for it.
                last = columns - size
                narrower = tile(spec.ow - last * stride_w)
                body = tirx.IfThenElse(first_column < last, body, narrower) if last else narrower
            return _nest(loops[:outside], body, rows if by_channels else [*filled, *rows])

        return store

    def skip(nest: Any) -> Any:
        return _skip_rows(nest, 2 if layout.lanes == "ow" else 1, window.rows_inside)

    stores = {f"band{band.index}": store_band(band) for band in bands(spec)}
    return _assemble(function, "convt", output, stores, skip)


def lower_pack(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled packing `function` as ``pack(weight, packed)``."""
    ordered = function.params[-1]
    packed = _buffer("packed", ordered.shape, str(ordered.dtype))
    places = kernel_columns(spec_of(function))

    def store(loops: Sequence[Loop], node: Any) -> Any:
        block, kh, kw, ic, ob = node.indices
        return _nest(loops, tirx.BufferStore(packed, node.value, [block, kh, lookup(places, kw), ic, ob]))

    return _assemble(function, "pack", packed, {"ordered": store}, lambda nest: nest)


def _buffer(name: str, shape: Sequence[Expr], dtype: str) -> Any:
    return tirx.decl_buffer(shape, dtype, name=name, data_alignment=1)
