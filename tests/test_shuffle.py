"""Transposes and interleaves in registers: every size, against numpy."""

import numpy as np
import pytest
import tvm
from tvm import tirx

from convt_tvm.shuffle import binary, extract, interleave, pieces, ramp, transpose
from convt_tvm.target import Target


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
def test_columns_are_those_of_the_matrix(lanes, dtype):
    functions, sizes = {}, [size for size in (1, 2, 4, 8, 16) if size <= lanes]
    for size in sizes:
        rows = tirx.decl_buffer((size, lanes), dtype, "rows")
        columns = tirx.decl_buffer((lanes, size), dtype, "columns")
        zero, statements = tirx.const(0, "int32"), []
        vectors = [tirx.BufferLoad(rows, [tirx.const(i, "int32"), ramp(zero, lanes)]) for i in range(size)]
        for i, column in enumerate(transpose(vectors, lanes, dtype, statements)):
            statements.append(tirx.BufferStore(columns, column, [tirx.const(i, "int32"), ramp(zero, size)]))
        function = tirx.PrimFunc([rows, columns], tirx.SeqStmt(statements), None)
        functions[f"transpose{size}"] = function.with_attr("global_symbol", f"transpose{size}")
    module = tvm.compile(tvm.IRModule(functions), target=Target.parse("llvm").to_tvm())
    for size in sizes:
        matrix = np.arange(size * lanes, dtype=dtype).reshape(size, lanes)
        found = tvm.runtime.tensor(np.zeros((lanes, size), dtype))
        module[f"transpose{size}"](tvm.runtime.tensor(matrix), found)
        assert np.array_equal(found.numpy(), matrix.T)


@pytest.mark.parametrize("lanes", [4, 16])
def test_interleaved_values_are_by_turns_of_each_vector(lanes):
    functions, zero = {}, tirx.const(0, "int32")
    for count in range(1, 9):
        rows = tirx.decl_buffer((count, lanes), "float32", "rows")
        woven, statements = tirx.decl_buffer((count * lanes,), "float32", "woven"), []
        vectors = [tirx.BufferLoad(rows, [tirx.const(i, "int32"), ramp(zero, lanes)]) for i in range(count)]
        for i, vector in enumerate(interleave(vectors, lanes, "float32", statements)):
            for start, size in [*binary(lanes - 1), (lanes - 1, 1)]:
                place = ramp(tirx.const(i * lanes + start, "int32"), size)
                statements.append(tirx.BufferStore(woven, extract(vector, start, size, lanes), [place]))
        function = tirx.PrimFunc([rows, woven], tirx.SeqStmt(statements), None)
        functions[f"interleave{count}"] = function.with_attr("global_symbol", f"interleave{count}")
    module = tvm.compile(tvm.IRModule(functions), target=Target.parse("llvm").to_tvm())
    for count in range(1, 9):
        matrix = np.arange(count * lanes, dtype="float32").reshape(count, lanes)
        found = tvm.runtime.tensor(np.zeros(count * lanes, "float32"))
        module[f"interleave{count}"](tvm.runtime.tensor(matrix), found)
        assert np.array_equal(found.numpy(), matrix.T.ravel())


@pytest.mark.parametrize("count", range(1, 40))
def test_binary_pieces_partition(count):
    assert [start + i for start, size in binary(count) for i in range(size)] == list(range(count))


@pytest.mark.parametrize("limit", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", range(1, 70))
def test_pieces_cover_everything_and_nothing_more(count, limit):
    found = pieces(count, limit)
    assert {start + i for start, size in found for i in range(size)} == set(range(count))
    assert all(size <= limit and size & (size - 1) == 0 for _, size in found)
    assert sum(size for _, size in found) < 2 * count
