"""From scheduled forms that sum channels before taps in a tile unit (AMX) to the functions of a kernel library.

Sums are made as in `convt_tvm.lower_tiles`, and gathered as in `convt_tvm.lower_taps`. What is here is the copy of a
panel in pairs of channels: vectors of two channels by turns; in channels_last, where pairs lie side by side, squares of
pairs and positions transposed in registers.
"""

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx

from convt_tvm.bfloat16 import PAIR
from convt_tvm.compute import IN_VECTORS, spec_of
from convt_tvm.compute_taps import PANEL
from convt_tvm.compute_tile_taps import tile_tap_layout_of
from convt_tvm.compute_tiles import BITS
from convt_tvm.lower import lower_kernel
from convt_tvm.lower_taps import gather_vectors
from convt_tvm.lower_tiles import use_tiles
from convt_tvm.shuffle import define, interleave, ramp, transpose
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.statements import at_start, find_load, import_llvm, inside, rebuild, rewrite, sequence
from convt_tvm.tile_layout import TILE_POSITIONS, TILE_ROWS

__all__ = ["lower_tile_tap_kernel"]

Expr = Any
Loop = Any
Statement = Any

_VECTOR = 32
"""Values of 16 bits in a vector register of every processor with a tile unit."""

_FIRST_BITS = """
define linkonce_odr hidden <32 x i16> @convt_first_bits(ptr %address, i32 %count) alwaysinline {
  %whole = icmp sge i32 %count, 32
  %none = icmp sle i32 %count, 0
  %safe = select i1 %whole, i32 0, i32 %count
  %one = shl i32 1, %safe
  %some = sub i32 %one, 1
  %few = select i1 %none, i32 0, i32 %some
  %bits = select i1 %whole, i32 -1, i32 %few
  %mask = bitcast i32 %bits to <32 x i1>
  %zeros = bitcast <64 x i8> zeroinitializer to <32 x i16>
  %values = call <32 x i16> @llvm.masked.load.v32i16.p0(ptr %address, i32 1, <32 x i1> %mask, <32 x i16> %zeros)
  ret <32 x i16> %values
}

declare <32 x i16> @llvm.masked.load.v32i16.p0(ptr, i32, <32 x i1>, <32 x i16>)
"""


def lower_tile_tap_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled `function` as ``convt(input, packed, [bias,] output)``."""
    spec, layout = spec_of(function), tile_tap_layout_of(function)
    kernel = lower_kernel(function, asks_ahead=False)["convt"]

    def change(node: Any) -> Statement | None:
        if not isinstance(node, tirx.For) or IN_VECTORS not in node.annotations:
            return None
        loops, store = inside(node)
        if not isinstance(store, tirx.BufferStore) or str(store.buffer.name) != PANEL:
            return None
        return (_riffle if spec.input_axes == "nchw" else _transpose)(loops, store, spec)

    body = rewrite(use_tiles(gather_vectors(kernel.body), spec, layout.tiles), change)
    return tvm.IRModule({"convt": kernel.with_body(import_llvm(body, _FIRST_BITS))})


def _riffle(loops: Sequence[Loop], store: Any, spec: ConvTranspose2dSpec) -> Statement:
    """The copy of a panel from NCHW: the values of two channels by turns, zeros behind the image and behind channels.

    `loops` are those over pairs, positions and the two of a pair.
    """
    pair, position, _ = loops
    load: Any = find_load(store.value, "input")
    image, channel, row, first = (at_start(index, loops[1:]) for index in load.indices)
    in_group, positions, statements = spec.ci // spec.groups, int(position.extent), list[Statement]()
    for start in range(0, positions, _VECTOR):
        count = tirx.min(spec.ih * spec.iw - first, positions) - start
        vectors = [
            _first_bits(
                load, [image, channel + j, row, first + start], tirx.Select(2 * pair.loop_var + j < in_group, count, 0)
            )
            for j in range(2)
        ]
        vectors = [define(vector, _VECTOR, BITS, statements) for vector in vectors]
        for number, vector in enumerate(interleave(vectors, _VECTOR, BITS, statements)):
            if (to := start + number * TILE_POSITIONS) < positions:
                statements.append(_put(store, loops, pair.loop_var, tirx.const(to, "int32"), vector))
    return rebuild(pair, sequence(statements))


def _transpose(loops: Sequence[Loop], store: Any, spec: ConvTranspose2dSpec) -> Statement:
    """The copy of a panel from NHWC: squares of pairs and positions, zeros behind channels.

    `loops` are as in `_riffle`. Positions behind the image hold those of the last one: what they give is not read.
    """
    pair, position, _ = loops
    load: Any = find_load(store.value, "input")
    image, row, first, channel = (at_start(index, loops) for index in load.indices)
    pairs, along, across = int(pair.extent), tirx.Var("positions", "int32"), tirx.Var("pairs", "int32")

    def square(start: Expr, filled: int) -> Statement:
        """So many pairs from one on, of as many positions as a vector has pairs."""
        statements, vectors = list[Statement](), []
        for number in range(TILE_POSITIONS):
            at = tirx.min(first + along * TILE_POSITIONS + number, spec.ih * spec.iw - 1)
            bits = _first_bits(load, [image, row, at, channel + 2 * start], spec.ci // spec.groups - 2 * start)
            vectors.append(define(tirx.reinterpret(f"{PAIR}x{TILE_ROWS}", bits), TILE_ROWS, PAIR, statements))
        for number, column in enumerate(transpose(vectors, TILE_POSITIONS, PAIR, statements)):
            if number < filled:
                values = tirx.reinterpret(f"{BITS}x{_VECTOR}", column)
                statements.append(_put(store, loops, start + number, along * TILE_POSITIONS, values))
        return sequence(statements)

    whole, rest = divmod(pairs, TILE_ROWS)
    parts = [tirx.For(across, 0, whole, tirx.ForKind.SERIAL, square(across * TILE_ROWS, TILE_ROWS))] if whole else []
    parts += [square(tirx.const(whole * TILE_ROWS, "int32"), rest)] if rest else []
    extent = int(position.extent) // TILE_POSITIONS
    return tirx.For(along, 0, extent, tirx.ForKind.SERIAL, sequence(parts))


def _first_bits(load: Any, place: Sequence[Expr], count: Expr) -> Expr:
    """So many values, at most a vector of them, from one of what `load` reads on, and zeros."""
    address = tirx.address_of(tirx.BufferLoad(load.source, list(place)))
    return tirx.call_extern(f"{BITS}x{_VECTOR}", "convt_first_bits", address, count)


def _put(store: Any, loops: Sequence[Loop], pair: Expr, position: Expr, values: Expr) -> Statement:
    """Store a vector of pairs side by side, from a position on."""
    *place, _, _, _ = (at_start(index, loops) for index in store.indices)
    return tirx.BufferStore(store.buffer, values, [*place, pair, position, ramp(tirx.const(0, "int32"), _VECTOR)])
