"""Large outputs, written to memory in whole runs past the caches; and cache lines asked for before they are needed.

A store to a line that is in no cache first reads the line from memory, and holds up every store after it meanwhile.
Where an output is too large for the caches anyway, a task gathers its rows on the side, for each channel a run of them
that is contiguous in the output, and copies whole cache lines by stores that read nothing (``vmovntps``). Where vectors
are as long as a line, and an instruction joins any parts of two, lines leave from registers instead. For smaller
outputs, which the next layer will read from the cache, it asks for the lines of a tile before it sums. Weights that do
not stay in the second cache are asked for some steps before they are multiplied.

On one core of a Zen 4 server stores wrote 20 GB/s in order, those past the caches 50. They take no time if there are
but some dozens at once, for which the core has buffers, and sums between; the fence waits for all of them.
"""

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx

from convt_tvm.layout import CACHE_LINE_BYTES
from convt_tvm.statements import import_llvm

__all__ = ["ask_for", "copy_past_caches", "define_copy", "define_lines", "end_copies", "put_line"]

Expr = Any
Statement = Any

_COPY, _LINE, _EDGE = "convt_copy_past_caches", "convt_put_line", "convt_put_edge"
_DATA = 1
_FOR_WRITING, _FOR_READING = (1, 2, _DATA), (0, 3, _DATA)
"""Arguments of ``llvm.prefetch``: to write in the second cache (the first is left to inputs), to read in the first."""


def ask_for(buffer: Any, places: Sequence[Sequence[Expr]], *, to_write: bool) -> list[Statement]:
    """Statements that ask for the cache lines of elements of `buffer`, without waiting for them.

    An element beyond the buffer's end does no harm.
    """
    constants = [tirx.const(value, "int32") for value in (_FOR_WRITING if to_write else _FOR_READING)]
    addresses = [tirx.address_of(tirx.BufferLoad(buffer, list(place))) for place in places]
    return [tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", each, *constants)) for each in addresses]


def copy_past_caches(target: Expr, source: Expr, first: Expr, stop: Expr, size: Expr) -> Statement:
    """A statement that copies the bytes from `first` to `stop` of `size`; `define_copy` is around it.

    `target` and `source` are addresses that share no memory. What is copied begins and ends with a cache line of the
    target, or where all bytes do: parts that follow each other from 0 to `size` copy every byte, and each line once.
    `end_copies` comes after the last.
    """
    sizes = (tirx.Cast("int64", each) for each in (first, stop, size))
    return tirx.Evaluate(tirx.call_extern("void", _COPY, target, source, *sizes))


def end_copies(arch: str) -> list[Statement]:
    """What makes copies visible to a thread that sees any later store of this one.

    Arm needs no statement: whatever tells the other thread orders them.
    """
    return [tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.x86.sse.sfence"))] if arch == "x86_64" else []


def define_copy(body: Statement, dtype: str) -> Statement:
    """`body` with what `copy_past_caches` calls, for elements of `dtype`.

    TIR has no such stores. LLVM makes them of any store marked so.
    """
    return import_llvm(body, _copy_text(tvm.DataType(dtype).bits))


def put_line(
    passes: Expr, begin: Expr, row: Expr, place: Expr, before: Expr, now: Expr, size: Expr | None
) -> Statement:
    """A statement that writes the cache line which ends among the values `now`, at `place` in a row, past the caches.

    Only where it `passes`; otherwise, by way of the caches, just the values.

    `row` is the address of a row of `size` values, `begin` that of all rows, and `before` has the values before
    `place`. So vector after vector of a row, and its last one once more as if it followed, write the whole row. Lines
    at its ends are shared with others: with `size` values of the row alone are written, through the caches where they
    are no whole line; without it the line is known to be whole. `define_lines` is around it, and `end_copies` comes
    after the last.
    """
    passes, place = tirx.Cast("int32", passes), tirx.Cast("int64", place)
    if size is None:
        return tirx.Evaluate(tirx.call_extern("void", _LINE, passes, begin, row, place, before, now))
    return tirx.Evaluate(
        tirx.call_extern("void", _EDGE, passes, begin, row, place, before, now, tirx.Cast("int64", size))
    )


def define_lines(body: Statement, dtype: str) -> Statement:
    """`body` with what `put_line` calls, for values of `dtype`, float32 or float64, on a processor with AVX-512."""
    return import_llvm(body, _lines_text(tvm.DataType(dtype).bits))


def _lines_text(bits: int) -> str:
    """How lines are put together, in LLVM's language: by one permutation of two vectors.

    Where nothing passes the caches, or an address is no multiple of a value's size, each vector is stored as it is.
    """
    lanes, size_bytes = 8 * CACHE_LINE_BYTES // bits, bits // 8
    kind, name = ("float", "ps") if bits == 32 else ("double", "pd")
    vector, places = f"<{lanes} x {kind}>", f"<{lanes} x i{bits}>"
    numbers = f"<{', '.join(f'i{bits} {lane}' for lane in range(lanes))}>"

    def splat(value: str, result: str) -> str:
        return f"""
  %{result}_one = insertelement {places} poison, i{bits} {value}, i64 0
  %{result} = shufflevector {places} %{result}_one, {places} poison, <{lanes} x i32> zeroinitializer"""

    def lane_number(value: str, result: str) -> str:
        return f"%{result} = add i64 {value}, 0" if bits == 64 else f"%{result} = trunc i64 {value} to i{bits}"

    def some(first: str, to: str, value: str, label: str) -> str:
        """Store those values that are in the row."""
        return f"""
  {lane_number(first, f"{label}_first")}{splat(f"%{label}_first", f"{label}_firsts")}
  %{label}_places = add {places} %{label}_firsts, {numbers}
  {lane_number("%size", f"{label}_size")}{splat(f"%{label}_size", f"{label}_sizes")}
  %{label}_inside = icmp ult {places} %{label}_places, %{label}_sizes
  call void @llvm.masked.store.v{lanes}f{bits}.p0({vector} {value}, ptr {to}, i32 1, <{lanes} x i1> %{label}_inside)
  ret void"""

    def define(function: str, size: str, whole: str, plain: str) -> str:
        return f"""
define linkonce_odr hidden void @{function}(
  i32 %passes, ptr %begin, ptr %row, i64 %place, {vector} %before, {vector} %now{size}
) alwaysinline {{
  %first_address = ptrtoint ptr %begin to i64
  %odd = and i64 %first_address, {size_bytes - 1}
  %is_even = icmp eq i64 %odd, 0
  %may_pass = icmp ne i32 %passes, 0
  %fits = and i1 %may_pass, %is_even
  %at_place = getelementptr {kind}, ptr %row, i64 %place
  br i1 %fits, label %line, label %plain

line:
  %address = ptrtoint ptr %row to i64
  %behind = sub i64 0, %address
  %gap = and i64 %behind, {CACHE_LINE_BYTES - 1}
  %shift = udiv exact i64 %gap, {size_bytes}
  {lane_number("%shift", "shift_lanes")}{splat("%shift_lanes", "shifts")}
  %picked = add {places} %shifts, {numbers}
  %value = call {vector} @llvm.x86.avx512.vpermi2var.{name}.512({vector} %before, {places} %picked, {vector} %now)
  %end = add i64 %place, %shift
  %from = sub i64 %end, {lanes}
  %to = getelementptr {kind}, ptr %row, i64 %from
{whole}

plain:{plain}
}}
"""

    store = f"""  store {vector} %value, ptr %to, align {CACHE_LINE_BYTES}, !nontemporal !0
  ret void"""
    checked = f"""  %starts = icmp sge i64 %from, 0
  %ends = icmp sle i64 %end, %size
  %is_whole = and i1 %starts, %ends
  br i1 %is_whole, label %whole, label %check

whole:
{store}

check:
  %begins_before = icmp slt i64 %from, %size
  %ends_behind = icmp sgt i64 %end, 0
  %any = and i1 %begins_before, %ends_behind
  br i1 %any, label %part, label %none

none:
  ret void

part:{some("%from", "%to", "%value", "part")}"""
    plain = f"""
  store {vector} %now, ptr %at_place, align 1
  ret void"""
    return f"""
{define(_LINE, "", store, plain)}
{define(_EDGE, ", i64 %size", checked, some("%place", "%at_place", "%now", "odd_part"))}
declare {vector} @llvm.x86.avx512.vpermi2var.{name}.512({vector}, {places}, {vector})
declare void @llvm.masked.store.v{lanes}f{bits}.p0({vector}, ptr, i32, <{lanes} x i1>)

!0 = !{{i32 1}}
"""


def _copy_text(bits: int) -> str:
    """The copy in LLVM's language: elements up to a cache line's begin, whole lines, the elements that are left.

    An address need not be a multiple of an element's size. Then the last element before the lines and the first one
    behind them reach into a line, with the same bytes; and parts begin and end where they are asked to.
    """
    line = f"<{CACHE_LINE_BYTES} x i8>"
    return f"""
define linkonce_odr hidden void @{_COPY}(
  ptr noalias %whole_to, ptr noalias %whole_from, i64 %first, i64 %stop, i64 %size
) alwaysinline {{
begin:
  %whole_address = ptrtoint ptr %whole_to to i64
  %odd = and i64 %whole_address, {bits // 8 - 1}
  %fits = icmp eq i64 %odd, 0
  %mask = select i1 %fits, i64 {CACHE_LINE_BYTES - 1}, i64 0
  %first_address = add i64 %whole_address, %first
  %before_first = and i64 %first_address, %mask
  %from_byte = call i64 @llvm.usub.sat.i64(i64 %first, i64 %before_first)
  %stop_address = add i64 %whole_address, %stop
  %before_stop = and i64 %stop_address, %mask
  %stop_line = call i64 @llvm.usub.sat.i64(i64 %stop, i64 %before_stop)
  %is_last = icmp eq i64 %stop, %size
  %to_byte = select i1 %is_last, i64 %stop, i64 %stop_line
  %to = getelementptr i8, ptr %whole_to, i64 %from_byte
  %from = getelementptr i8, ptr %whole_from, i64 %from_byte
  %bytes = sub i64 %to_byte, %from_byte
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
  ret void
}}

declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.usub.sat.i64(i64, i64)

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
