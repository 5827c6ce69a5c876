"""One kernel for any batch size of several, whose tiles take in so many images each.

A tile of eight images reads each weight once for all of them, and is wasted on one image. So a batch is shared out:
as many images as fill the largest tiles, then of what is left those that fill the next, and so on. Where the rest is
more than a smaller tile would take in, another tile goes on with it and is not filled: of 8, 4, 2 and 1 images in a
tile, 15 take two of 8, and 9 one of 8 and one of 1.

On a core of an Emerald Rapids server batches of 1 to 64 images of 1 x 1 and 2 x 2 took 1.0 to 1.1 times as long as with
a kernel for their size where that is a power of two, and up to 1.7 times where it is not. One image after the other
took up to 7 times as long.
"""

from collections.abc import Mapping

import tvm
from tvm import tirx

from convt_tvm.statements import on_stack, tensor, view

__all__ = ["join_kernels"]


def join_kernels(kernels: Mapping[int, tvm.IRModule]) -> tvm.IRModule:
    """One of `kernels` for any batch size, ``convt(input, packed, [bias,] output)``, that take the same packed weight.

    They are by the number of images in a tile, from the largest to a single one.
    """
    functions = [module["convt"] for module in kernels.values()]
    batch = tirx.Var("n", "int32")
    inputs, outputs = functions[0].params[0], functions[0].params[-1]
    shapes = {each.name: [batch, *each.shape[1:]] for each in (inputs, outputs)}
    params = [tensor(each.name, shapes.get(each.name, each.shape), str(each.dtype)) for each in functions[0].params]
    # From memory, and TVM does not put the expressions in place of the variables (it took 20 seconds to simplify them).
    counts = tirx.decl_buffer((len(functions),), "int32", name="counts")
    statements, first, left = [on_stack(tirx.AllocBuffer(counts))], tirx.const(0, "int32"), batch
    for number, (function, size, below) in enumerate(zip(functions, kernels, [*list(kernels)[1:], 0], strict=True)):
        count, rest = function.params[0].shape[0], tirx.indexmod(left, size)
        statements.append(tirx.BufferStore(counts, tirx.Select(rest > below, left, left - rest), [number]))
        statements.append(tirx.Bind(count, tirx.BufferLoad(counts, [number])))
        for own, joined in zip(function.params, params, strict=True):
            start = [first if joined.name in shapes else 0, *(0 for _ in joined.shape[1:])]
            statements.append(view(own, joined, start))
        statements.append(tirx.IfThenElse(count > 0, function.body, None))
        first, left = first + count, left - count
    body = tirx.SeqStmt(statements)
    module = tvm.IRModule({"convt": tirx.PrimFunc(params, body, functions[0].ret_type, functions[0].attrs)})
    # What is defined in one of them may have the name of something in another.
    return tirx.transform.ConvertSSA()(module)
