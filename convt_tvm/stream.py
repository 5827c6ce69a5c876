"""Large outputs: written to memory in whole runs, past the caches; and cache lines asked for before they are written.

A store to a line that is in no cache first reads the line from memory, and holds up every store after it meanwhile.
Where an output is too large for the caches anyway, a task gathers its rows on the side, for each channel a run of them
that is contiguous in the output, and copies whole cache lines by stores that read nothing (``vmovntps``). For smaller
ones, which the next layer will read from the cache, it asks for the lines of a tile before it sums.

On one core of a Zen 4 server stores wrote 20 GB/s in order, those past the caches 50.
"""

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx

from convt_tvm.layout import CACHE_LINE_BYTES
from convt_tvm.statements import import_llvm

__all__ = ["ask_for", "copy_past_caches", "define_copy"]

Expr = Any
Statement = Any

_COPY = "convt_copy_past_caches"
_WRITE, _SECOND_CACHE, _DATA = 1, 2, 1
"""Arguments of ``llvm.prefetch``: for writing, into the second cache (the first is left to inputs), of data."""


def ask_for(buffer: Any, places: Sequence[Sequence[Expr]]) -> list[Statement]:
    """Statements that ask for the cache lines of elements of `buffer`, without waiting for them."""
    constants = [tirx.const(value, "int32") for value in (_WRITE, _SECOND_CACHE, _DATA)]
    addresses = [tirx.address_of(tirx.BufferLoad(buffer, list(place))) for place in places]
    return [tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", each, *constants)) for each in addresses]


def copy_past_caches(target: Expr, source: Expr, size_bytes: Expr) -> Statement:
    """A statement that copies so many bytes between addresses that share no memory; `define_copy` is around it."""
    return tirx.Evaluate(tirx.call_extern("void", _COPY, target, source, tirx.Cast("int64", size_bytes)))


def define_copy(body: Statement, dtype: str, arch: str) -> Statement:
    """`body` with what `copy_past_caches` calls, for elements of `dtype`.

    TIR has no such stores. LLVM makes them of any store marked so.
    """
    text = _copy_text(tvm.DataType(dtype).bits, fence=arch == "x86_64")
    return import_llvm(body, text)


def _copy_text(bits: int, *, fence: bool) -> str:
    """The copy in LLVM's language: elements up to a cache line's begin, whole lines, the elements that are left.

    An address need not be a multiple of an element's size. Then the last element before the lines and the first one
    behind them reach into a line, with the same bytes.

    The fence is what makes such stores visible to a thread that sees any later store of this one; Arm's need none,
    since whatever tells the other thread orders them.
    """
    line = f"<{CACHE_LINE_BYTES} x i8>"
    return f"""
declare void @llvm.x86.sse.sfence()

define linkonce_odr hidden void @{_COPY}(ptr noalias %to, ptr noalias %from, i64 %bytes) alwaysinline {{
begin:
  %address = ptrtoint ptr %to to i64
  %behind = sub i64 0, %address
  %gap = and i64 %behind, {CACHE_LINE_BYTES - 1}
  %head = call i64 @llvm.umin.i64(i64 %gap, i64 %bytes)
  %rest = sub i64 %bytes, %head
  %inside = and i64 %rest, -{CACHE_LINE_BYTES}
  %tail = add i64 %head, %inside
  %no_head = icmp eq i64 %head, 0
  br i1 %no_head, label %lines, label %head_element

{_element_loop("head", "begin", "0", "%head", "lines", bits)}

lines:
  %any_line = icmp ult i64 %head, %tail
  br i1 %any_line, label %line, label %tail_begin

line:
  %l = phi i64 [ %head, %lines ], [ %l_next, %line ]
  %l_from = getelementptr i8, ptr %from, i64 %l
  %l_to = getelementptr i8, ptr %to, i64 %l
  %l_value = load {line}, ptr %l_from, align 1
  store {line} %l_value, ptr %l_to, align {CACHE_LINE_BYTES}, !nontemporal !0
  %l_next = add i64 %l, {CACHE_LINE_BYTES}
  %l_more = icmp ult i64 %l_next, %tail
  br i1 %l_more, label %line, label %tail_begin

tail_begin:
  %whole = and i64 %tail, -{bits // 8}
  %any_tail = icmp ult i64 %tail, %bytes
  br i1 %any_tail, label %tail_element, label %end

{_element_loop("tail", "tail_begin", "%whole", "%bytes", "end", bits)}

end:
  {"call void @llvm.x86.sse.sfence()" if fence else ""}
  ret void
}}

declare i64 @llvm.umin.i64(i64, i64)

!0 = !{{i32 1}}
"""


def _element_loop(name: str, before: str, first: str, stop: str, after: str, bits: int) -> str:
    """The block ``<name>_element``: copies elements from byte `first` to `stop`, of which there is one at least."""
    return f"""{name}_element:
  %{name}_at = phi i64 [ {first}, %{before} ], [ %{name}_next, %{name}_element ]
  %{name}_from = getelementptr i8, ptr %from, i64 %{name}_at
  %{name}_to = getelementptr i8, ptr %to, i64 %{name}_at
  %{name}_value = load i{bits}, ptr %{name}_from, align 1
  store i{bits} %{name}_value, ptr %{name}_to, align 1
  %{name}_next = add i64 %{name}_at, {bits // 8}
  %{name}_more = icmp ult i64 %{name}_next, {stop}
  br i1 %{name}_more, label %{name}_element, label %{after}"""
