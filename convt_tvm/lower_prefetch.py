"""Copies to shared memory that do not wait for each value: in flight together, and during the products of a step.

A loop that loads and stores waits for memory each time around, since nvcc keeps the order. So copies go through
registers, all loads before all stores; and a loop over steps, each of which copies values and works on them,

    for step:                                       for copy: fetched = global[0]
      for copy: shared = global[step]               for step:
      work(shared)                        becomes     for copy: shared = fetched
                                                      if step + 1 < steps: for copy: fetched = global[step + 1]
                                                      work(shared)

Where a step takes more registers than `MAX_FETCHED`, it copies in batches instead and waits for each. Barriers are not
seen here: TVM puts them where shared memory is written and read.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Self

import tvm
from tvm import tirx

from convt_tvm.statements import inside, nest, reads_memory, rebuild, rewrite, sequence, with_value
from convt_tvm.thread_layout import BATCH, MAX_FETCHED

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
        if not reads_memory(store.value):
            return None
        return cls(statement, loops, store, condition)

    @property
    def registers(self) -> int:
        """Registers for what one thread copies."""
        bits: int = tvm.DataType(str(self.store.buffer.dtype)).bits
        return prod(int(loop.extent) for loop in self.loops) * bits // 32

    def registers_for(self, loops: list[Any], number: int) -> Any:
        """An array for what one thread copies in `loops`."""
        extents = [int(loop.extent) for loop in loops] or [1]
        return tirx.decl_buffer(extents, self.store.buffer.dtype, name=f"fetched{number}", scope="local")

    def take(self, fetched: Any, loops: list[Any], variable: Any, value: Any) -> Statement:
        """Loads from global memory where `variable` is `value`."""
        store = tirx.BufferStore(fetched, _at(self.store.value, variable, value), _places(loops))
        return self._nest(store, loops, variable, value)

    def put(self, fetched: Any, loops: list[Any], variable: Any = None, value: Any = None) -> Statement:
        """Stores to shared memory of what was taken."""
        indices = [_at(index, variable, value) for index in self.store.indices]
        store = tirx.BufferStore(self.store.buffer, fetched[*_places(loops)], indices)
        return self._nest(store, loops, variable, value)

    def _nest(self, statement: Statement, loops: list[Any], variable: Any, value: Any) -> Statement:
        """`statement` in loops that are unrolled unless they are vectors', under the copy's condition."""
        loops = [loop if loop.kind == VECTORIZED else rebuild(loop, loop.body, kind=UNROLLED) for loop in loops]
        if self.condition is not None:
            statement = tirx.IfThenElse(_at(self.condition, variable, value), statement, None)
        return nest(loops, statement)


def prefetch(body: Statement) -> Statement:
    """`body` with all copies to shared memory fetched a step ahead, or where that takes too much, a batch at a time."""

    def change(node: Any) -> Any | None:
        if (copy := _Copy.of(node)) is not None:
            return _in_batches(copy) if copy.loops and copy.loops[0].kind == tirx.ForKind.SERIAL else node
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
        fetched = copy.registers_for(copy.loops, number)
        allocations.append(tirx.AllocBuffer(fetched, {}))
        stores[copy.statement] = copy.put(fetched, copy.loops)
        first.append(copy.take(fetched, copy.loops, step.loop_var, step.min))
        then.append(copy.take(fetched, copy.loops, step.loop_var, following))
    parts = []
    for part in step.body.seq:
        parts.append(stores.get(part, part))
        if part.same_as(copies[-1].statement):
            parts.append(tirx.IfThenElse(following < step.min + step.extent, sequence(then), None))
    return tirx.SeqStmt([*allocations, *first, rebuild(step, tirx.SeqStmt(parts))])


def _in_batches(copy: _Copy) -> Statement:
    """The copy, `BATCH` of its iterations at a time: so many loads are in flight together."""
    loop, *inner = copy.loops
    whole, rest = divmod(int(loop.extent), BATCH)
    statements = []
    for batches, size, first in ((whole, BATCH, 0), (1, rest, whole * BATCH)):
        if batches * size:
            batch, at = (tirx.Var(name, "int32") for name in ("batch", "at"))
            loops = [tirx.For(at, 0, size, UNROLLED, loop.body), *inner]
            place = batch * BATCH + first + at
            fetched = copy.registers_for(loops, 0)
            take, put = (move(fetched, loops, loop.loop_var, place) for move in (copy.take, copy.put))
            body = tirx.SeqStmt([tirx.AllocBuffer(fetched, {}), take, put])
            statements.append(tirx.For(batch, 0, batches, tirx.ForKind.SERIAL, body))
    return sequence(statements)


def _places(loops: list[Any]) -> list[Any]:
    return [loop.loop_var for loop in loops] or [tirx.const(0, "int32")]


def _at(expression: Any, variable: Any, value: Any) -> Any:
    """`expression` where `variable`, if it is one, is `value`, which may depend on the variable itself."""
    if variable is None:
        return expression
    other = tirx.Var("other", "int32")
    return with_value(with_value(expression, variable, other), other, value)
