"""Warp-level matrix products as tensor intrinsics: what a schedule replaces blocks of 16 x 16 with.

They stand for ``nvcuda::wmma`` in the CUDA C++. Those that TVM brings have neither bfloat16 nor tf32, and importing
them takes half a minute.

Weights are matrix A, stored with channels side by side, and inputs matrix B, stored with input channels side by side:
both column-major to wmma. Sums are stored row by row, so positions lie side by side.
"""

import functools
import re
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import Cast

from convt_tvm.tensor_layout import FRAGMENT

__all__ = [
    "fill_intrinsic",
    "load_intrinsic",
    "name_tf32",
    "operand_dtype",
    "product_intrinsic",
    "read_shared",
    "store_intrinsic",
]

_STANDS_FOR_TF32 = re.compile(r"(nvcuda::wmma::fragment<nvcuda::wmma::matrix_[ab], 16, 16, 8, )nv_bfloat16")

_FRAGMENT = re.compile(
    r"(nvcuda::wmma::fragment<nvcuda::wmma::matrix_([ab]), 16, 16, (\d+), "
    r"(nv_bfloat16|nvcuda::wmma::precision::tf32), nvcuda::wmma::col_major>)"
)
_READ_SHARED = """\
static __device__ __forceinline__ void convt_read_shared({fragment}& f, const void* address, unsigned distance) {{
  static_assert(sizeof(f.x) == 16, "four registers");
  unsigned* x = reinterpret_cast<unsigned*>(f.x);
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(address));
  asm volatile("{instruction} {{%0, %1, %2, %3}}, [%4], %5;"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(place), "r"(distance) : "memory");
}}
"""


def _index(buffer: Any, stride: Any, rows: int, columns: int) -> Any:
    """The number of the fragment in its array that a part of a buffer of fragments is."""
    offset = buffer.elem_offset
    return offset // stride // rows * (stride // columns) + offset % stride // columns


def operand_dtype(dtype: str) -> str:
    """The type of fragments that multiply values of `dtype`.

    TVM's code generator refuses fragments of float32. bfloat16 stands for tf32: wmma has no products of bfloat16 that
    are 8 deep, so `name_tf32` knows them.
    """
    return "bfloat16" if dtype == "float32" else dtype


def name_tf32(code: str) -> str:
    """CUDA C++ in which the fragments that stand for tf32 are of tf32."""
    return _STANDS_FOR_TF32.sub(r"\1nvcuda::wmma::precision::tf32", code)


def read_shared(code: str) -> str:
    """CUDA C++ in which fragments of bfloat16 and tf32 are read from shared memory, said in PTX.

    nvcc 13.0 finds out for half alone that an address is in shared memory; for the others its PTX reads from an address
    that may be anywhere, for which there is no instruction that reads whole matrices.
    """
    found = sorted(set(_FRAGMENT.findall(code)))
    if not found:
        return code
    functions = []
    for fragment, use, depth, dtype in found:
        name = f"wmma.load.{use}.sync.aligned.col.m16n16k{depth}.shared.{'tf32' if 'tf32' in dtype else 'bf16'}"
        functions.append(_READ_SHARED.format(fragment=fragment, instruction=name))
    code = code.replace("nvcuda::wmma::load_matrix_sync(", "convt_read_shared(")
    return code.replace("#include <mma.h>", "\n".join(["#include <mma.h>", *functions]), 1)


@functools.cache
def load_intrinsic(matrix: str, depth: int, dtype: str) -> str:
    """The intrinsic that reads a fragment of `matrix`, ``a`` or ``b``, from shared memory; registered when needed."""
    rows, columns = (depth, FRAGMENT) if matrix == "a" else (FRAGMENT, depth)
    scope, operand = f"wmma.matrix_{matrix}", operand_dtype(dtype)

    def convert(value: Any) -> Any:
        return value if dtype == operand else Cast(operand, value)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (rows, columns), dtype, align=64, offset_factor=8, scope="shared")
        C = T.match_buffer(c, (rows, columns), operand, align=64, offset_factor=8, scope=scope)
        with T.sblock("root"):
            T.reads(A[0:rows, 0:columns])
            T.writes(C[0:rows, 0:columns])
            for i, j in T.grid(rows, columns):
                with T.sblock("load"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vi, vj] = convert(A[vi, vj])

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, c: T.handle) -> None:
        a1 = T.int32()
        a0 = T.int32()
        c1 = T.int32()
        c0 = T.int32()
        A = T.match_buffer(a, (rows, columns), dtype, align=64, offset_factor=8, scope="shared", strides=[a1, a0])
        C = T.match_buffer(c, (rows, columns), operand, align=64, offset_factor=8, scope=scope, strides=[c1, c0])
        with T.sblock("root"):
            T.reads(A[0:rows, 0:columns])
            T.writes(C[0:rows, 0:columns])
            T.evaluate(
                T.tvm_load_matrix_sync(
                    C.data,
                    FRAGMENT,
                    FRAGMENT,
                    depth,
                    _index(C, c1, rows, columns),
                    A.access_ptr("r", ptr_type=dtype),
                    a1,
                    "col_major",
                    dtype="void",
                )
            )

    name = f"convt.wmma_load_{matrix}_{depth}_{dtype}"
    TensorIntrin.register(name, description, implementation)
    return name


@functools.cache
def product_intrinsic(depth: int, dtype: str) -> str:
    """The intrinsic that adds the product of two fragments to a fragment of sums."""
    operand = operand_dtype(dtype)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (depth, FRAGMENT), operand, align=64, offset_factor=8, scope="wmma.matrix_a")
        B = T.match_buffer(b, (FRAGMENT, depth), operand, align=64, offset_factor=8, scope="wmma.matrix_b")
        C = T.match_buffer(c, (FRAGMENT, FRAGMENT), "float32", align=64, offset_factor=8, scope="wmma.accumulator")
        with T.sblock("root"):
            T.reads(C[0:FRAGMENT, 0:FRAGMENT], A[0:depth, 0:FRAGMENT], B[0:FRAGMENT, 0:depth])
            T.writes(C[0:FRAGMENT, 0:FRAGMENT])
            for i, j, k in T.grid(FRAGMENT, FRAGMENT, depth):
                with T.sblock("product"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    C[vi, vj] = C[vi, vj] + Cast("float32", A[vk, vi]) * Cast("float32", B[vj, vk])

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        a1 = T.int32()
        a0 = T.int32()
        b1 = T.int32()
        b0 = T.int32()
        c1 = T.int32()
        c0 = T.int32()
        A = T.match_buffer(
            a, (depth, FRAGMENT), operand, align=64, offset_factor=8, scope="wmma.matrix_a", strides=[a1, a0]
        )
        B = T.match_buffer(
            b, (FRAGMENT, depth), operand, align=64, offset_factor=8, scope="wmma.matrix_b", strides=[b1, b0]
        )
        C = T.match_buffer(
            c, (FRAGMENT, FRAGMENT), "float32", align=64, offset_factor=8, scope="wmma.accumulator", strides=[c1, c0]
        )
        with T.sblock("root"):
            T.reads(C[0:FRAGMENT, 0:FRAGMENT], A[0:depth, 0:FRAGMENT], B[0:FRAGMENT, 0:depth])
            T.writes(C[0:FRAGMENT, 0:FRAGMENT])
            T.evaluate(
                T.tvm_mma_sync(
                    C.data,
                    _index(C, c1, FRAGMENT, FRAGMENT),
                    A.data,
                    _index(A, a1, depth, FRAGMENT),
                    B.data,
                    _index(B, b1, FRAGMENT, depth),
                    C.data,
                    _index(C, c1, FRAGMENT, FRAGMENT),
                    dtype="void",
                )
            )

    name = f"convt.wmma_product_{depth}_{dtype}"
    TensorIntrin.register(name, description, implementation)
    return name


@functools.cache
def fill_intrinsic(depth: int) -> str:
    """The intrinsic that sets a fragment of sums to zero."""

    @T.prim_func(s_tir=True)
    def description(c: T.handle) -> None:
        C = T.match_buffer(c, (FRAGMENT, FRAGMENT), "float32", align=64, offset_factor=8, scope="wmma.accumulator")
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:FRAGMENT, 0:FRAGMENT])
            for i, j in T.grid(FRAGMENT, FRAGMENT):
                with T.sblock("init"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vi, vj] = T.float32(0)

    @T.prim_func(s_tir=True)
    def implementation(c: T.handle) -> None:
        c1 = T.int32()
        c0 = T.int32()
        C = T.match_buffer(
            c, (FRAGMENT, FRAGMENT), "float32", align=64, offset_factor=8, scope="wmma.accumulator", strides=[c1, c0]
        )
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:FRAGMENT, 0:FRAGMENT])
            T.evaluate(
                T.tvm_fill_fragment(
                    C.data,
                    FRAGMENT,
                    FRAGMENT,
                    depth,
                    _index(C, c1, FRAGMENT, FRAGMENT),
                    T.float32(0),
                    dtype="void",
                )
            )

    name = f"convt.wmma_fill_{depth}"
    TensorIntrin.register(name, description, implementation)
    return name


@functools.cache
def store_intrinsic(depth: int) -> str:
    """The intrinsic that writes a fragment of sums to shared memory."""

    @T.prim_func(s_tir=True)
    def description(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (FRAGMENT, FRAGMENT), "float32", align=64, offset_factor=8, scope="wmma.accumulator")
        C = T.match_buffer(c, (FRAGMENT, FRAGMENT), "float32", align=64, offset_factor=4, scope="shared")
        with T.sblock("root"):
            T.reads(A[0:FRAGMENT, 0:FRAGMENT])
            T.writes(C[0:FRAGMENT, 0:FRAGMENT])
            for i, j in T.grid(FRAGMENT, FRAGMENT):
                with T.sblock("store"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vi, vj] = A[vi, vj]

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, c: T.handle) -> None:
        a1 = T.int32()
        a0 = T.int32()
        c1 = T.int32()
        c0 = T.int32()
        A = T.match_buffer(
            a, (FRAGMENT, FRAGMENT), "float32", align=64, offset_factor=8, scope="wmma.accumulator", strides=[a1, a0]
        )
        C = T.match_buffer(
            c, (FRAGMENT, FRAGMENT), "float32", align=64, offset_factor=4, scope="shared", strides=[c1, c0]
        )
        with T.sblock("root"):
            T.reads(A[0:FRAGMENT, 0:FRAGMENT])
            T.writes(C[0:FRAGMENT, 0:FRAGMENT])
            T.evaluate(
                T.tvm_store_matrix_sync(
                    A.data,
                    FRAGMENT,
                    FRAGMENT,
                    depth,
                    _index(A, a1, FRAGMENT, FRAGMENT),
                    C.access_ptr("w", ptr_type="float32"),
                    c1,
                    "row_major",
                    dtype="void",
                )
            )

    name = f"convt.wmma_store_{depth}"
    TensorIntrin.register(name, description, implementation)
    return name
