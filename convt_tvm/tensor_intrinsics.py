"""Warp-level matrix products as tensor intrinsics: what a schedule replaces blocks of 16 x 16 with.

TVM's code generator makes calls of ``nvcuda::wmma`` of them, for which `use_instructions` has others. Those that TVM
brings have neither bfloat16 nor tf32, and importing them takes half a minute.

Weights are matrix A, stored with channels side by side, and inputs matrix B, stored with input channels side by side:
both column-major to wmma. Sums are stored row by row, so positions lie side by side.
"""

import functools
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import Cast

from convt_tvm.spec import DTYPE_BYTES
from convt_tvm.tensor_layout import FRAGMENT
from convt_tvm.thread_layout import VECTOR_BYTES

__all__ = [
    "fill_intrinsic",
    "load_intrinsic",
    "operand_dtype",
    "product_intrinsic",
    "store_intrinsic",
    "use_instructions",
]


def _index(buffer: Any, stride: Any, rows: int, columns: int) -> Any:
    """The number of the fragment in its array that a part of a buffer of fragments is."""
    offset = buffer.elem_offset
    return offset // stride // rows * (stride // columns) + offset % stride // columns


def operand_dtype(dtype: str) -> str:
    """The type of fragments that multiply values of `dtype`.

    TVM's code generator refuses fragments of float32. bfloat16 stands for tf32: there are no products of bfloat16 that
    are 8 deep.
    """
    return "bfloat16" if dtype == "float32" else dtype


def use_instructions(code: str) -> str:
    """CUDA C++ in which the matrix products of TVM's are those of ``cuda/warp_matrix.h``, instead of wmma's."""
    headers = "\n".join(f'#include "{name}.h"' for name in ("warp_instructions", "warp_matrix"))
    return code.replace("#include <mma.h>", headers, 1).replace("nvcuda::wmma::", "convt::")


@functools.cache
def load_intrinsic(matrix: str, depth: int, dtype: str) -> str:
    """The intrinsic that reads a fragment of `matrix`, ``a`` or ``b``, from shared memory; registered when needed."""
    rows, columns = (depth, FRAGMENT) if matrix == "a" else (FRAGMENT, depth)
    scope, operand = f"wmma.matrix_{matrix}", operand_dtype(dtype)
    factor = VECTOR_BYTES // DTYPE_BYTES[dtype]

    def convert(value: Any) -> Any:
        return value if dtype == operand else Cast(operand, value)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (rows, columns), dtype, align=64, offset_factor=factor, scope="shared")
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
        A = T.match_buffer(a, (rows, columns), dtype, align=64, offset_factor=factor, scope="shared", strides=[a1, a0])
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
