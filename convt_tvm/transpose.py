"""Transposes in vector registers, as TVM statements.

Sums whose lanes are output channels leave for an output whose columns are contiguous; one by one that takes an
instruction or two for each value. Here ``2**k`` vectors are transposed by ``k`` rounds of shuffles: a quarter of a
shuffle for each value of a 16 x 16 matrix. All of them either riffle two vectors within groups of 16 bytes or deal out
whole groups: x86 has instructions for both that need no register to hold the pattern (``unpcklps``, ``vshuff64x2``). A
pattern in a register costs more than its shuffles, for LLVM loads it ahead of the sums and spills two of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tvm import DataType, tirx

__all__ = ["pieces", "ramp", "transpose"]

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
        name = tirx.Var("shuffled", f"{dtype}x{lanes}")
        statements.append(tirx.Bind(name, _shuffle([first, second], picked)))
        return name

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


def _shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    return tirx.Shuffle(list(vectors), [tirx.const(lane, "int32") for lane in lanes])
