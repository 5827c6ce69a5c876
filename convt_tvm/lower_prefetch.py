"""Loads that do not wait for each other: in flight together, and during the products of the step before.

A loop that loads a value and stores it waits for memory each time around, since nvcc keeps the order. So what is copied
goes through registers, all loads before all stores; and a loop over steps, each of which copies values and works on
them,

    for step:                                       for copy: fetched = global[0]
      for copy: shared = global[step]               for step:
      work(shared)                        becomes     for copy: shared = fetched
                                                      if step + 1 < steps: for copy: fetched = global[step + 1]
                                                      work(shared)

A copy may go to a thread's own array first, to be changed on the way. Where a step takes more registers than
`MAX_FETCHED`, some of it is copied in batches instead, and waited for. Barriers are not seen here: TVM puts them where
shared memory is written and read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm import tirx

from convt_tvm.statements import find_load, nest, reads_memory, rebuild, rewrite, sequence, with_value
from convt_tvm.thread_layout import BATCH, MAX_FETCHED

__all__ = ["prefetch"]

Statement = Any
UNROLLED, VECTORIZED = tirx.ForKind.UNROLLED, tirx.ForKind.VECTORIZED


@dataclass(frozen=True)
class _Copy:
    """A store of what is loaded from global memory, with the loops and conditions around it, outermost first."""

    store: Any
    loops: tuple[Any, ...] = ()
    conditions: tuple[Any, ...] = ()

    @property
    def registers(self) -> int:
        """Registers for what one thread copies: vectors fill them, narrow values have one each until they are put."""
        bits: int = tvm.DataType(str(self.store.buffer.dtype)).bits
        by_vectors = bool(self.loops) and self.loops[-1].kind == VECTORIZED
        return prod(int(loop.extent) for loop in self.loops) * (bits if by_vectors else max(bits, 32)) // 32

    @property
    def places(self) -> list[Any]:
        """Indices of what it copies, by its loops."""
        return [loop.loop_var for loop in self.loops] or [tirx.const(0, "int32")]

    def array(self, number: int) -> Any:
        """An array for what one thread copies."""
        extents = [int(loop.extent) for loop in self.loops] or [1]
        return tirx.decl_buffer(extents, self.store.buffer.dtype, name=f"fetched{number}", scope="local")

    def take(self, fetched: Any, variable: Any, value: Any) -> Statement:
        """Loads to `fetched`, where `variable` is `value`."""
        return self._nest(
            tirx.BufferStore(fetched, _at(self.store.value, variable, value), self.places), variable, value
        )

    def put(self, fetched: Any, variable: Any, value: Any) -> Statement:
        """Stores of what was taken."""
        indices = [_at(index, variable, value) for index in self.store.indices]
        return self._nest(tirx.BufferStore(self.store.buffer, fetched[*self.places], indices), variable, value)

    def _nest(self, statement: Statement, variable: Any, value: Any) -> Statement:
        """`statement` in the copy's loops, unrolled unless they are vectors', under its conditions."""
        if self.conditions:
            conditions = [_at(condition, variable, value) for condition in self.conditions]
            statement = tirx.IfThenElse(tirx.all(*conditions), statement, None)
        loops = [loop if loop.kind == VECTORIZED else rebuild(loop, loop.body, kind=UNROLLED) for loop in self.loops]
        return nest(loops, statement)


def _copies(node: Any, loops: tuple[Any, ...] = (), conditions: tuple[Any, ...] = ()) -> Iterator[_Copy]:
    """The copies in a statement; a sum that adds what it loads to itself is none."""
    match node:
        case tirx.For():
            yield from _copies(node.body, (*loops, node), conditions)
        case tirx.SeqStmt():
            for part in node.seq:
                yield from _copies(part, loops, conditions)
        case tirx.IfThenElse() if node.else_case is None:
            yield from _copies(node.then_case, loops, (*conditions, node.condition))
        case tirx.BufferStore() if node.buffer.scope() in ("shared", "local"):
            if reads_memory(node.value) and find_load(node.value, str(node.buffer.name)) is None:
                yield _Copy(node, loops, conditions)


def prefetch(body: Statement) -> Statement:
    """`body` with copies to shared memory fetched a step ahead, or where that takes too much, a batch at a time."""

    def change(node: Any) -> Any | None:
        if not isinstance(node, tirx.For):
            return None
        if isinstance(node.body, tirx.SeqStmt) and int(node.extent) > 1 and node.kind == tirx.ForKind.SERIAL:
            return _ahead(node)
        if node.kind != tirx.ForKind.SERIAL or isinstance(node.body, tirx.SeqStmt):
            return None
        copies = list(_copies(node))
        return _in_batches(copies[0]) if len(copies) == 1 else None

    return rewrite(body, change)


def _ahead(step: Any) -> Statement | None:
    """The loop `step` with copies fetched before the work of the step before, as many as fit; None if none does."""
    following = step.loop_var + 1
    room, last = MAX_FETCHED, 0
    allocations, first, then = list[Any](), list[Any](), list[Any]()
    stores = dict[Any, Any]()
    for number, part in enumerate(step.body.seq):
        for copy in _copies(part):
            if copy.registers <= room:
                room, last = room - copy.registers, number
                fetched = copy.array(len(allocations))
                allocations.append(tirx.AllocBuffer(fetched, {}))
                stores[copy.store] = tirx.BufferStore(copy.store.buffer, fetched[*copy.places], copy.store.indices)
                first.append(copy.take(fetched, step.loop_var, step.min))
                then.append(copy.take(fetched, step.loop_var, following))
    if not allocations:
        return None

    def change(node: Any) -> Any | None:
        if (
            isinstance(node, tirx.For)
            and node.kind == tirx.ForKind.SERIAL
            and any(copy.store in stores for copy in _copies(node))
        ):
            return rewrite(rebuild(node, node.body, kind=UNROLLED), change)
        return stores.get(node) if isinstance(node, tirx.BufferStore) else None

    parts = []
    for number, part in enumerate(step.body.seq):
        parts.append(prefetch(rewrite(part, change)))
        if number == last:
            parts.append(tirx.IfThenElse(following < step.min + step.extent, sequence(then), None))
    return tirx.SeqStmt([*allocations, *first, rebuild(step, tirx.SeqStmt(parts))])


def _in_batches(copy: _Copy) -> Statement:
    """The copy, `BATCH` of its outermost loop's iterations at a time: so many loads are in flight together."""
    loop, *inner = copy.loops
    whole, rest = divmod(int(loop.extent), BATCH)
    statements = []
    for batches, size, first in ((whole, BATCH, 0), (1, rest, whole * BATCH)):
        if batches * size:
            batch, at = (tirx.Var(name, "int32") for name in ("batch", "at"))
            part = _Copy(copy.store, (tirx.For(at, 0, size, UNROLLED, loop.body), *inner), copy.conditions)
            place, fetched = batch * BATCH + first + at, part.array(0)
            moves = [move(fetched, loop.loop_var, place) for move in (part.take, part.put)]
            body = tirx.SeqStmt([tirx.AllocBuffer(fetched, {}), *moves])
            statements.append(tirx.For(batch, 0, batches, tirx.ForKind.SERIAL, body))
    return sequence(statements)


def _at(expression: Any, variable: Any, value: Any) -> Any:
    """`expression` where `variable` is `value`, which may depend on the variable itself."""
    other = tirx.Var("other", "int32")
    return with_value(with_value(expression, variable, other), other, value)
