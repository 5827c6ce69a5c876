"""Copies past the caches, and cache lines that are asked for."""

import re
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import tvm
from tvm import tirx

from convt_tvm.compiler import lower_choice
from convt_tvm.cpu_code import compile_library
from convt_tvm.space import choices, default_choice
from convt_tvm.stream import _lines_text, copy_past_caches, define_copy, define_lines, end_copies, put_line
from convt_tvm.target import Target
from convt_tvm.workloads import resolve

HOST = Target.parse("llvm").for_dtype("float32")


def copier(dtype, library):
    """``copy(source, target, first, stop, count)`` for a part of up to 300 elements, compiled."""
    source, target = (tirx.decl_buffer((300,), dtype, name=name, data_alignment=1) for name in ("source", "target"))
    first, stop, count = (tirx.Var(name, "int32") for name in ("first", "stop", "count"))
    start = [tirx.address_of(tirx.BufferLoad(buffer, [0])) for buffer in (target, source)]
    size = np.dtype(dtype).itemsize
    copied = copy_past_caches(*start, first * size, stop * size, count * size)
    body = define_copy(tirx.SeqStmt([copied, *end_copies(HOST.arch)]), dtype)
    function = tirx.PrimFunc([source, target, first, stop, count], body, tvm.ir.TupleType([]))
    compile_library(tvm.IRModule({"copy": function.with_attr("global_symbol", "copy")}), HOST, library)
    return tvm.runtime.load_module(str(library))["copy"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("parts", [1, 2, 3, 10])
def test_parts_write_every_byte_and_no_other(dtype, parts, tmp_path):
    copy, size = copier(dtype, tmp_path / "copy.so"), np.dtype(dtype).itemsize
    source = torch.arange(1, 301).to(getattr(torch, dtype))
    for count in (0, 1, 15, 16, 17, 64, 100, 250):
        for offset in (0, 1, 3, size, 32, 63):
            around = np.full(300 * size + 192, 77, np.uint8)
            start = -around.ctypes.data % 64 + 64 + offset
            target = torch.frombuffer(around, dtype=source.dtype, count=300, offset=start)
            bounds = [count * i // parts for i in range(parts + 1)]
            for first, stop in pairwise(bounds):
                copy(source, target, first, stop, count)
            assert torch.equal(target[:count], source[:count])
            assert (around[:start] == 77).all()
            assert (around[start + count * size :] == 77).all()


def test_parts_before_the_last_end_with_a_line(tmp_path):
    copy, source = copier("float32", tmp_path / "copy.so"), torch.arange(1.0, 301)
    around = np.zeros(400, np.float32)
    start = -around.ctypes.data // 4 % 16 + 16 + 5
    target = torch.from_numpy(around[start : start + 300])
    copy(source, target, 0, 100, 300)
    # Lines end 5 + 91 and 5 + 107 elements from one that begins before.
    assert int((target != 0).sum()) == 91
    copy(source, target, 100, 110, 300)
    assert int((target != 0).sum()) == 107


def writer(dtype, library):
    """``write(source, target, size, passes)`` for a row of up to 160 values, one vector after the other, compiled."""
    lanes = 64 // np.dtype(dtype).itemsize
    source, target = (tirx.decl_buffer((176,), dtype, name=name, data_alignment=1) for name in ("source", "target"))
    size, passes = tirx.Var("size", "int32"), tirx.Var("passes", "int32")
    begin = tirx.address_of(tirx.BufferLoad(target, [0]))

    def vector(number):
        return tirx.BufferLoad(source, [tirx.Ramp(number * lanes, 1, lanes)])

    number, last = tirx.Var("number", "int32"), tirx.indexdiv(size + lanes - 1, lanes)
    before = tirx.max(number - 1, 0)
    edge, inside = (
        put_line(passes, begin, begin, number * lanes, vector(before), vector(number), end) for end in (size, None)
    )
    # All but the first line and the last two are whole.
    put = tirx.IfThenElse(tirx.any(number == 0, number >= last - 1), edge, inside)
    body = tirx.For(number, 0, last + 1, tirx.ForKind.SERIAL, put)
    body = define_lines(tirx.SeqStmt([body, *end_copies(HOST.arch)]), dtype)
    function = tirx.PrimFunc([source, target, size, passes], body, tvm.ir.TupleType([]))
    compile_library(tvm.IRModule({"write": function.with_attr("global_symbol", "write")}), HOST, library)
    return tvm.runtime.load_module(str(library))["write"]


@pytest.mark.skipif(not HOST.joins_vectors, reason="no vector of this processor is a cache line")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lines_write_a_row_and_nothing_else(dtype, tmp_path):
    write, size = writer(dtype, tmp_path / "write.so"), np.dtype(dtype).itemsize
    source = torch.arange(1, 177).to(getattr(torch, dtype))
    for count in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 150, 160):
        for offset, passes in product((0, 1, 3, size, 5 * size, 32, 63, 64 - size), (True, False)):
            around = np.full(176 * size + 192, 77, np.uint8)
            start = -around.ctypes.data % 64 + 64 + offset
            target = torch.frombuffer(around, dtype=source.dtype, count=176, offset=start)
            write(source, target, count, passes)
            assert torch.equal(target[:count], source[:count])
            assert (around[:start] == 77).all()
            assert (around[start + count * size :] == 77).all()


def test_whole_lines_pass_the_caches():
    text = _lines_text(32)
    # Both functions store a whole line so, and the rest through the caches.
    assert text.count("!nontemporal") == 2
    assert text.count("@llvm.masked.store") == 3


@pytest.mark.parametrize(
    ("name", "asks", "ways"),
    [
        ("sam/up1", True, ""),  # 4 MiB
        ("seed/square", True, "put_line put_edge"),  # 53 MB; the ends of rows are asked for
        ("seed/rect", True, ""),  # 25 MB, but many products for each output
        ("dcgan/4", False, ""),  # fits the second cache
        ("bilinear/depthwise", False, ""),  # too few products to wait behind
    ],
)
def test_outputs_go_by_their_size(name, asks, ways):
    target = Target.parse("llvm:x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma+avx512fp16")
    spec = resolve([name])[0].spec
    text = lower_choice(spec, target, default_choice(spec, target)).module.script()
    assert bool(re.search(r"llvm\.prefetch.*, 1, 2, 1\)", text)) == asks
    for way in ("put_line", "put_edge", "copy_past_caches"):
        assert bool(re.search(rf"convt_{way}\"?,", text)) == (way in ways.split())


def test_rows_are_gathered_where_vectors_are_no_lines():
    spec, target = resolve(["seed/square"])[0].spec, Target.parse("llvm:x86-64-v3")
    text = lower_choice(spec, target, default_choice(spec, target)).module.script()
    assert re.search(r"convt_copy_past_caches\"?,", text)


def test_an_output_of_any_batch_size_is_taken_for_a_large_one():
    spec = replace(resolve(["dcgan/4"])[0].spec, n=None)
    text = lower_choice(spec, HOST, default_choice(spec.sized, HOST)).module.script()
    assert re.search(r"llvm\.prefetch.*, 1, 2, 1\)", text)


@pytest.mark.parametrize(
    ("name", "dtype", "lines"),
    [
        ("dcgan/2", "float32", 1),  # 8 MiB in blocks of 16 channels
        ("dcgan/2", "bfloat16", 1),
        ("dcgan/4", "float32", 0),  # 0.5 MiB stay in the second cache
    ],
)
def test_weights_from_beyond_the_second_cache_are_asked_for(name, dtype, lines):
    target = Target.parse("llvm:x86-64-v4").for_dtype(dtype)
    spec = replace(resolve([name])[0].spec, dtype=dtype)
    found = [choice for choice in choices(spec, target) if choice.layout.lanes == "co"]
    text = lower_choice(spec, target, next(c for c in found if c.layout.co_block == 16)).module.script()
    asked = re.findall(r"llvm\.prefetch.*, 0, 3, 1\)", text)
    assert len(asked) == lines


@pytest.mark.parametrize(("features", "asks"), [((), True), (("avx512bf16",), False)])
def test_weights_in_the_last_cache_that_meet_one_value_each_are_not_asked_for_on_zen_4(features, asks):
    v4, spec = Target.parse("llvm:x86-64-v4"), resolve(["dcgan/1"])[0].spec
    target = Target(v4.kind, v4.arch, (*v4.features, *features))
    text = lower_choice(spec, target, choices(spec, target, "llvm_channels")[0]).module.script()
    assert bool(re.search(r"llvm\.prefetch.*, 0, 3, 1\)", text)) == asks
