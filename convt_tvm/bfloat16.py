"""Instructions of x86 that take or give bfloat16 (AVX-512 BF16), for targets of which `Target.multiplies_pairs` holds.

TVM computes bfloat16 in float32, arguments of instructions included. So they come as functions in LLVM's language,
which LLVM puts in the place of their calls:

- ``vdpbf16ps`` adds to each sum in float32 two products. It takes subnormal numbers for zero;
- ``vcvtneps2bf16`` and ``vcvtne2ps2bf16`` round float32, where TVM's own arithmetic takes five instructions. They take
  subnormal numbers for zero.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tvm import tirx

from convt_tvm.shuffle import define, transpose
from convt_tvm.statements import import_llvm

__all__ = [
    "LANES",
    "PAIR",
    "add_products",
    "define_functions",
    "narrow",
    "pair_at",
    "transpose_pairs",
]

LANES = (16, 8, 4)
"""Vectors of float32 for which there are instructions."""
PAIR = "uint32"
"""Two bfloat16, the first in the lower half."""

_FUNCTIONS = """
declare <{n} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{n} x float>, <{m} x bfloat>, <{m} x bfloat>)
declare <{m} x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.{bits}(<{n} x float>, <{n} x float>)

define linkonce_odr hidden <{n} x float> @convt_dot{n}(<{n} x float> %s, <{n} x i32> %a, <{n} x i32> %b) alwaysinline {{
  %x = bitcast <{n} x i32> %a to <{m} x bfloat>
  %y = bitcast <{n} x i32> %b to <{m} x bfloat>
  %r = call <{n} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{n} x float> %s, <{m} x bfloat> %x, <{m} x bfloat> %y)
  ret <{n} x float> %r
}}

define linkonce_odr hidden <{n} x i16> @convt_narrow{n}(<{n} x float> %a) alwaysinline {{
  %x = fptrunc <{n} x float> %a to <{n} x bfloat>
  %r = bitcast <{n} x bfloat> %x to <{n} x i16>
  ret <{n} x i16> %r
}}

define linkonce_odr hidden <{n} x i32> @convt_pair{n}(<{n} x float> %a, <{n} x float> %b) alwaysinline {{
  %x = call <{m} x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.{bits}(<{n} x float> %b, <{n} x float> %a)
  %y = shufflevector <{m} x bfloat> %x, <{m} x bfloat> poison, <{m} x i32> <{riffle}>
  %r = bitcast <{m} x bfloat> %y to <{n} x i32>
  ret <{n} x i32> %r
}}
"""
_READ = """
define linkonce_odr hidden i32 @convt_pair_at(ptr %address, i32 %offset) alwaysinline {
  %far = sext i32 %offset to i64
  %place = getelementptr i32, ptr %address, i64 %far
  %pair = load i32, ptr %place, align 2
  ret i32 %pair
}
"""

Expr = Any
Statement = Any


def define_functions(body: Statement) -> Statement:
    """`body` with what the other functions of this module call."""
    texts = [_READ]
    for n in LANES:
        riffle = ", ".join(f"i32 {i // 2 + i % 2 * n}" for i in range(2 * n))
        texts.append(_FUNCTIONS.format(n=n, m=2 * n, bits=32 * n, riffle=riffle))
    return import_llvm(body, "".join(texts))


def add_products(sums: Expr, first: Expr, second: Expr, lanes: int) -> Expr:
    """`sums` plus, in each lane, the products of two pairs."""
    return tirx.call_pure_extern(f"float32x{lanes}", f"convt_dot{lanes}", sums, first, second)


def pair_at(address: Expr, offset: Expr) -> Expr:
    """The pair so many pairs after an address."""
    return tirx.call_extern(PAIR, "convt_pair_at", address, offset)


def narrow(vector: Expr, lanes: int) -> Expr:
    """A vector of float32 rounded to bfloat16."""
    bits = tirx.call_pure_extern(f"uint16x{lanes}", f"convt_narrow{lanes}", vector)
    return tirx.reinterpret(f"bfloat16x{lanes}", bits)


def transpose_pairs(rows: Sequence[Expr], lanes: int, statements: list[Statement]) -> Iterator[Expr]:
    """As `shuffle.transpose`, rounded to bfloat16 before: up to twice as many rows, in half the shuffles.

    Their number is a power of two and at least two.
    """
    dtype, count = f"{PAIR}x{lanes}", len(rows)
    pairs = [
        define(tirx.call_pure_extern(dtype, f"convt_pair{lanes}", *two), lanes, PAIR, statements)
        for two in zip(rows[::2], rows[1::2], strict=True)
    ]
    columns: Iterable[Expr] = transpose(pairs, lanes, PAIR, statements)
    yield from (tirx.reinterpret(f"bfloat16x{count}", column) for column in columns)
