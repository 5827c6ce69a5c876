"""Asks the operating system for a processor's tile registers (AMX), which a process may use only with its leave."""

import ctypes
import errno
import os

from convt_tvm.errors import IncompatibleMachineError

__all__ = ["require_tiles"]

# Linux, arch/x86/include/uapi/asm/prctl.h and Documentation/arch/x86/xstate.rst.
_ARCH_PRCTL = 158
_REQUEST_PERMISSION = 0x1023
_TILE_DATA = 18


def require_tiles() -> None:
    """Let this process, its threads and its children use the tile registers; idempotent.

    Raises
    ------
    IncompatibleMachineError
        If the operating system refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return
    code = ctypes.get_errno()
    # The registers no longer fit a signal stack that some thread has set aside.
    why = "a thread's alternative signal stack is too small for them" if code == errno.ENOSPC else os.strerror(code)
    raise IncompatibleMachineError(
        f"the operating system refuses this process the tile registers (AMX): {why}; they need Linux 5.16 or newer "
        "that allows arch_prctl. Build for target 'llvm:x86-64-v4' to do without."
    )
