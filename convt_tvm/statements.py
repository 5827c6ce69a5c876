"""Statements of TIR that have left their blocks: what is in them, found, replaced, put into other loops."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, tirx

__all__ = [
    "LLVM_TYPES",
    "Clip",
    "at_start",
    "depends_on",
    "element_number",
    "element_stride",
    "ever",
    "find_guard",
    "find_load",
    "find_store",
    "import_llvm",
    "inside",
    "nest",
    "on_stack",
    "reads_memory",
    "rebuild",
    "rewrite",
    "sequence",
    "split_guard",
    "tensor",
    "view",
    "with_value",
]

LLVM_TYPES = {"float32": "float", "float64": "double"}
"""What LLVM's language calls the dtypes that are summed in."""
MAX_STACK_BYTES = 32 << 10
"""Largest buffer on a thread's stack: a row of accumulators, not the input's window."""

Expr = Any
Loop = Any


def tensor(name: str, shape: Sequence[Expr], dtype: str) -> Any:
    """A tensor that may start at any address."""
    return tirx.decl_buffer(shape, dtype, name=name, data_alignment=1)


def view(buffer: Any, source: Any, start: Sequence[Expr]) -> Any:
    """The statement that `buffer` is the memory from an element of `source` on."""
    return tirx.DeclBuffer(buffer, data=tirx.address_of(tirx.BufferLoad(source, list(start))))


def sequence(statements: Sequence[Any]) -> Any:
    """One or more statements, one after the other."""
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def import_llvm(body: Any, text: str) -> Any:
    """`body` with functions in LLVM's language to call, which TVM compiles along."""
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", ir.StringImm(text), body)


def element_stride(buffer: Any, axis: int) -> int:
    """Elements from one index along `axis` to the next."""
    if len(buffer.ty.strides):
        return int(buffer.ty.strides[axis])
    return prod(int(size) for size in buffer.shape[axis + 1 :])


def element_number(buffer: Any, indices: Sequence[Expr]) -> Expr:
    """Which element in memory one is, counted from the first."""
    return sum(index * element_stride(buffer, axis) for axis, index in enumerate(indices))


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


def rebuild(loop: Loop, body: Any, first: Expr = None, extent: Expr = None, kind: Any = None) -> Any:
    """`loop` around another body, over other values or of another kind if they are given."""
    first = loop.min if first is None else first
    extent = loop.extent if extent is None else extent
    kind = loop.kind if kind is None else kind
    return tirx.For(loop.loop_var, first, extent, kind, body, loop.thread_binding, loop.annotations, loop.step)


def at_start(expression: Expr, loops: Sequence[Loop]) -> Expr:
    """`expression` in the first iteration of `loops`."""
    for loop in loops:
        expression = with_value(expression, loop.loop_var, 0)
    return expression


def with_value(expression: Expr, variable: Any, value: Expr) -> Expr:
    """`expression` where `variable` is `value`, simplified."""
    analyzer = tvm.sym.Analyzer()
    analyzer.bind(variable, tirx.const(value, "int32") if isinstance(value, int) else value)
    return analyzer.simplify(expression)


def depends_on(expression: Expr, variable: Any) -> bool:
    """Whether the value of `expression` changes with that of `variable`."""
    changed = with_value(expression, variable, 1)
    return not tvm.sym.Analyzer().can_prove_equal(with_value(expression, variable, 0), changed)


def ever(condition: Expr, loops: Sequence[Loop]) -> Expr:
    """Whether `condition` holds in any iteration of `loops`, which are few."""
    found = [condition]
    for loop in loops:
        values = [with_value(each, loop.loop_var, i) for each in found for i in range(int(loop.extent))]
        found = []
        for value in values:
            if not any(tvm_ffi.structural_equal(value, each) for each in found):
                found.append(value)
    return tirx.any(*found)


def inside(node: Any) -> tuple[list[Loop], Any]:
    """The loops of a nest, outermost first, and the statement inside them."""
    loops = []
    while isinstance(node, tirx.For):
        loops.append(node)
        node = node.body
    return loops, node


def find_store(node: Any, names: Container[str]) -> tuple[tuple[Loop, ...], Any] | None:
    """A store to a buffer of one of `names`, and all loops around it; None if there is none."""
    match node:
        case tirx.BufferStore():
            return ((), node) if str(node.buffer.name) in names else None
        case tirx.For():
            found = find_store(node.body, names)
            return None if found is None else ((node, *found[0]), found[1])
        case tirx.SeqStmt():
            return next(filter(None, (find_store(part, names) for part in node.seq)), None)
        case _:
            return None


@dataclass(frozen=True)
class Clip:
    """The part ``first <= index < stop`` of the values that an index expression takes."""

    index: Expr
    first: int
    stop: int

    def apply(self, loops: Sequence[Loop], ranges: dict[Any, tuple[Expr, Expr]], checks: list[Expr]) -> None:
        """Narrow the innermost of `loops` that the index counts with, unless it is unrolled, or else add a check.

        The range of a loop, not a predicate in it: that leaves LLVM plain loops to vectorise. Given predicates it makes
        masked stores, and LLVM 22 for x86 writes four bytes where a truncating store of 16-bit values has a constant
        mask of one lane (bfloat16, 17 columns in vectors of 8).
        """
        for loop in (loop for loop in reversed(loops) if loop.kind != tirx.ForKind.UNROLLED):
            base = with_value(self.index, loop.loop_var, 0)
            if tvm.sym.Analyzer().can_prove_equal(self.index - base, loop.loop_var):
                zero, extent = tirx.const(0, "int32"), loop.extent
                first = tirx.min(tirx.max(self.first - base, zero), extent)
                stop = tirx.min(tirx.max(self.stop - base, zero), extent)
                ranges[loop.loop_var] = first, tirx.max(stop - first, zero)
                return
        checks += [self.index >= self.first, self.index < self.stop]


def nest(loops: Sequence[Loop], store: Any, clips: Sequence[Clip] = ()) -> Any:
    """`store` in `loops`, for the values that all of `clips` keep."""
    ranges: dict[Any, tuple[Expr, Expr]] = {}
    checks: list[Expr] = []
    for clip in clips:
        clip.apply(loops, ranges, checks)
    body = tirx.IfThenElse(tirx.all(*checks), store, None) if checks else store
    for loop in reversed(loops):
        body = rebuild(loop, body, *ranges.get(loop.loop_var, (None, None)))
    return body


def rewrite(node: Any, change: Callable[[Any], Any | None]) -> Any:
    """The statement `node`, with each statement for which `change` gives another replaced, outermost first."""
    changed = change(node)
    if changed is not None:
        return changed
    match node:
        case tirx.For():
            return rebuild(node, rewrite(node.body, change))
        case tirx.SeqStmt():
            return tirx.SeqStmt([rewrite(part, change) for part in node.seq])
        case tirx.IfThenElse():
            other = None if node.else_case is None else rewrite(node.else_case, change)
            return tirx.IfThenElse(node.condition, rewrite(node.then_case, change), other)
        case tirx.AttrStmt():
            return tirx.AttrStmt(node.node, node.attr_key, node.value, rewrite(node.body, change))
        case _:
            return node


def _parts(node: Expr) -> list[Expr]:
    """The expressions that an expression is made of."""
    parts = (*getattr(node, "args", ()), *(getattr(node, field, None) for field in ("value", "a", "b")))
    return [part for part in parts if part is not None]


def find_load(node: Expr, buffer: str) -> Expr | None:
    """The first load from `buffer` in an expression; None if there is none."""
    if isinstance(node, ir.TensorLoad):
        return node if node.source.name == buffer else None
    return next((found for part in _parts(node) if (found := find_load(part, buffer)) is not None), None)


def reads_memory(node: Expr) -> bool:
    """Whether an expression loads from a function's parameters, not only from buffers of its own."""
    if isinstance(node, ir.TensorLoad) and node.source.scope() == "global":
        return True
    return any(reads_memory(part) for part in _parts(node))


def split_guard(node: Expr) -> tuple[Expr | None, Expr]:
    """The condition of a conditional expression and its value where that holds; None and `node`, if it is another."""
    if isinstance(node, ir.Call) and node.op.same_as(ir.Op.get("prim.if_then_else")):
        return node.args[0], node.args[1]
    return None, node


def find_guard(node: Expr) -> Expr | None:
    """The condition of the first conditional expression in an expression; None if there is none."""
    guard, _ = split_guard(node)
    if guard is not None:
        return guard
    return next((found for part in _parts(node) if (found := find_guard(part)) is not None), None)
