"""From scheduled phase forms to the two functions of a kernel library.

`compute` declares outputs whose extents suit a schedule: row bands apart, channel blocks and columns rounded up. Here
each store to such an output becomes a store to the real tensor, guarded where the declaration computes a surplus. It
happens after scheduling, so that a schedule sees a plain perfect loop nest, and before vectorisation, so that no
store is executed out of bounds by a lane.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import tvm
from tvm import s_tir, tirx

from convt_tvm.bfloat16 import define_functions
from convt_tvm.compute import (
    COLUMN_CHUNKS,
    IMAGES,
    PARTIAL,
    PASSES_CACHES,
    PEELS,
    SKIPS_ROWS,
    SUMS,
    VECTORS,
    layout_of,
    phase_value,
    spec_of,
    target_of,
)
from convt_tvm.layout import (
    CACHE_LINE_BYTES,
    MANY_IMAGES,
    Layout,
    Window,
    bands,
    column_delays,
    kernel_columns,
    skips_parts,
    sums_in_parts,
    sums_taps_first,
    window_axes,
)
from convt_tvm.lower_products import asks_for_weights, multiply_vectors
from convt_tvm.lower_window import fill_window
from convt_tvm.outputs import Outputs, last_band
from convt_tvm.spec import ConvTranspose2dSpec, Pair
from convt_tvm.statements import (
    ever,
    find_guard,
    find_load,
    find_store,
    inside,
    nest,
    on_stack,
    rebuild,
    rewrite,
    sequence,
    tensor,
    with_value,
)
from convt_tvm.stream import define_copy, define_lines
from convt_tvm.target import Target

__all__ = ["align_stack", "flatten_blocks", "lower_kernel", "lower_pack"]

Expr = Any
Loop = Any
Store = Callable[[Sequence[Loop], Any], Any]
"""Makes the statement that replaces the loops directly around a store, and the store."""
Visit = Callable[[Any], Any]
"""Replaces what is to be replaced in a statement."""


@dataclass(frozen=True)
class Rules:
    """What a statement is rewritten by.

    Attributes
    ----------
    stores
        By the name of a buffer, what replaces stores to it with the loops directly around them.
    skip
        Replaces loops annotated with `SKIPS_ROWS`.
    join
        Makes one of loops annotated with `PASSES_CACHES` that follow each other.
    pass_caches
        Gives the body of loops annotated with `PASSES_CACHES`.
    peel
        Gives those that do in turn what a loop annotated with `PEELS` does.
    ahead
        By the name of a buffer, the statements to come before the sums that are stored to it: of the loops around the
        store, and the store.
    allocate
        Makes the statements that allocate sums.
    """

    stores: Mapping[str, Store]
    skip: Callable[[Any], Any] = lambda nest: nest
    join: Callable[[Any], Any] = lambda body: body
    pass_caches: Callable[[Loop, Visit], Any] = lambda loop, visit: visit(loop.body)
    peel: Callable[[Loop], list[Loop]] = lambda loop: [loop]
    ahead: Mapping[str, Callable[[Sequence[Loop], Any], list[Any]]] = field(default_factory=dict)
    allocate: Callable[[Any], list[Any]] = lambda node: [node]


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


def _allocate_sums(node: Any, spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> list[Any]:
    """Statements for the allocation `node` of a tile's sums, those of all column phases.

    All phases are stored together. Where there are few registers, and they do not hold all sums, those of one phase
    wait in memory for the others': LLVM takes registers from the sums of the second phase for those of the first, and
    loads and stores some at every step. On a Zen 3 core unet/up1, unet/up4, sam/up1 and maskrcnn/mask took 0.65 to 0.73
    of the time so, fcn8s/up8 0.70, grouped/4 0.78, most others 0.97 to 1.03, and kernelbench/81 1.07. So wait the sums
    of few channels for which there is no room beside partial sums (9 x 9 taps to one channel: 0.92). With many channels
    partial sums are short, and sums in memory cost more than they save (3 to 64 channels, 7 x 7 taps: 1.4).
    """
    allocation, dtype = on_stack(node), tvm.DataType(str(node.buffer.dtype))
    if allocation is not node and target.has_few_registers:
        vectors = prod(map(int, node.buffer.shape)) * dtype.itemsize // target.vector_bytes
        named = {f"{SUMS}{band.index}": band for band in bands(spec)}
        if sums_taps_first(spec) and sums_in_parts(spec, named[str(node.buffer.name)]):
            vectors += layout.tile_vectors * layout.phases + layout.held_vectors
        if vectors > target.vector_registers:
            annotations = {**allocation.annotations, "tirx.volatile": tirx.const(1, "bool")}
            allocation = tirx.AllocBuffer(node.buffer, annotations)
    return [allocation, *align_stack(str(dtype))]


def align_stack(dtype: str) -> list[Any]:
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


def _rewrite(statement: Any, rules: Rules) -> Any:
    """`statement` rewritten by `rules`."""

    def visit(node: Any, loops: tuple[Loop, ...] = ()) -> Any:
        match node:
            case tirx.For() if IMAGES in node.annotations:
                return _share_images(rebuild(node, visit(rules.join(node.body))))
            case tirx.For() if PASSES_CACHES in node.annotations:
                return nest(loops, rebuild(node, rules.pass_caches(node, visit)))
            case tirx.For() if PEELS in node.annotations or COLUMN_CHUNKS in node.annotations:
                parts = rules.peel(node) if PEELS in node.annotations else [node]
                parts = [rebuild(part, visit(part.body)) for part in parts]
                if COLUMN_CHUNKS in node.annotations:
                    return _chunk_columns(loops, parts, *map(int, node.annotations[COLUMN_CHUNKS]))
                return nest(loops, sequence(parts))
            case tirx.For() if SKIPS_ROWS in node.annotations:
                return nest(loops, rules.skip(node))
            case tirx.For() if isinstance(node.body, tirx.For | tirx.BufferStore):
                return visit(node.body, (*loops, node))
            case tirx.BufferStore() if str(node.buffer.name) in rules.stores:
                return rules.stores[str(node.buffer.name)](loops, node)
            case _:
                return nest(loops, visit_parts(node))

    def visit_parts(node: Any) -> Any:
        match node:
            case tirx.SeqStmt():
                found = [
                    find_store(part, rules.ahead) for part in node.seq if any(_holds(each, SUMS) for each in node.seq)
                ]
                ahead = [each for it in found if it for each in rules.ahead[str(it[1].buffer.name)](*it)]
                return sequence([*ahead, *map(visit, node.seq)])
            case tirx.For():
                return rebuild(node, visit(node.body))
            case tirx.IfThenElse():
                other = None if node.else_case is None else visit(node.else_case)
                return tirx.IfThenElse(node.condition, visit(node.then_case), other)
            case tirx.AttrStmt():
                return tirx.AttrStmt(node.node, node.attr_key, node.value, visit(node.body))
            case tirx.AllocBuffer() if _holds(node, SUMS):
                return tirx.SeqStmt(rules.allocate(node))
            case tirx.AllocBuffer():
                return on_stack(node)
            case tirx.BufferStore() | tirx.DeclBuffer() | tirx.Bind() | tirx.Evaluate() | tirx.AssertStmt():
                return node
            case _:
                raise AssertionError(f"a scheduled phase form holds an unexpected {type(node).__name__}")

    return visit(statement)


def _holds(node: Any, name: str) -> bool:
    """Whether a statement allocates a buffer whose name begins so."""
    return isinstance(node, tirx.AllocBuffer) and str(node.buffer.name).startswith(name)


def _join_passing(body: Any, last: str) -> Any:
    """`body` with the tasks of all bands whose outputs pass the caches in one loop, done one after the other.

    The band of the name `last` comes last.
    """
    parts = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    tasks = [part for part in parts if isinstance(part, tirx.For) and PASSES_CACHES in part.annotations]
    tasks.sort(key=lambda task: find_store(task, (last,)) is not None)
    if len(tasks) < 2:
        return body
    first, *others = tasks
    work = [first.body]
    for task in others:
        if not tvm.sym.Analyzer().can_prove_equal(task.extent, first.extent):
            raise AssertionError(f"bands with {first.extent} and {task.extent} tasks cannot share tasks")
        work += [tirx.Bind(task.loop_var, first.loop_var), task.body]
    rest = [part for part in parts if part not in tasks]
    return sequence([*rest, rebuild(first, sequence(work))])


def _share_images(loop: Loop) -> Any:
    """`loop`, over images, shared among threads; where there may be few, the loops in it are meanwhile."""

    def change(node: Any) -> Any | None:
        if isinstance(node, tirx.For) and node.kind == tirx.ForKind.PARALLEL:
            return rebuild(node, node.body, kind=tirx.ForKind.SERIAL)
        return None

    shared = rebuild(loop, rewrite(loop.body, change), kind=tirx.ForKind.PARALLEL)
    if isinstance(loop.extent, tirx.IntImm):
        return shared
    return tirx.IfThenElse(loop.extent >= MANY_IMAGES, shared, loop)


def _peel(loop: Loop, apart: Pair) -> list[Loop]:
    """`loop` in parts: so many of its first and last iterations have a body each, where its variable is constant."""
    left, right = apart
    stop, last = int(loop.extent), int(loop.extent) - right

    def part(first: int, extent: int, kind: Any) -> Loop:
        return rebuild(loop, loop.body, tirx.const(first, "int32"), tirx.const(extent, "int32"), kind)

    unrolled = tirx.ForKind.UNROLLED
    between = [part(left, last - left, loop.kind)] if left < last else []
    return [*(part(i, 1, unrolled) for i in range(left)), *between, *(part(i, 1, unrolled) for i in range(last, stop))]


def _end_apart(loop: Loop, vectors: int) -> list[Loop]:
    """`loop` in parts: its last iteration has a body of its own, with so many vectors of columns."""

    def change(node: Any) -> Any | None:
        if isinstance(node, tirx.For) and VECTORS in node.annotations:
            return rebuild(node, rewrite(node.body, change), node.min, tirx.const(vectors, "int32"))
        return None

    before, last = _peel(loop, (0, 1))
    return [before, rebuild(last, rewrite(last.body, change))]


def _chunk_columns(loops: Sequence[Loop], parts: Sequence[Loop], size: int, tasks: int) -> Any:
    """`loops` around a loop over tiles of columns, done in `parts`, of which an iteration does `size` tiles only.

    See `COLUMN_CHUNKS` for `tasks`. What is peeled off before and after the longest part is done with its first tile,
    and with its last.
    """
    between = max(parts, key=lambda part: int(part.extent))
    before, after = parts[: parts.index(between)], parts[parts.index(between) + 1 :]
    tiles = int(between.extent)
    chunks, chunk, tile = -(-tiles // size), tirx.Var("chunk", "int32"), tirx.Var("tile", "int32")
    # Which tile is last is known, so that nothing that depends on it is left to be asked at each.
    place = tirx.Bind(between.loop_var, between.min + tirx.min(chunk * size + tile, tiles - 1))
    extent = tirx.min(size, tiles - chunk * size)
    some = tirx.For(tile, 0, extent, tirx.ForKind.SERIAL, sequence([place, between.body]))
    ends = ((before, 0), (after, chunks - 1))
    first, last = ([tirx.IfThenElse(chunk == at, sequence(end), None)] if end else [] for end, at in ends)
    body = sequence([*first, some, *last])
    if tasks <= 0:
        kind = tirx.ForKind.SERIAL if tasks else tirx.ForKind.PARALLEL
        return nest(loops, tirx.For(chunk, 0, chunks, kind, body))
    *around, task = loops
    number, whole = tirx.Var("number", "int32"), tasks * chunks
    of_task = tirx.indexdiv(number, whole) * tasks + tirx.indexmod(number, tasks)
    of_chunk = tirx.indexmod(tirx.indexdiv(number, tasks), chunks)
    body = sequence([tirx.Bind(task.loop_var, of_task), tirx.Bind(chunk, of_chunk), body])
    return nest(around, tirx.For(number, 0, task.extent * chunks, task.kind, body))


def _skip_rows(nest: Any, axis: int, images: Mapping[str, Pair]) -> Any:
    """`nest`, if any row that it reads is of the image; indices name the row at `axis`.

    `images` has the first row and the end of it, by the name of the buffer that holds it.
    """
    loops, store = inside(nest)
    loads = ((find_load(store.value, name), image) for name, image in images.items())
    load, image = next(((load, image) for load, image in loads if load is not None), (None, (0, 0)))
    if load is None:
        # Sums are set to zero here, or no row is of the border.
        return nest
    first = last = load.indices[axis]
    for loop in loops:
        first, last = with_value(first, loop.loop_var, 0), with_value(last, loop.loop_var, loop.extent - 1)
    return tirx.IfThenElse(tirx.all(last >= image[0], first < image[1]), nest, None)


def _skip_part(node: Any) -> Any | None:
    """What stands for a partial sum, its products and its addition to the sums, in which no product may be left.

    None for any other statement. By which rows and columns products are left out is written around each of them.
    """
    if not (isinstance(node, tirx.SeqStmt) and any(_holds(part, PARTIAL) for part in node.seq)):
        return None
    conditions, adds = [], False
    for part in node.seq:
        if isinstance(part, tirx.IfThenElse):
            conditions.append(part.condition)
        loops, store = inside(part.then_case if isinstance(part, tirx.IfThenElse) else part)
        if isinstance(store, tirx.BufferStore):
            adds |= str(store.buffer.name).startswith(SUMS) and isinstance(store.value, tirx.Add)
            guard = find_guard(store.value)
            conditions += [] if guard is None else [ever(guard, loops)]
    return tirx.IfThenElse(tirx.all(*conditions), node, None) if conditions and adds else None


def _guard_sum(node: Any) -> Any | None:
    """What stands for a store that adds a product to a partial sum under a condition; None for any other statement.

    The condition goes around the store: between product and sum it would keep LLVM from fusing them to one instruction,
    which rounds once. Where column phases are unrolled conditions are constants, and there is nothing between.
    """
    if not isinstance(node, tirx.BufferStore) or not str(node.buffer.name).startswith(PARTIAL):
        return None
    guard = find_guard(node.value)
    if guard is None or not isinstance(node.value, tirx.Add):
        return None
    sums, product = node.value.a, node.value.b.args[1]
    return tirx.IfThenElse(guard, tirx.BufferStore(node.buffer, sums + product, node.indices), None)


def _assemble(function: tirx.PrimFunc, name: str, inputs: Sequence[Any], output: Any, body: Any) -> tvm.IRModule:
    """A module with `function` as `name`, of another `body` that writes `output`."""
    joined = tirx.PrimFunc([*inputs, output], body, function.ret_type)
    module = tvm.IRModule({name: joined.with_attrs({**function.attrs, "global_symbol": name})})
    # A store in two nests has left their loop variables defined twice.
    return tirx.transform.ConvertSSA()(module)


def lower_kernel(function: tirx.PrimFunc, *, asks_ahead: bool = True) -> tvm.IRModule:
    """The scheduled phase form `function` as ``convt(input, packed, [bias,] output)``, output NCHW.

    With `asks_ahead` each tile asks for the cache lines of its outputs before it sums, where `Outputs.ahead` finds that
    to pay, and lanes along channels for weights that do not stay in the second cache.
    """
    spec, layout, target = spec_of(function), layout_of(function), target_of(function)
    window = Window.of(spec, layout)
    row_axis, images = window_axes(spec, layout).index("h"), {"window": window.rows_inside}
    if layout.skips_rows:
        # The input itself may be read, in the order of a window.
        images["input"] = 0, spec.ih
    function = flatten_blocks(function)
    named = {f"band{band.index}": band for band in bands(spec)}
    inputs = [buffer for buffer in function.params if str(buffer.name) not in named]
    outputs = Outputs(spec, layout, target, inputs[0].shape[0])
    rules = Rules(
        stores={name: partial(outputs.store, band) for name, band in named.items()},
        skip=lambda nest: _skip_rows(nest, row_axis, images),
        join=lambda body: _join_passing(body, f"band{last_band(spec).index}"),
        pass_caches=outputs.pass_caches,
        peel=(
            (lambda loop: _peel(loop, layout.border_tiles(spec)))
            if layout.lanes == "co"
            else (lambda loop: _end_apart(loop, layout.last_vectors(spec)))
        ),
        ahead={name: partial(outputs.ahead, band) for name, band in named.items() if asks_ahead},
        allocate=partial(_allocate_sums, spec=spec, layout=layout, target=target),
    )
    body = _rewrite(rules.join(function.body), rules)
    if skips_parts(spec):
        body = rewrite(body, _skip_part)
    if not layout.unrolls_phases(spec):
        body = rewrite(body, _guard_sum)
    if layout.taps != "plain":
        asks_weights = asks_ahead and layout.lanes == "co" and asks_for_weights(spec, layout, target)
        in_step = any(column_delays(spec, layout))
        in_turn = int(in_step) if target.has_few_registers and (in_step or layout.phases == 1) else None
        body = multiply_vectors(body, spec.accumulator_dtype, asks_ahead=asks_weights, in_turn=in_turn)
    body = fill_window(body, window, window_axes(spec, layout), target)
    if spec.dtype == "bfloat16" and target.multiplies_pairs:
        body = define_functions(body)
    if layout.gathers:
        body = define_copy(body, spec.dtype)
    if layout.streams:
        body = define_lines(body, spec.dtype)
    return _assemble(function, "convt", inputs, outputs.tensor, body)


def lower_pack(function: tirx.PrimFunc, *, orders_columns: bool = True) -> tvm.IRModule:
    """The scheduled packing `function` as ``pack(weight, packed)``.

    With `orders_columns` its third axis counts kernel columns, which `kernel_columns` are stored in the order of.
    """
    ordered = function.params[-1]
    packed = tensor("packed", ordered.shape, str(ordered.dtype))
    places = kernel_columns(spec_of(function)) if orders_columns else range(int(ordered.shape[2]))

    def store(loops: Sequence[Loop], node: Any) -> Any:
        block, kh, kw, ic, ob = node.indices
        return nest(loops, tirx.BufferStore(packed, node.value, [block, kh, phase_value(places, kw), ic, ob]))

    function = flatten_blocks(function)
    return _assemble(function, "pack", [function.params[0]], packed, _rewrite(function.body, Rules({"ordered": store})))
