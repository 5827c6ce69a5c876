"""From lowered functions to a shared library for processors.

TVM's own way goes through fifty passes, most of them for GPUs, for software pipelines or for blocks, of which
`convt_tvm.lower` leaves none; several simplify every expression, again and again after loops were unrolled. Here are
those that change something. They take a quarter less time and gave the same machine code for each of 84 kernels: all
workloads, all tuned results, and fuzzed specs, six of these with tiles of AMX.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import tvm
from tvm import s_tir, tirx
from tvm.support import cc

from convt_tvm.target import Target

__all__ = ["compile_library"]

INDEX_BITS = 32
LINK_OPTIONS = ("-nostdlib",)
LIBRARIES = ("-lgcc", "-lc")
"""All that kernels call besides TVM: conversions of numbers, and memset. The C++ compiler would read libstdc++ and libm
as well, and start and end files for constructors that no kernel has, which takes it as long again."""


def compile_library(module: tvm.IRModule, target: Target, library: Path) -> None:
    """Compile functions as `convt_tvm.lower` leaves them into the shared object `library`; object files stay beside it.

    TVM's own errors pass through, and those of the linker as RuntimeError.
    """
    processor = target.to_tvm()
    # As `tvm.compile` does for a target that is its own host.
    bound = tirx.transform.BindTarget(processor.with_host(processor))(module)
    lowered = tvm.ir.transform.Sequential(_passes())(bound)
    code = tvm.get_global_func("target.build.llvm")(lowered, processor)
    code.export_library(str(library), fcompile=_link, workspace_dir=str(library.parent))


def _passes() -> list[tvm.ir.transform.Pass]:
    """What turns loops over vectors and buffers of many dimensions into what LLVM has."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        # Without blocks, it takes away loops of one iteration.
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(INDEX_BITS),
        tirx.transform.VectorizeLoop(True),
        # Before unrolling, where there are few expressions. The next one splits divisions by products, but simple ones.
        tirx.transform.StmtSimplify(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.UnrollLoop(),
        # Simplifies, and removes what does nothing then, besides what its name says.
        s_tir.transform.HoistIfThenElse(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
        tirx.transform.LowerTVMBuiltin(),
        tirx.transform.LowerIntrin(),
    ]


def _link(library: str, objects: Sequence[str]) -> None:
    if sys.platform == "linux":
        cc.create_shared(library, [*objects, *LIBRARIES], [*LINK_OPTIONS])
    else:
        cc.create_shared(library, [*objects])
