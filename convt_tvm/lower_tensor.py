"""From matrix products scheduled for tensor cores to the two functions of a kernel library."""

from typing import Any

import tvm
from tvm import tirx

from convt_tvm.compute import lookup, spec_of
from convt_tvm.compute_tensor import tensor_layout_of
from convt_tvm.lower_cuda import Store, assemble, store_packed
from convt_tvm.tensor_layout import FRAGMENT, Patch, patches

__all__ = ["lower_tensor_kernel", "lower_tensor_pack"]


def lower_tensor_kernel(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled matrix products `function` as ``convt(input, packed, [bias,] output)``, output NCHW."""
    spec, layout = spec_of(function), tensor_layout_of(function)
    channels, (stride_h, stride_w) = spec.co // spec.groups, spec.stride
    output = tirx.decl_buffer(spec.output_shape, spec.dtype, name="output")

    def store_patch(patch: Patch) -> Store:
        row_residues = [phase.residue for phase in patch.band.phases]
        column_residues = [phase.residue for phase in patch.columns]

        def store(node: Any) -> Any:
            n, g, b, ph, pw, rb, cb, wo, wp, ot, pt, oi, pi = node.indices
            channel = b * layout.co_block + (wo * layout.channel_tiles + ot) * FRAGMENT + oi
            position = (wp * layout.position_tiles + pt) * FRAGMENT + pi
            qh = rb * layout.row_block + position // layout.column_block
            qw = cb * layout.column_block + position % layout.column_block
            row, column = qh * stride_h + lookup(row_residues, ph), qw * stride_w + lookup(column_residues, pw)
            statement = tirx.BufferStore(output, node.value, [n, g * channels + channel, row, column])
            return tirx.IfThenElse(tirx.all(channel < channels, row < spec.oh, column < spec.ow), statement, None)

        return store

    return assemble(function, "convt", output, {f"band{patch.index}": store_patch(patch) for patch in patches(spec)})


def lower_tensor_pack(function: tirx.PrimFunc) -> tvm.IRModule:
    """The scheduled packing `function` as ``pack(weight, packed)``."""
    return store_packed(function, spec_of(function), tensor_layout_of(function))
