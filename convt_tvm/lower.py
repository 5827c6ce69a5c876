"""From scheduled phase forms to the two functions of a kernel library.

`compute` declares outputs whose extents suit a schedule: row bands apart, channel blocks and columns rounded up. Here
each store to such an output becomes a store to the real tensor, guarded where the declaration computes a surplus. It
happens after scheduling, so that a schedule sees a plain perfect loop nest, and before vectorisation, so that no
store is executed out of bounds by a lane.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import tvm
from tvm import s_tir, tirx

from convt_tvm.compute import bands, kernel_columns, layout_of, lookup, spec_of

__all__ = ["lower_kernel", "lower_pack"]

MAX_STACK_BYTES = 32 << 10
"""Largest buffer on a thread's stack: a row of accumulators, not the input's window."""

Expr = Any
Store = Callable[[Sequence[Expr], Expr], Any]
"""Makes the statement that replaces a store, from its indices and its value."""


def _flatten_blocks(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """`function` as loops, allocations and stores, without blocks."""
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        tirx.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
    ]
    module = tvm.ir.transform.Sequential(passes)(tvm.IRModule({"main": function}))
    return module["main"]


def _on_stack(node: Any) -> Any:
    """The allocation `node`, on the stack if it is small: LLVM keeps values in registers only if no pointer escapes.

    TVM allocates 1 KiB and more from a pool, in a call for each task.
    """
    buffer = node.buffer
    size_bytes = prod(int(extent) for extent in buffer.shape) * tvm.DataType(str(buffer.dtype)).itemsize
    if size_bytes > MAX_STACK_BYTES:
        return node
    return tirx.AllocBuffer(buffer, {**node.annotations, "disable_lower_builtin": tirx.const(1, "bool")})


def _replace_stores(statement: Any, stores: Mapping[Any, Store]) -> Any:
    """`statement` with each store to a buffer of `stores` replaced."""

    def visit(node: Any) -> Any:
        match node:
            case tirx.BufferStore():
                return stores[node.buffer](list(node.indices), node.value) if node.buffer in stores else node
            case tirx.SeqStmt():
                return tirx.SeqStmt([visit(part) for part in node.seq])
            case tirx.For():
                body = visit(node.body)
                return tirx.For(
                    node.loop_var,
                    node.min,
                    node.extent,
                    node.kind,
                    body,
                    node.thread_binding,
                    node.annotations,
                    node.step,
                )
            case tirx.IfThenElse():
                other = None if node.else_case is None else visit(node.else_case)
                return tirx.IfThenElse(node.condition, visit(node.then_case), other)
            case tirx.AttrStmt():
                return tirx.AttrStmt(node.node, node.attr_key, node.value, visit(node.body))
            case tirx.AllocBuffer():
                return _on_stack(node)
            case tirx.DeclBuffer() | tirx.Bind() | tirx.Evaluate() | tirx.AssertStmt():
                return node
            case _:
                raise AssertionError(f"a scheduled phase form holds an unexpected {type(node).__name__}")

    return visit(statement)


def _assemble(function: tirx.PrimFunc, name: str, output: Any, stores: Callable[[int], Store]) -> tvm.IRModule:
    """A module with `function` as `name`, its outputs joined in `output`; ``stores(k)`` writes what output k held."""
    function = _flatten_blocks(function)
    inputs = [buffer for buffer in function.params if not _is_output(buffer)]
    replaced = {buffer: stores(k) for k, buffer in enumerate(filter(_is_output, function.params))}
    body = _replace_stores(function.body, replaced)
    joined = tirx.PrimFunc([*inputs, output], body, function.ret_type)
    return tvm.IRModule({name: joined.with_attrs({**function.attrs, "global_symbol": name})})


def lower_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled phase form `function` as ``convt(input, packed, [bias,] output)``, output NCHW."""
    spec, layout = spec_of(function), layout_of(function)
    row_bands = bands(spec)
    channels = spec.co // spec.groups
    (stride_h, stride_w), columns = spec.stride, layout.columns(spec)
    output = _buffer("output", spec.output_shape, spec.dtype)

    def store_band(k: int) -> Store:
        residues = [phase.residue for phase in row_bands[k].phases]

        def store(indices: Sequence[Expr], value: Expr) -> Any:
            n, g, b, ob, ph, qh, qw, pw = indices
            channel = b * layout.co_block + ob
            row, column = qh * stride_h + lookup(residues, ph), qw * stride_w + pw
            surplus = []
            if channels % layout.co_block:
                surplus.append(channel < channels)
            if columns * len(spec.axes[1].phases) > spec.ow:
                surplus.append(column < spec.ow)
            statement = tirx.BufferStore(output, value, [n, g * channels + channel, row, column])
            return tirx.IfThenElse(tirx.all(*surplus), statement, None) if surplus else statement

        return store

    return _assemble(function, "convt", output, store_band)


def lower_pack(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled packing `function` as ``pack(weight, packed)``."""
    spec, layout = spec_of(function), layout_of(function)
    packed = _buffer("packed", layout.packed_shape(spec), spec.accumulator_dtype)
    places = kernel_columns(spec)

    def store_packed(_: int) -> Store:
        def store(indices: Sequence[Expr], value: Expr) -> Any:
            block, kh, kw, ic, ob = indices
            return tirx.BufferStore(packed, value, [block, kh, lookup(places, kw), ic, ob])

        return store

    return _assemble(function, "pack", packed, store_packed)


def _is_output(buffer: Any) -> bool:
    name = str(buffer.name)
    return name.startswith("band") or name == "ordered"


def _buffer(name: str, shape: Sequence[int], dtype: str) -> Any:
    return tirx.decl_buffer(shape, dtype, name=name, data_alignment=tvm.DataType(dtype).itemsize)
