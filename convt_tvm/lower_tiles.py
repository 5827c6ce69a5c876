"""From scheduled tile forms to the functions of a kernel library: sums go to a processor's tile unit (AMX).

The registers of the unit are numbered in its instructions, so their use is written out here: the sums of a tile of
output channels and positions come first, then weights, then what is left takes pieces of the image by turns. A
schedule says with `IN_TILES` which loops stand for them.
"""

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx

from convt_tvm.compute import spec_of
from convt_tvm.compute_taps import PANEL
from convt_tvm.compute_tiles import ENDS_AT, IN_TILES, tile_layout_of
from convt_tvm.lower import lower_kernel
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.statements import (
    at_start,
    element_number,
    element_stride,
    find_guard,
    find_load,
    inside,
    on_stack,
    rewrite,
    sequence,
)
from convt_tvm.tile_layout import REGISTERS, TILE_POSITIONS, TileLayout

__all__ = ["lower_tile_kernel", "use_tiles"]

_PALETTE = 1
"""The only way in which today's processors divide the unit's memory: eight registers of 16 rows."""

Expr = Any
Statement = Any


def lower_tile_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled tile form `function` as ``convt(input, packed, [bias,] output)``, output NCHW."""
    kernel = lower_kernel(function, asks_ahead=False)["convt"]
    body = use_tiles(kernel.body, spec_of(function), tile_layout_of(function))
    return tvm.IRModule({"convt": kernel.with_body(body)})


def use_tiles(body: Statement, spec: ConvTranspose2dSpec, layout: TileLayout) -> Statement:
    """`body` with the tile unit's instructions in place of the loops that stand for them."""
    return rewrite(body, _Tiles(spec, layout).change)


def _loop(loop: Any, body: Any) -> Any:
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, {}, loop.step)


class _Tiles:
    """The registers of the unit, and the instructions that a tile form takes."""

    def __init__(self, spec: ConvTranspose2dSpec, layout: TileLayout) -> None:
        self.layout, self.pairs = layout, layout.pairs(spec)
        rows, columns = layout.channel_tiles, layout.position_tiles
        self.sums = [[row * columns + column for column in range(columns)] for row in range(rows)]
        self.weights = list(range(rows * columns, rows * columns + rows))
        self.images = list(range(rows * columns + rows, REGISTERS))
        self.earlier: Expr = 0
        """By how many positions the tile at hand begins earlier than its number says."""

    def change(self, node: Any) -> Any:
        """What stands for a loop with `IN_TILES` or `ENDS_AT`; None for any other statement."""
        if not isinstance(node, tirx.For):
            return None
        loop = node
        if ENDS_AT in loop.annotations:
            return self._end_at(loop, int(loop.annotations[ENDS_AT]))
        if IN_TILES not in loop.annotations:
            return None
        match str(node.annotations[IN_TILES]):
            case "configure":
                return self._configure(loop)
            case "zero":
                return sequence([_call("tilezero", _byte(number)) for row in self.sums for number in row])
            case "store":
                return self._store(loop)
        return self._multiply(loop)

    def _configure(self, loop: Any) -> Any:
        """A loop over tasks, each of which configures the unit before and releases it after its work.

        A thread's registers are saved with it when it waits, unless it has released them.
        """
        layout = self.layout
        config = bytearray(64)
        config[0] = _PALETTE
        # Rows of the first factor are rows of the sums, and columns of the second one their columns, in pairs.
        first, rows, second, columns = self.weights, layout.tile_channels, self.images, TILE_POSITIONS
        if layout.by_positions:
            first, rows, second, columns = second, columns, first, rows
        shapes = {number: (rows, 4 * columns) for row in self.sums for number in row}
        shapes |= {number: (rows, 4 * self.pairs) for number in first}
        shapes |= {number: (self.pairs, 4 * columns) for number in second}
        for number, (rows, width) in shapes.items():
            config[16 + 2 * number], config[48 + number] = width, rows
        words = [int.from_bytes(config[i : i + 8], "little", signed=True) for i in range(0, 64, 8)]
        buffer = tirx.decl_buffer((len(words),), "int64", name="tile_config")
        before = [on_stack(tirx.AllocBuffer(buffer))]
        before += [tirx.BufferStore(buffer, tirx.const(word, "int64"), [i]) for i, word in enumerate(words)]
        before.append(_call("ldtilecfg", tirx.address_of(tirx.BufferLoad(buffer, [0]))))
        work = rewrite(loop.body, self.change)
        return _loop(loop, tirx.SeqStmt([*before, work, _call("tilerelease")]))

    def _end_at(self, loop: Any, positions: int) -> Any:
        """A loop over tiles, the last of which ends with the last position; sums of some are computed twice."""
        size = self.layout.positions
        self.earlier = tirx.max((loop.loop_var + 1) * size - positions, 0)
        body = rewrite(loop.body, self.change)
        self.earlier = 0
        return _loop(loop, body)

    def _multiply(self, loop: Any) -> Any:
        """One step: each tile of weights times each tile of the image, added to its sums."""
        loops, store = inside(loop)
        loads = [find_load(store.value, name) for name in (PANEL, "window", "input", "packed")]
        image, weight = (_first(load, loops) for load in loads if load is not None)
        guard, layout = find_guard(store.value), self.layout
        position = len(image.indices) - 2
        rows = position if layout.by_positions else position - 1
        stride = 2 * element_stride(image.source, rows)
        of_row, of_channel = (layout.co_block, 1) if layout.by_positions else (self.pairs, self.pairs)
        statements = [
            _load(number, weight, {4: 2 * i * layout.tile_channels * of_channel}, 4 * of_row)
            for i, number in enumerate(self.weights)
        ]
        for j in range(len(self.sums[0])):
            number = self.images[j % len(self.images)]
            statements.append(_load(number, image, {position: j * TILE_POSITIONS - self.earlier}, stride))
            for i, weights in enumerate(self.weights):
                factors = (number, weights) if layout.by_positions else (weights, number)
                statements.append(_call("tdpbf16ps", _byte(self.sums[i][j]), *map(_byte, factors)))
        body = tirx.SeqStmt(statements)
        return body if guard is None else tirx.IfThenElse(guard, body, None)

    def _store(self, loop: Any) -> Any:
        """Sums to memory."""
        loops, store = inside(loop)
        place = _first(tirx.BufferLoad(store.buffer, store.indices), loops)
        axes = len(store.indices)
        position, channel = (axes - 2, axes - 1) if self.layout.by_positions else (axes - 1, axes - 2)
        stride = 4 * element_stride(store.buffer, axes - 2)
        statements = []
        for i, row in enumerate(self.sums):
            for j, number in enumerate(row):
                offsets = {channel: i * self.layout.tile_channels, position: j * TILE_POSITIONS - self.earlier}
                indices = _offset_by(place, offsets)
                offset = element_number(place.source, indices)
                # Not address_of: TVM takes it for an access to one element, and cuts off what it sees no access to.
                address = place.source.access_ptr("w", offset=offset)
                statements.append(_call("tilestored64", _byte(number), address, _long(stride)))
        return sequence(statements)


def _first(load: Any, loops: Sequence[Any]) -> Any:
    """What `load` reads in the first iteration of `loops`."""
    return tirx.BufferLoad(load.source, [at_start(index, loops) for index in load.indices])


def _offset_by(load: Any, offsets: dict[int, int]) -> list[Expr]:
    """The indices of `load`, with `offsets` along some axes added."""
    return [index + offsets.get(axis, 0) for axis, index in enumerate(load.indices)]


def _load(number: int, load: Any, offsets: dict[int, int], stride: int) -> Statement:
    address = tirx.address_of(tirx.BufferLoad(load.source, _offset_by(load, offsets)))
    return _call("tileloadd64", _byte(number), address, _long(stride))


def _byte(value: int) -> Expr:
    return tirx.const(value, "int8")


def _long(value: int) -> Expr:
    return tirx.const(value, "int64")


def _call(name: str, *arguments: Expr) -> Statement:
    # The type is not used: these intrinsics return nothing.
    return tirx.Evaluate(tirx.call_llvm_intrin("int32", f"llvm.x86.{name}", *arguments))
