"""What a compiled function takes, and verifies about its arguments before it reads or writes any memory.

TVM's calling convention verifies number, type, dtype, shape, strides and device, but no address. Here that is a few
instructions; in Python it would be a method call for each tensor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import tirx

from convt_tvm.statements import tensor, view

__all__ = ["guard_arguments", "take_shapes"]

_ANY_VALUE = 15
"""builtin::kTVMFFIAnyUnionValue: the 64 bits of a TVMFFIAny that hold a number or a pointer."""


def guard_arguments(function: tirx.PrimFunc, max_batch: int) -> tirx.PrimFunc:
    """`function`, raising ValueError where an argument shares memory with the last one, which it writes.

    Also where its batch size, if that is a variable, exceeds ``max_batch``.
    """
    *inputs, output = function.params
    statements: list[Any] = []
    batch = output.shape[0]
    if not isinstance(batch, tirx.IntImm):
        statements.append(_require(batch <= max_batch, f"the batch has more than {max_batch} images; split it"))
    # TIR converts no pointer to a number, except by storing the one and loading the other.
    alloca = tirx.tvm_stack_alloca("tvm_ffi_any", len(function.params))
    values = tirx.Var("addresses", alloca.ty)
    statements.append(tirx.Bind(values, alloca))
    statements += [
        tirx.Evaluate(tirx.tvm_struct_set(values, index, _ANY_VALUE, buffer.data))
        for index, buffer in enumerate(function.params)
    ]
    *starts, start = (tirx.tvm_struct_get(values, index, _ANY_VALUE, "int64") for index in range(len(function.params)))
    for buffer, other in zip(inputs, starts, strict=True):
        apart = tirx.any(other >= start + _size_bytes(output), start >= other + _size_bytes(buffer))
        statements.append(_require(apart, f"{buffer.name} shares memory with {output.name}"))
    return function.with_body(tirx.SeqStmt([*statements, function.body]))


def take_shapes(function: tirx.PrimFunc, shapes: Mapping[str, Sequence[int]]) -> tirx.PrimFunc:
    """`function` with parameters of other `shapes`, but for the first extent, in which they are the same in memory."""
    params, views = [], []
    for own in function.params:
        taken = own
        if own.name in shapes:
            taken = tensor(own.name, [own.shape[0], *shapes[own.name][1:]], str(own.dtype))
            views.append(view(own, taken, [0] * len(own.shape)))
        params.append(taken)
    return tirx.PrimFunc(params, tirx.SeqStmt([*views, function.body]), function.ret_type, function.attrs)


def _require(condition: Any, message: str) -> Any:
    return tirx.AssertStmt(condition, tvm.ir.StringImm("ValueError"), [tvm.ir.StringImm(message)])


def _size_bytes(buffer: Any) -> Any:
    size = tirx.const(tvm.DataType(str(buffer.dtype)).itemsize, "int64")
    for extent in buffer.shape:
        size = size * tirx.Cast("int64", extent)
    return size
