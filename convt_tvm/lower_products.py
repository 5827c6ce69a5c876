"""Sums of products as statements on vectors, with what they read of the image at constant distances from one address.

With lanes along channels a value of the image meets a vector of weights, along columns a vector of it meets one weight.
Left as an index each of a tile's values is a sum of numbers of 32 bits. Of those of channels LLVM makes vectors, and
takes them apart again in the innermost loop (in 2 of 25 layers drawn, and in 6 of 25 in channels_last; dilated/k3d2 in
bfloat16 took half as long again). Those of columns it works out one by one: fsrcnn/x3 took 95 instructions for 36
multiply-adds, and takes 60.

Weights that come from beyond the second cache are asked for `AHEAD_BYTES` before their products: a core that waits for
them itself has too few loads under way (Emerald Rapids, one core: pose/1 from 8.9 to 6.6 ms, dcgan/2 from 0.56 to 0.44,
hifigan/up1 2.26 to 2.07).
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import tvm
from tvm import tirx
from tvm.tirx.analysis import undefined_vars

from convt_tvm.compute import PARTIAL
from convt_tvm.layout import CACHE_LINE_BYTES, PAST_CACHES_BYTES, Layout
from convt_tvm.shuffle import ramp, vector_dtype
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.statements import (
    LLVM_TYPES,
    at_start,
    depends_on,
    element_number,
    ever,
    find_guard,
    find_load,
    import_llvm,
    inside,
    nest,
    rewrite,
    sequence,
)
from convt_tvm.stream import ask_for
from convt_tvm.target import Target

__all__ = ["asks_for_weights", "define_turns", "multiply_from_one_address", "multiply_vectors", "take_turn"]

Expr = Any
Statement = Any
Read: TypeAlias = Callable[[Expr, Expr, int], Expr]
"""The value so many elements after an address, or the vector of so many lanes."""
Add: TypeAlias = Callable[[Expr, Expr, Callable[[int], Expr], int], Expr]
"""Sums in so many lanes plus products: of a value with weights, or of a vector with one weight.

The function given loads as many weights as it is asked for.
"""

_IN_TURN = """
define linkonce_odr hidden void @convt_in_turn() alwaysinline {
  call void asm sideeffect "", "~{memory}"()
  ret void
}
"""
"""No instruction, which might write to memory as far as LLVM knows: what is loaded after it is not loaded before."""
UNROLLED_WHOLE = 120
"""Multiply-adds in all iterations of a loop up to which LLVM may unroll it whole; of 128 it leaves a loop.

With 96 for it 12 to 192 channels with 6 x 6 taps, in tiles of 16 channels by 5 columns, were 2,160 multiply-adds
without a loop and 1,400 vectors to or from the stack, and took 1.9 times as long on a Zen 3 core; 16 to 256 channels in
tiles of 8 by 7 1.6 times. Of 8 to 14 channels most of 75 tiles took 0.5 to 1.0 of the time that they take with 0; 14 in
tiles of 8 sums 1.1 to 1.2, which LLVM unrolls only in turn.
"""
AHEAD_BYTES = 8 << 10
"""Less leaves some waiting, more is lost where a tap ends: pose/1 took 0.85, 0.83, 0.77, 0.75 and 0.76 of the time with
1, 2, 4, 8 and 16 KiB, dcgan/2 0.84, 0.79 and 0.90 with 4, 8 and 16."""

_READ = """
define linkonce_odr hidden {result} @convt_{dtype}_at(ptr %address, i32 %offset) alwaysinline {{
  %far = sext i32 %offset to i64
  %place = getelementptr {element}, ptr %address, i64 %far
  %value = load {result}, ptr %place, align 1
  ret {result} %value
}}
"""
_LANES = (1, 2, 4, 8, 16)


def asks_for_weights(spec: ConvTranspose2dSpec, layout: Layout, target: Target) -> bool:
    """Whether weights are asked for: where they are too many to stay in the second cache until they are read again.

    On a Zen 4 core not where each meets a single value and the last cache holds all: there to ask takes as long as to
    load (dcgan/1 and three others of 1 x 1 images, 2 to 10 MB, took 0.80 to 0.87 of the time without; 34 MB, with two
    images, 1.2 times as long, and with four 1.5 times).
    """
    size = prod(layout.packed_shape(spec)) * DTYPE_BYTES[layout.packed_dtype(spec)]
    meets_one = spec.ih * spec.iw * layout.image_block == 1
    return size > target.held_weight_bytes and not (target.halves_vectors and meets_one and size < PAST_CACHES_BYTES)


def multiply_vectors(body: Statement, dtype: str, *, asks_ahead: bool, in_turn: int | None) -> Statement:
    """`body` with its sums of products of `dtype` on vectors; see `multiply_from_one_address`."""

    def read(address: Expr, offset: Expr, lanes: int) -> Expr:
        result = vector_dtype(dtype, lanes)
        return tirx.call_extern(result, f"convt_{result}_at", address, offset)

    def add(sums: Expr, value: Expr, weights: Callable[[int], Expr], lanes: int) -> Expr:
        if tvm.DataType(str(value.ty.dtype)).lanes == lanes:
            return sums + value * tirx.Broadcast(weights(1), lanes)
        return sums + tirx.Broadcast(value, lanes) * weights(lanes)

    element = LLVM_TYPES[dtype]
    texts = [
        _READ.format(
            dtype=vector_dtype(dtype, lanes), element=element, result=f"<{lanes} x {element}>" if lanes > 1 else element
        )
        for lanes in _LANES
    ]
    return import_llvm(
        multiply_from_one_address(body, dtype, read, add, asks_ahead=asks_ahead, in_turn=in_turn), "".join(texts)
    )


def multiply_from_one_address(
    body: Statement, dtype: str, read: Read, add: Add, *, asks_ahead: bool, in_turn: int | None = None
) -> Statement:
    """`body` with each nest of loops that adds products to partial sums replaced.

    Those that read images of `dtype`, and whose innermost loop, over channels or columns, is to become vectors. With
    `asks_ahead` each asks for weights that later steps will read.

    Where phases are a loop, whether one has a tap is asked once for all products that depend on it, which LLVM does not
    see to by itself: with 8 x 8 taps, stride 4 and dilation 2, where two of four phases have taps, 16 to 10 channels
    took 0.5 of the time and 96 to 64 in channels_last 0.3 (Emerald Rapids).

    Of steps that are unrolled LLVM loads at once what 16 registers do not hold, and puts sums on the stack for it. With
    `in_turn` what a step reads is loaded after the step before. Steps are the iterations of the loop around the
    unrolled ones, if LLVM will unroll it as well, and those of so many of the unrolled ones. On a Zen 3 core 3 to 64
    channels with 7 x 7 taps took 0.70 of the time in channels_last, kernelbench/75 0.88 to 0.91, fsrcnn/x3 0.98; in a
    loop that LLVM unrolls in part grouped/4 took 1.07. Products are not held in turn: those of phases that are not in
    step LLVM puts off, with all that they need (8 to 8 channels, stride 4: 1.12).
    """
    has_turns = False

    def change(node: Any) -> Statement | None:
        nonlocal has_turns
        loops, node = inside(node)
        guard, depth = None, 0
        if isinstance(node, tirx.IfThenElse):
            # Where column phases are not unrolled the condition is around the sum already.
            guard, node = node.condition, node.then_case
            variables = set(undefined_vars(guard))
            depth = max((i for i, loop in enumerate(loops, 1) if loop.loop_var in variables), default=0)
        if not (loops and isinstance(node, tirx.BufferStore) and str(node.buffer.name).startswith(PARTIAL)):
            return None
        window, image, weight = (find_load(node.value, name) for name in ("window", "input", "packed"))
        load = image if window is None else window
        lane = loops[-1]
        if load is None or weight is None or str(load.ty.dtype) != dtype or lane.kind != tirx.ForKind.VECTORIZED:
            return None
        lanes = int(lane.extent)
        of_image, of_weights = (
            any(depends_on(index, lane.loop_var) for index in each.indices) for each in (load, weight)
        )
        if of_image and of_weights:
            # Lanes along groups.
            return None

        # Unrolled loops and the one around them.
        within = next((i for i in reversed(range(len(loops) - 1)) if loops[i].kind != tirx.ForKind.UNROLLED), 0)
        first = [at_start(index, loops[within:]) for index in load.indices]
        offset = element_number(load.source, load.indices) - element_number(load.source, first)
        address = tirx.address_of(tirx.BufferLoad(load.source, first))
        value = read(address, at_start(offset, [lane]), lanes if of_image else 1)

        *place, start = (at_start(index, [lane]) for index in node.indices)
        sums = tirx.BufferLoad(node.buffer, [*place, ramp(start, lanes)])
        *place_of_weight, first_weight = (at_start(index, [lane]) for index in weight.indices)

        def weights(count: int) -> Expr:
            return tirx.BufferLoad(weight.source, [*place_of_weight, ramp(first_weight, count)])

        added = add(sums, value, weights, lanes)
        statement = tirx.BufferStore(node.buffer, added, [*place, ramp(start, lanes)])
        if guard is None and (guard := find_guard(node.value)) is not None:
            depth = len(loops) - 1

        def products(first: int) -> Statement:
            """The products in the loops from number `first` on."""
            if guard is None or depth < first:
                return nest(loops[first:-1], statement)
            return nest(loops[first:depth], tirx.IfThenElse(guard, nest(loops[depth:-1], statement), None))

        def around(last: int, body: Statement) -> Statement:
            """`body` in the loops up to number `last`."""
            if guard is None or depth >= last:
                return nest(loops[:last], body)
            return nest(loops[:depth], tirx.IfThenElse(guard, nest(loops[depth:last], body), None))

        is_rolled = loops[within].kind != tirx.ForKind.UNROLLED
        if in_turn or (in_turn == 0 and is_rolled and _iterations(loops[within:-1]) <= UNROLLED_WHOLE):
            steps, has_turns = within + is_rolled + in_turn, True
            return around(steps, sequence([take_turn(), products(steps)]))
        if not asks_ahead or not is_rolled:
            return products(0)
        asked = sequence(_ask_ahead(weight, loops[within + 1 :]))
        if guard is not None and depth > within:
            # A step without products needs none.
            asked = tirx.IfThenElse(ever(guard, loops[within + 1 : -1]), asked, None)
        return around(within + 1, sequence([asked, products(within + 1)]))

    body = rewrite(body, change)
    return define_turns(body) if has_turns else body


def take_turn() -> Statement:
    """A statement before which LLVM loads nothing that the function loads after it; see `define_turns`."""
    return tirx.Evaluate(tirx.call_extern("void", "convt_in_turn"))


def define_turns(body: Statement) -> Statement:
    """`body` with what `take_turn` calls."""
    return import_llvm(body, _IN_TURN)


def _iterations(loops: Sequence[Any]) -> int:
    return prod(int(loop.extent) for loop in loops)


def _ask_ahead(weight: Any, loops: Sequence[Any]) -> list[Statement]:
    """Statements that ask for weights as far ahead as `AHEAD_BYTES` of all that `weight` reads in `loops`.

    They are side by side, one line of the cache after the other. Those of the next tap come from elsewhere, if it is
    of another row, and its first are waited for.
    """
    itemsize = tvm.DataType(str(weight.ty.dtype)).itemsize
    *place, first = (at_start(index, loops) for index in weight.indices)
    lines = range(0, int(weight.source.shape[-1]) * itemsize, CACHE_LINE_BYTES)
    places = [[*place, first + (AHEAD_BYTES + line) // itemsize] for line in lines]
    return ask_for(weight.source, places, to_write=False)
