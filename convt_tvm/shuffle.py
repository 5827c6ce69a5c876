"""Transposes and interleaves in vector registers, as TVM statements.

Sums whose lanes are output channels leave for an output whose columns are contiguous; one by one that takes an
instruction or two for each value. Here ``2**k`` vectors are transposed by ``k`` rounds of shuffles: a quarter of a
shuffle for each value of a 16 x 16 matrix. All of them either riffle two vectors within groups of 16 bytes or deal out
whole groups: x86 has instructions for both that need no register to hold the pattern (``unpcklps``, ``vshuff64x2``). A
pattern in a register costs more than its shuffles where sums fill all the others, for LLVM loads it ahead of them and
spills two (maskrcnn/mask, 28 sums: a fifth slower).

Sums whose lanes are columns of one phase are interleaved with those of the other phases: one or two shuffles for each
vector stored, with patterns in registers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import DataType, tirx

from convt_tvm.statements import on_stack

__all__ = [
    "binary",
    "define",
    "extract",
    "interleave",
    "pieces",
    "ramp",
    "transpose",
    "transpose_values",
    "vector_dtype",
]

GROUP_BYTES = 16

Expr = Any
Statement = Any


def pieces(count: int, limit: int) -> list[tuple[int, int]]:
    """Start and size of power-of-two pieces, at most `limit` long, that together cover ``range(count)``.

    The last may cover values of the one before it again; none reaches beyond `count`.

    >>> pieces(28, 16), pieces(12, 16), pieces(3, 16)
    ([(0, 16), (12, 16)], [(0, 8), (8, 4)], [(0, 2), (2, 1)])
    """
    size = 1 << (min(count, limit).bit_length() - 1)
    found = [(start, size) for start in range(0, count - size + 1, size)]
    rest = count % size
    if rest:
        last = 1 << (rest - 1).bit_length()
        found.append((count - last, last))
    return found


def binary(count: int) -> list[tuple[int, int]]:
    """Start and size of the power-of-two pieces of ``range(count)``, the largest first.

    >>> binary(13)
    [(0, 8), (8, 4), (12, 1)]
    """
    sizes = [1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]
    return [(count - count % (2 * size), size) for size in sizes]


def extract(vector: Expr, start: int, size: int, lanes: int) -> Expr:
    """Lanes `start` and following, `size` of them, of a vector that has `lanes`."""
    return vector if size == lanes else _shuffle([vector], range(start, start + size))


def interleave(vectors: Sequence[Expr], lanes: int, dtype: str, statements: list[Statement]) -> list[Expr]:
    """The first values of all `vectors`, then the second ones, and so on, as as many vectors of `lanes` values.

    For a power of two of them, riffled: one shuffle for each of a vector's rounds. Others take one for each vector met.
    """
    count = len(vectors)
    if count & (count - 1):
        places = [(i % count) * lanes + i // count for i in range(count * lanes)]
        woven = [_shuffle(vectors, places[start : start + lanes]) for start in range(0, count * lanes, lanes)]
        return [define(vector, lanes, dtype, statements) for vector in woven]
    riffles = [[start + i // 2 + i % 2 * lanes for i in range(lanes)] for start in (0, lanes // 2)]
    for _ in range(count.bit_length() - 1):
        pairs = zip(vectors[: count // 2], vectors[count // 2 :], strict=True)
        vectors = [define(_shuffle(pair, picked), lanes, dtype, statements) for pair in pairs for picked in riffles]
    return list(vectors)


def vector_dtype(dtype: str, lanes: int) -> str:
    """The dtype of `lanes` values.

    >>> vector_dtype("float32", 16), vector_dtype("float32", 1)
    ('float32x16', 'float32')
    """
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def ramp(first: Expr, lanes: int) -> Expr:
    """The index of `lanes` contiguous values."""
    return first if lanes == 1 else tirx.Ramp(first, tirx.const(1, "int32"), lanes)


def transpose(rows: Sequence[Expr], lanes: int, dtype: str, statements: list[Statement]) -> Iterator[Expr]:
    """The columns of a matrix, first to last, each a vector.

    Parameters
    ----------
    rows
        Vectors of `lanes` values of `dtype`, a power of two of them and not more than `lanes`, itself a power of two.
    statements
        Takes the statements that define what the columns are expressed by.
    """

    def shuffle(first: Expr, second: Expr, picked: Sequence[int]) -> Expr:
        return define(_shuffle([first, second], picked), lanes, dtype, statements)

    group = min(lanes, GROUP_BYTES // DataType(dtype).itemsize)
    firsts = range(0, lanes, group)
    # Values of two vectors by turns: from the first half of each group, and from the second.
    riffles = [
        [first + half + i // 2 + i % 2 * lanes for first in firsts for i in range(group)] for half in (0, group // 2)
    ]
    # Groups of two vectors: those with even numbers, and those with odd ones.
    deals = [[first + i for first in range(start, 2 * lanes, 2 * group) for i in range(group)] for start in (0, group)]

    def riffle(vectors: Sequence[Expr]) -> list[Expr]:
        half = len(vectors) // 2
        return [shuffle(vectors[i], vectors[half + i], picked) for i in range(half) for picked in riffles]

    def deal(vectors: Sequence[Expr]) -> list[Expr]:
        if len(vectors) == 1:
            return list(vectors)
        even, odd = (
            deal([shuffle(*pair, picked) for pair in zip(vectors[::2], vectors[1::2], strict=True)]) for picked in deals
        )
        return [vector for pair in zip(even, odd, strict=True) for vector in pair]

    block = min(group, len(rows))
    blocks = []
    for start in range(0, len(rows), block):
        vectors = list(rows[start : start + block])
        for _ in range(block.bit_length() - 1):
            vectors = riffle(vectors)
        blocks.append(vectors)
    places = [list(vectors) for vectors in zip(*blocks, strict=True)]
    if len(rows) == lanes:
        dealt = [deal(vectors) for vectors in places]
        yield from (vectors[number] for number in range(len(firsts)) for vectors in dealt)
        return
    for first in firsts:
        for vectors in places:
            for start in range(first, first + group, block):
                yield _shuffle(vectors, [j * lanes + start + i for j in range(len(blocks)) for i in range(block)])


def transpose_values(
    read: Callable[[int, Expr], Expr], rows: int, lanes: int, dtype: str, statements: list[Statement]
) -> Iterator[Expr]:
    """The columns of the matrix with ``read(row, lane)`` in its `rows` and `lanes`, as `transpose` gives them."""
    staged = tirx.decl_buffer((rows, lanes), dtype, name="staged")
    statements.append(on_stack(tirx.AllocBuffer(staged)))
    for row in range(rows):
        lane = tirx.Var("lane", "int32")
        vector = tirx.BufferStore(staged, read(row, lane), [tirx.const(row, "int32"), lane])
        statements.append(tirx.For(lane, 0, lanes, tirx.ForKind.VECTORIZED, vector))
    return transpose([tirx.BufferLoad(staged, [row, ramp(0, lanes)]) for row in range(rows)], lanes, dtype, statements)


def define(vector: Expr, lanes: int, dtype: str, statements: list[Statement]) -> Expr:
    """A name for `vector`, which `statements` come to define."""
    name = tirx.Var("shuffled", vector_dtype(dtype, lanes))
    statements.append(tirx.Bind(name, vector))
    return name


def _shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    return tirx.Shuffle(list(vectors), [tirx.const(lane, "int32") for lane in lanes])
