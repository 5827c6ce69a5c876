"""From scheduled thread forms to the two functions of a kernel library: every store becomes one to the real tensor.

Surplus rows, columns and channels of a tile are dropped by a condition around the store. (`convt_tvm.lower` narrows
loops instead, which threads have none of; and no store here is a vector's.)
"""

from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import tirx

from convt_tvm.compute import lookup, spec_of
from convt_tvm.compute_cuda import thread_layout_of
from convt_tvm.layout import Band, Layout, bands, kernel_columns
from convt_tvm.lower import flatten_blocks
from convt_tvm.lower_prefetch import prefetch
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.statements import rewrite
from convt_tvm.thread_layout import kernel_rows

__all__ = ["Store", "assemble", "lower_thread_kernel", "lower_thread_pack", "store_packed"]

Store = Callable[[Any], Any]
"""Makes the statement that replaces a store."""


def assemble(function: tirx.PrimFunc, name: str, output: Any, stores: Mapping[str, Store]) -> tvm.IRModule:
    """A module with `function` as `name`, its outputs joined in `output` by `stores`."""
    function = flatten_blocks(function)
    inputs = [buffer for buffer in function.params if str(buffer.name) not in stores]

    def change(node: Any) -> Any | None:
        if isinstance(node, tirx.AttrStmt) and node.attr_key.startswith("pragma_"):
            # TVM names the loop before it begins: a free variable, by which equal code would differ in its digest.
            return tirx.AttrStmt(tirx.const(0, "int32"), node.attr_key, node.value, rewrite(node.body, change))
        is_output = isinstance(node, tirx.BufferStore) and str(node.buffer.name) in stores
        return stores[str(node.buffer.name)](node) if is_output else None

    joined = tirx.PrimFunc([*inputs, output], prefetch(rewrite(function.body, change)), function.ret_type)
    return tvm.IRModule({name: joined.with_attrs({**function.attrs, "global_symbol": name})})


def lower_thread_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled thread form `function` as ``convt(input, packed, [bias,] output)``, output NCHW."""
    spec, layout = spec_of(function), thread_layout_of(function)
    channels, (stride_h, stride_w) = spec.co // spec.groups, spec.stride
    output = tirx.decl_buffer(spec.output_shape, spec.dtype, name="output")

    def store_band(band: Band) -> Store:
        residues = [phase.residue for phase in band.phases]

        def store(node: Any) -> Any:
            n, g, b, ph, rb, cb, pb, ty, oc, tr, qc, tc, pi = node.indices
            channel = b * layout.co_block + ty * layout.channel_tile + oc
            qw = (cb * layout.column_tile + qc) * layout.column_threads + tc
            row = (rb * layout.row_block + tr) * stride_h + lookup(residues, ph)
            column = qw * stride_w + pb * layout.phases + pi
            statement = tirx.BufferStore(output, node.value, [n, g * channels + channel, row, column])
            conditions = ((channel, channels), (row, spec.oh), (column, spec.ow))
            inside = tirx.all(*(index < size for index, size in conditions))
            return tirx.IfThenElse(inside, statement, None)

        return store

    return assemble(function, "convt", output, {f"band{band.index}": store_band(band) for band in bands(spec)})


def lower_thread_pack(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled packing `function` as ``pack(weight, packed)``."""
    return store_packed(function, spec_of(function), thread_layout_of(function))


def store_packed(function: tirx.PrimFunc, spec: ConvTranspose2dSpec, layout: Layout) -> tvm.IRModule:
    """A scheduled packing as ``pack(weight, packed)``: kernel rows and columns in the order of their phases."""
    packed = tirx.decl_buffer(layout.packed_shape(spec), layout.packed_dtype(spec), name="packed")
    rows, columns, blocks = kernel_rows(spec), kernel_columns(spec), layout.blocks(spec)

    def store(node: Any) -> Any:
        g, b, y, x, ic, ob = node.indices
        place = [g * blocks + b, lookup(rows, y), lookup(columns, x), ic, ob]
        return tirx.BufferStore(packed, node.value, place)

    return assemble(function, "pack", packed, {"ordered": store})
