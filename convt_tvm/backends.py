"""What differs between kinds of layouts, and of targets, on the way from a spec to a library."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from convt_tvm.compute import declare_pack, declare_phases
from convt_tvm.compute_cuda import declare_thread_pack, declare_thread_phases
from convt_tvm.compute_depthwise import declare_depthwise_pack, declare_depthwise_phases
from convt_tvm.compute_dot import declare_dot_pack, declare_dot_phases
from convt_tvm.compute_taps import declare_tap_pack, declare_tap_phases
from convt_tvm.compute_tensor import declare_tensor_pack, declare_tensor_phases
from convt_tvm.compute_tile_taps import declare_tile_tap_pack, declare_tile_tap_phases
from convt_tvm.compute_tiles import declare_tile_pack, declare_tile_phases
from convt_tvm.cuda_device_code import device_compiler
from convt_tvm.cuda_toolkit import Resources
from convt_tvm.depthwise_layout import DepthwiseLayout
from convt_tvm.dot_layout import DotLayout
from convt_tvm.layout import Layout
from convt_tvm.lower import lower_kernel, lower_pack
from convt_tvm.lower_cuda import lower_thread_kernel, lower_thread_pack
from convt_tvm.lower_dot import lower_dot_kernel
from convt_tvm.lower_taps import lower_tap_kernel
from convt_tvm.lower_tensor import lower_tensor_kernel, lower_tensor_pack
from convt_tvm.lower_tile_taps import lower_tile_tap_kernel
from convt_tvm.lower_tiles import lower_tile_kernel
from convt_tvm.schedule import share_pack
from convt_tvm.schedule_cuda import bind_pack
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.tap_layout import TapLayout
from convt_tvm.target import Target
from convt_tvm.tensor_layout import TensorLayout
from convt_tvm.thread_layout import ThreadLayout
from convt_tvm.tile_layout import TileLayout
from convt_tvm.tile_tap_layout import TileTapLayout

__all__ = ["Backend", "code_generator", "get_backend"]


@dataclass(frozen=True)
class Backend:
    """How kernels of one kind of layout are declared, their packing scheduled, and both lowered.

    Attributes
    ----------
    declare_phases, declare_pack
        Spec, layout and target to a function to schedule.
    schedule_pack
        Schedules a packing in place.
    lower_kernel, lower_pack
        A scheduled function to a module with ``convt`` or ``pack``.
    """

    declare_phases: Callable[[ConvTranspose2dSpec, Any, Target], tirx.PrimFunc]
    declare_pack: Callable[[ConvTranspose2dSpec, Any, Target], tirx.PrimFunc]
    schedule_pack: Callable[[Schedule], None]
    lower_kernel: Callable[[tirx.PrimFunc], tvm.IRModule]
    lower_pack: Callable[[tirx.PrimFunc], tvm.IRModule]


_BACKENDS: dict[type[Layout], Backend] = {
    Layout: Backend(
        declare_phases,
        declare_pack,
        share_pack,
        lower_kernel,
        lower_pack,
    ),
    DepthwiseLayout: Backend(declare_depthwise_phases, declare_depthwise_pack, share_pack, lower_kernel, lower_pack),
    DotLayout: Backend(declare_dot_phases, declare_dot_pack, share_pack, lower_dot_kernel, lower_pack),
    TileLayout: Backend(declare_tile_phases, declare_tile_pack, share_pack, lower_tile_kernel, lower_pack),
    TapLayout: Backend(
        declare_tap_phases,
        declare_tap_pack,
        share_pack,
        lower_tap_kernel,
        partial(lower_pack, orders_columns=False),
    ),
    TileTapLayout: Backend(
        declare_tile_tap_phases,
        declare_tile_tap_pack,
        share_pack,
        lower_tile_tap_kernel,
        partial(lower_pack, orders_columns=False),
    ),
    ThreadLayout: Backend(
        declare_thread_phases,
        declare_thread_pack,
        bind_pack,
        lower_thread_kernel,
        lower_thread_pack,
    ),
    TensorLayout: Backend(
        declare_tensor_phases,
        declare_tensor_pack,
        bind_pack,
        lower_tensor_kernel,
        lower_tensor_pack,
    ),
}


def get_backend(layout: Layout) -> Backend:
    """What declares and lowers for layouts of that type."""
    return _BACKENDS[type(layout)]


@contextmanager
def code_generator(target: Target, emulated: bool) -> Iterator[list[Resources]]:
    """A context in which TVM compiles for `target`, or its emulator; it gives what machine code takes of a GPU."""
    # On processors StorageRewrite would drop what `lower` says of buffers on the stack; on GPUs it would lay sums over
    # stages in shared memory and then not know their type. There is nothing else for it to share.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        if target.kind == "cuda":
            with device_compiler(target, emulated) as resources:
                yield resources
        else:
            yield []
