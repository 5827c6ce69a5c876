"""What differs between processors and GPUs on the way from a spec and a layout to a library."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from convt_tvm.compute import declare_pack, declare_phases
from convt_tvm.compute_cuda import declare_thread_pack, declare_thread_phases
from convt_tvm.cuda_device_code import device_compiler
from convt_tvm.cuda_toolkit import Resources
from convt_tvm.lower import lower_kernel, lower_pack
from convt_tvm.lower_cuda import lower_thread_kernel, lower_thread_pack
from convt_tvm.schedule import share_pack
from convt_tvm.schedule_cuda import bind_pack
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["Backend", "get_backend"]


@dataclass(frozen=True)
class Backend:
    """How kernels of one kind of target are declared, their packing scheduled, and both lowered and compiled.

    Attributes
    ----------
    declare_phases, declare_pack
        Spec, layout and target to a function to schedule.
    schedule_pack
        Schedules a packing in place.
    lower_kernel, lower_pack
        A scheduled function to a module with ``convt`` or ``pack``.
    code_generator
        Makes a context in which TVM compiles for a target, or its emulator; it gives what machine code takes of a GPU.
    config
        TVM's pass configuration.
    """

    declare_phases: Callable[[ConvTranspose2dSpec, Any, Target], tirx.PrimFunc]
    declare_pack: Callable[[ConvTranspose2dSpec, Any, Target], tirx.PrimFunc]
    schedule_pack: Callable[[Schedule], None]
    lower_kernel: Callable[[tirx.PrimFunc], tvm.IRModule]
    lower_pack: Callable[[tirx.PrimFunc], tvm.IRModule]
    code_generator: Callable[[Target, bool], AbstractContextManager[list[Resources]]]
    config: dict[str, Any]


@contextmanager
def _llvm(target: Target, emulated: bool) -> Iterator[list[Resources]]:
    yield []


_BACKENDS = {
    "llvm": Backend(
        declare_phases,
        declare_pack,
        share_pack,
        lower_kernel,
        lower_pack,
        _llvm,
        # StorageRewrite would drop what `lower` says of buffers on the stack; there is no storage to share.
        {"tirx.disable_storage_rewrite": True},
    ),
    "cuda": Backend(
        declare_thread_phases,
        declare_thread_pack,
        bind_pack,
        lower_thread_kernel,
        lower_thread_pack,
        device_compiler,
        {},
    ),
}


def get_backend(target: Target) -> Backend:
    """What compiles for the kind of `target`."""
    return _BACKENDS[target.kind]
