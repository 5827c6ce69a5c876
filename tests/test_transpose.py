"""Transposes in registers: every size, against numpy."""

import numpy as np
import pytest
import tvm
from tvm import tirx

from convt_tvm.target import Target
from convt_tvm.transpose import pieces, ramp, transpose


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


@pytest.mark.parametrize("limit", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", range(1, 70))
def test_pieces_cover_everything_and_nothing_more(count, limit):
    found = pieces(count, limit)
    assert {start + i for start, size in found for i in range(size)} == set(range(count))
    assert all(size <= limit and size & (size - 1) == 0 for _, size in found)
    assert sum(size for _, size in found) < 2 * count
