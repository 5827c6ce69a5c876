"""Steps that wait for memory while they compute: each asks for the next one's values before its own products.

A loop over steps, each of which copies values to shared memory and works on them,

    for step:                                       for copy: fetched = global[0]
      for copy: shared = global[step]               for step:
      work(shared)                        becomes     for copy: shared = fetched
                                                      if step + 1 < steps: for copy: fetched = global[step + 1]
                                                      work(shared)

What is fetched is in registers, so that loads are in flight during the work. Barriers are not seen here: TVM puts them
where shared memory is written and read.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Self

import tvm
from tvm import tirx

from convt_tvm.statements import inside, nest, rebuild, rewrite, sequence, with_value
from convt_tvm.thread_layout import MAX_FETCHED

__all__ = ["prefetch"]

Statement = Any
UNROLLED, VECTORIZED = tirx.ForKind.UNROLLED, tirx.ForKind.VECTORIZED


@dataclass(frozen=True)
class _Copy:
    """A statement that copies to shared memory: loops, in them perhaps a condition, and a store."""

    statement: Statement
    loops: list[Any]
    store: Any
    condition: Any | None

    @classmethod
    def of(cls, statement: Statement) -> Self | None:
        """The statement as a copy; None if it is another."""
        loops, store = inside(statement)
        condition = None
        if isinstance(store, tirx.IfThenElse) and store.else_case is None:
            condition, store = store.condition, store.then_case
        if not isinstance(store, tirx.BufferStore) or store.buffer.scope() != "shared":
            return None
        return cls(statement, loops, store, condition)

    @property
    def registers(self) -> int:
        """Registers for what one thread copies."""
        bits: int = tvm.DataType(str(self.store.buffer.dtype)).bits
        return prod(int(loop.extent) for loop in self.loops) * bits // 32

    def nest(self, statement: Statement) -> Statement:
        """`statement` in the copy's loops, unrolled unless they are vectors', under its condition."""
        loops = [loop if loop.kind == VECTORIZED else rebuild(loop, loop.body, kind=UNROLLED) for loop in self.loops]
        return nest(loops, statement if self.condition is None else tirx.IfThenElse(self.condition, statement, None))


def prefetch(body: Statement) -> Statement:
    """`body` with the copies to shared memory of all loops over steps fetched a step ahead."""

    def change(node: Any) -> Any | None:
        if not isinstance(node, tirx.For) or not isinstance(node.body, tirx.SeqStmt) or int(node.extent) < 2:
            return None
        copies = [copy for part in node.body.seq if (copy := _Copy.of(part)) is not None]
        return _ahead(node, copies) if copies and sum(copy.registers for copy in copies) <= MAX_FETCHED else None

    return rewrite(body, change)


def _ahead(step: Any, copies: list[_Copy]) -> Statement:
    """The loop `step` whose `copies` are fetched before the work of the step before."""
    following = step.loop_var + 1
    allocations, first, then, stores = [], [], [], {}
    for number, copy in enumerate(copies):
        extents = [int(loop.extent) for loop in copy.loops] or [1]
        places = [loop.loop_var for loop in copy.loops] or [tirx.const(0, "int32")]
        fetched = tirx.decl_buffer(extents, copy.store.buffer.dtype, name=f"fetched{number}", scope="local")
        allocations.append(tirx.AllocBuffer(fetched, {}))
        stores[copy.statement] = copy.nest(tirx.BufferStore(copy.store.buffer, fetched[*places], copy.store.indices))
        for fetches, value in ((first, step.min), (then, following)):
            there = _at(copy.store.value, step.loop_var, value)
            fetches.append(copy.nest(tirx.BufferStore(fetched, there, places)))
    parts = []
    for part in step.body.seq:
        parts.append(stores.get(part, part))
        if part.same_as(copies[-1].statement):
            parts.append(tirx.IfThenElse(following < step.min + step.extent, sequence(then), None))
    return tirx.SeqStmt([*allocations, *first, rebuild(step, tirx.SeqStmt(parts))])


def _at(expression: Any, variable: Any, value: Any) -> Any:
    """`expression` where `variable` is `value`, which may depend on the variable itself."""
    other = tirx.Var("other", "int32")
    return with_value(with_value(expression, variable, other), other, value)
