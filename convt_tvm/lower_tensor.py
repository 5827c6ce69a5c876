"""From matrix products scheduled for tensor cores to the two functions of a kernel library."""

from math import prod
from typing import Any

import tvm
from tvm import ir, tirx

from convt_tvm.compute import lookup, spec_of
from convt_tvm.compute_tensor import tensor_layout_of
from convt_tvm.lower_cuda import assemble
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.statements import rebuild, rewrite
from convt_tvm.tensor_layout import FRAGMENT, TAPS, TensorLayout, reaches_of

__all__ = ["lower_tensor_kernel", "lower_tensor_pack"]


def lower_tensor_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled matrix products `function` as ``convt(input, packed, [bias,] output)``, output NCHW."""
    spec, layout = spec_of(function), tensor_layout_of(function)
    channels, (stride_h, stride_w) = spec.co // spec.groups, spec.stride
    pitch = layout.pitch(spec)
    output = tirx.decl_buffer(spec.output_shape, spec.dtype, name="output")

    def store(node: Any) -> Any:
        n, g, b, ph, pb, rb, cb, ot, pt, wc, oi, wp, pi, wi = node.indices
        channel = b * layout.co_block + (wc * layout.channel_tiles + ot) * FRAGMENT + oi
        position = (pt * layout.position_warps + wp) * FRAGMENT + pi
        down, along = position // pitch, position % pitch
        row = (rb * layout.row_block + down) * stride_h + ph
        column = (cb * layout.column_block + along) * stride_w + pb * layout.phases + wi
        statement = tirx.BufferStore(output, node.value, [n, g * channels + channel, row, column])
        limits = (
            (down, layout.row_block),
            (along, layout.column_block),
            (channel, channels),
            (row, spec.oh),
            (column, spec.ow),
        )
        return tirx.IfThenElse(tirx.all(*(index < size for index, size in limits)), statement, None)

    whole = assemble(function, "convt", output, {"band": store})["convt"]
    source = tirx.decl_buffer(spec.input_shape, spec.dtype, name="input")
    body = _load_words(whole.body, source, layout.loaded)
    rows, columns = reaches_of(spec)
    if set(rows.taps) != {rows.most_taps} or set(columns.taps) != {columns.most_taps}:
        body = _leave_out(body, spec, layout)
    convt = tirx.PrimFunc([source, *whole.params[1:]], body, whole.ret_type).with_attrs(whole.attrs)
    return tvm.IRModule({"convt": convt})


def _load_words(body: Any, source: Any, loaded: int) -> Any:
    """`body` with the words that it loads taken from `source`, so many values in each."""

    def change(node: Any) -> Any | None:
        load = node.value if isinstance(node, tirx.BufferStore) else None
        if not isinstance(load, ir.TensorLoad) or str(load.source.name) != "words":
            return None
        *place, column = load.indices
        if loaded > 1:
            column = tirx.Ramp(column * loaded, 1, loaded)
        word = tirx.reinterpret(load.source.dtype, tirx.BufferLoad(source, [*place, column]))
        return tirx.BufferStore(node.buffer, word, node.indices)

    return rewrite(body, change)


def _leave_out(body: Any, spec: ConvTranspose2dSpec, layout: TensorLayout) -> Any:
    """`body` without the products of taps that a phase does not have.

    Their weights are zeros, but inputs need not be finite. All lanes of a warp compute the same phase.
    """
    rows, columns = reaches_of(spec)
    threads: dict[str, Any] = {}

    def change(node: Any) -> Any | None:
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            threads[str(node.node.thread_tag)] = node.node.var
        if not isinstance(node, tirx.For) or TAPS not in node.annotations:
            return None
        # As `convt_tvm.schedule_tensor.bind_blocks` fuses n, g, ph, pb, rb, cb, b, and `order_products` wd, wi, wc, wp.
        rest = threads["blockIdx.x"] // (prod(layout.tiles(spec)) * layout.blocks(spec))
        parts = len(columns.taps) // layout.phases
        if str(node.annotations[TAPS]) == "rows":
            taps = lookup(rows.taps, rest // parts % len(rows.taps))
        else:
            warp = threads.get("threadIdx.y", tirx.const(0, "int32"))
            joined = warp // (layout.channel_warps * layout.position_warps) % layout.phases
            taps = lookup(columns.taps, rest % parts * layout.phases + joined)
        return rebuild(node, tirx.IfThenElse(node.loop_var < taps, rewrite(node.body, change), None))

    return rewrite(body, change)


def lower_tensor_pack(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled packing `function` as ``pack(weight, packed)``."""
    spec, layout = spec_of(function), tensor_layout_of(function)
    packed = tirx.decl_buffer(layout.packed_shape(spec), layout.packed_dtype(spec), name="packed")
    return assemble(
        function, "pack", packed, {"ordered": lambda node: tirx.BufferStore(packed, node.value, node.indices)}
    )
